"""Data on the command line: from a file to a trained model without code, what is shown of it, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TINY = (
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.num_heads=4",
    "model.head_dim=8",
    "tokenizer=bytes",
    "train.batch_size=8",
    "train.input_length=32",
    "train.log_every=1",
)
T5 = ("model=t5-v1.1-small", *TINY, "model.num_encoder_layers=1", "model.num_decoder_layers=1")
BERT = (
    "model=roberta-base",
    *TINY,
    "model.num_encoder_layers=1",
    "optimizer.name=adamw",
    "optimizer.learning_rate=1e-2",
)


def write_pairs(path: Path, count: int = 120) -> Path:
    rows = [{"src": f"the number {n}", "tgt": f"{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_line(result: tuple[int, str, str]) -> str:
    status, out, err = result
    assert (status, out) == (2, ""), err
    (line,) = err.strip().splitlines()
    assert line.startswith("t5x-lite: ")
    return line


# --- training -------------------------------------------------------------------------------------------------------


def test_columns_are_all_that_a_file_of_pairs_needs(t5x, tmp_path: Path) -> None:
    path, out = write_pairs(tmp_path / "my.jsonl"), tmp_path / "run"
    settings = ("data.inputs=src", "data.targets=tgt", "train.steps=2", f"out={out}/")
    status, text, err = t5x("train", *T5, f"data.path={path}", *settings, "data.packing=true", "--json")
    assert status == 0, err
    assert json.loads(text)["step"] == 2
    assert "training examples in" in err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["data_wait"] <= 1 for line in lines if "split" not in line)
    status, text, err = t5x("eval", out, "--json")
    assert status == 0, err
    assert 0 <= json.loads(text)["exact_match"] <= 1
    # The same data under another name continues the run; other data does not.
    moved = path.rename(tmp_path / "moved.jsonl")
    status, _, err = t5x("train", *T5, f"data.path={moved}", *settings, "data.packing=true", "train.steps=3")
    assert status == 0, err
    assert "from step 2" in err
    write_pairs(moved, 121)
    assert "is not what the run" in one_line(
        t5x("train", *T5, f"data.path={moved}", *settings, "data.packing=true", "train.steps=4")
    )


def test_a_published_task_is_measured_as_it_should_be(t5x, tmp_path: Path) -> None:
    path = tmp_path / "cola.jsonl"
    path.write_text("".join(json.dumps({"sentence": f"words {n}", "label": n % 2}) + "\n" for n in range(40)))
    train = path.with_name("train.jsonl")
    train.write_text(path.read_text())
    settings = ("data.task=glue_cola", f"data.path={train}", f"data.eval_path={path}", "train.steps=1")
    assert t5x("train", *T5, *settings, f"out={tmp_path / 'run'}")[0] == 0
    train.unlink()  # which is not needed to evaluate on something else
    status, text, err = t5x("eval", tmp_path / "run", "--json")
    assert status == 0, err
    assert -1 <= json.loads(text)["matthews_correlation"] <= 1


def test_a_mixture_is_evaluated_task_by_task(t5x, tmp_path: Path) -> None:
    one, two = write_pairs(tmp_path / "one.jsonl"), write_pairs(tmp_path / "two.jsonl", 60)
    tasks = f"data.tasks=[{{path: {one}, rate: 2}}, {{path: {two}, rate: 1, name: other}}]"
    settings = (tasks, "data.inputs=src", "data.targets=tgt", "train.steps=1", "data.eval_fraction=0.2")
    assert t5x("train", *T5, *settings, f"out={tmp_path / 'run'}")[0] == 0
    status, text, err = t5x("eval", tmp_path / "run", "--json")
    assert status == 0, err
    found = json.loads(text)
    assert {"one/loss", "other/loss", "one/exact_match", "other/exact_match", "loss"} <= found.keys()
    tokens = found["one/target_tokens"], found["other/target_tokens"]
    assert sum(tokens) == found["target_tokens"]
    mean = (found["one/loss"] * tokens[0] + found["other/loss"] * tokens[1]) / sum(tokens)
    assert mean == pytest.approx(found["loss"], rel=1e-5)  # sums in float32, in another order


def test_inputs_that_were_cut_in_training_are_cut_in_evaluation(t5x, tmp_path: Path) -> None:
    path, rows = tmp_path / "my.jsonl", []
    for n in range(40):
        rows.append({"src": f"the number {n}" + " and so on" * (n % 4), "tgt": f"{n}"})
    path.write_text("\n".join(map(json.dumps, rows)))
    small = ("model.num_decoder_layers=1", "model.max_positions=32")  # as many as a row has tokens
    settings = (f"data.path={path}", "data.inputs=src", "data.targets=tgt", "train.steps=1", f"out={tmp_path / 'run'}")
    status, _, err = t5x("train", "model=gpt2", *TINY, *small, *settings)
    assert status == 0, err
    status, text, err = t5x("eval", tmp_path / "run", "data.split=train", "--json")
    assert status == 0, err
    assert 0 <= json.loads(text)["exact_match"] <= 1


def test_an_encoder_learns_from_a_text_file(t5x, corpus_file: Path, tmp_path: Path) -> None:
    settings = (*BERT, f"data.path={corpus_file}", "data.noise_density=0.4", f"out={tmp_path / 'run'}")
    status, text, err = t5x("train", *settings, "train.steps=30", "optimizer.schedule=constant", "--json")
    assert status == 0, err
    trained = json.loads(text)
    # Of 384 rows, some thirty occur: whoever has learnt that is far below ln 384.
    assert trained["loss"] < np.log(384) - 1.5
    assert "bits_per_byte" not in trained
    status, text, err = t5x("eval", tmp_path / "run", "--json")
    assert status == 0, err
    assert json.loads(text)["loss"] == pytest.approx(trained["loss"], rel=0.1)  # all held-out text, not 20 batches


def test_a_run_over_a_stream_goes_on_where_it_stopped(t5x, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "my.jsonl")
    files = (
        f"data.path={path}",
        f"data.eval_path={path}",
        "data.inputs=src",
        "data.targets=tgt",
        "data.streaming=true",
    )

    def losses(out: Path, *steps: int) -> list[float]:
        for last in steps:
            status, _, err = t5x("train", *T5, *files, f"train.steps={last}", f"out={out}")
            assert status == 0, err
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "split" not in line]

    assert losses(tmp_path / "whole", 4) == losses(tmp_path / "parts", 2, 4)


# --- looking at it --------------------------------------------------------------------------------------------------


def test_data_show_tells_segments_apart(t5x, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "my.jsonl")
    settings = (*T5, f"data.path={path}", "data.inputs=src", "data.targets=tgt", "data.packing=true")
    status, out, err = t5x("data", "show", *settings)
    assert status == 0, err
    first = next(line for line in out.splitlines() if "encoder sees" in line)
    assert first.count("the number") == 2
    assert " | the number" in first
    shares = [line for line in out.splitlines() if line.startswith("padding in the")]
    assert [line.split("'s")[0] for line in shares] == ["padding in the encoder", "padding in the decoder"]
    status, out, _ = t5x("data", "show", *settings, "--json", "--examples", 1)
    row = json.loads(out)
    real = np.mean(np.array(row["encoder_segment_ids"]) > 0)
    assert 0.5 < real < 1
    assert max(row["decoder_segment_ids"]) == 2
    assert row["encoder_positions"][:3] == [0, 1, 2]


def test_bench_data(t5x, tmp_path: Path, corpus_file: Path) -> None:
    status, out, err = t5x("bench", "data", *T5, f"data.path={corpus_file}", "--batches", 3, "--steps", 1, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["cache_tokens"] == sum(len(line) for line in corpus_file.read_text().splitlines())
    assert report["cache_ratio"] == pytest.approx(
        report["cache_tokens_per_second"] / report["tokenizer_tokens_per_second"]
    )
    assert report["batch_tokens_per_second"] > 0
    assert 0 <= report["data_wait"] <= 1
    assert 0 <= report["padding"] < 0.1
    assert "--batches must be at least 1, not 0" in one_line(t5x("bench", "data", "--batches", 0))


def test_a_tokenizer_is_trained_on_files_as_the_settings_say_to_read_them(t5x, tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    rows = [*('{"text": "un été à la mer"}' for _ in range(20)), "{broken", '{"text": null}']
    path.write_bytes("\n".join(rows).encode("latin-1"))
    command = ("tokenizer", "train", tmp_path / "x.model", "--vocab-size", 40, "--extra-ids", 2, f"data.path={path}")
    status, _, err = t5x(*command, "data.encoding=latin-1", "data.on_error=skip")
    assert status == 0, err
    assert "latin.jsonl:1" in one_line(t5x(*command))


# --- what is refused ------------------------------------------------------------------------------------------------


def write_all(folder: Path) -> None:
    good = [json.dumps({"src": f"number {n}", "tgt": str(n)}) for n in range(20)]
    (folder / "good.jsonl").write_text("\n".join(good))
    (folder / "broken.jsonl").write_text("\n".join([*good[:6], '{"src": "a"', *good]))
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("une ligne\nété\n".encode("latin-1"))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(good * 50).encode())[:-20])
    (folder / "image.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.path=broken.jsonl", "data.inputs=src", "data.targets=tgt"], ["broken.jsonl:7"]),
        (["data.path=good.jsonl", "data.inputs=source", "data.targets=tgt"], ["'source'", "src, tgt", "did you mean"]),
        (["data.path=empty.jsonl"], ["empty.jsonl", "empty"]),
        (["data.path=blank.txt"], ["no records in 'blank.txt'"]),
        (["data.path=latin.txt"], ["latin.txt:2", "0xe9"]),
        (["data.path=latin.txt", "data.encoding=latin-2000"], ["encoding 'latin-2000' is unknown"]),
        (["data.path=cut.jsonl.gz", "data.inputs=src", "data.targets=tgt"], ["cut.jsonl.gz"]),
        (["data.path=image.png"], ["image.png", ".jsonl"]),
        (["data.path=missing-*.txt"], ["missing-*.txt"]),
        ([f"data.path={'x' * 300}.txt"], ["no file matches 'xxx"]),
        (["data.path=good.jsonl", "data.text=src", "data.max_record_bytes=20"], ["good.jsonl:1", "20"]),
        (["data.path="], ["data.path is empty"]),
        (["data.tasks=[{path: good.jsonl}]", "data.path=x.txt"], ["data.path=x.txt and data.tasks exclude each other"]),
        (["data.tasks=[{path: good.jsonl}]", "data.eval_path=x"], ["data.eval_path=x and data.tasks exclude"]),
        (["data.path=[a, b]"], ["data.path='['a', 'b']': input should be a valid string or a valid mapping"]),
        (["data.buckets=64"], ["data.buckets='64': input should be a valid list"]),
        (["data.tasks=[3]"], ["data.tasks.0='3': input should be a mapping"]),
        (["data.tasks=[{path: good.jsonl, rates: 1}]"], ["unknown key 'rates' in data.tasks.0", "did you mean 'rate'"]),
        (["data.tasks=[{path: good.jsonl, rate: x}]"], ["data.tasks.0.rate='x'", "a valid number", "'proportional'"]),
        (["data.tasks=[{path: good.jsonl, rate: 0}]", "data.text=src"], ["ever drawn"]),
        (["data.path=tfds:no_such_set:train"], ["no_such_set", "download_and_prepare"]),
        (["data.task=glue_sst2"], ["glue/sst2", "download_and_prepare"]),
        (["data.task=wmt"], ["no published task or mixture is called 'wmt'; there are", "glue_cola", "super_glue"]),
        (["data.task=glue_sst3"], ["glue_sst3", "did you mean 'glue_sst2'"]),
    ],
)
def test_bad_data(t5x, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], words: list[Any]) -> None:
    write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = one_line(t5x("train", *T5, "train.steps=1", "out=run", *settings))
    for word in words:
        assert word in line
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_bad_records_can_be_left_out(t5x, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = ("data.path=broken.jsonl", "data.inputs=src", "data.targets=tgt", "data.on_error=skip")
    status, _, err = t5x("train", *T5, "train.steps=1", "out=run", *settings)
    assert status == 0, err
    assert "1 records were skipped" in err
    assert "broken.jsonl:7" in err
