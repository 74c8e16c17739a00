"""Commands as a user types them: what they print, and one line with exit status 2 for bad input."""

import asyncio
import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5x_lite.cli.main import COMMANDS, main
from t5x_lite.config import RunConfig, flatten


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("t5x-lite: ")
    for word in words:
        assert word in lines[0]


def test_no_command_prints_help(t5x) -> None:
    status, out, _ = t5x()
    assert status == 0
    for command in COMMANDS:
        assert command in out


def test_every_command_has_help(t5x, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"t5x-lite {command}" in capsys.readouterr().out


def test_train_then_eval_then_generate(t5x, tiny_settings: list[str], corpus_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, text, err = t5x("train", *tiny_settings, f"out={out}", "--json")
    assert status == 0, err
    trained = json.loads(text)
    assert trained["step"] == 12

    status, text, _ = t5x("eval", out, "--json")
    assert status == 0
    evaluated = json.loads(text)
    assert {"loss", "perplexity", "bits_per_byte", "accuracy", "target_tokens"} <= evaluated.keys()
    assert json.loads((out / "eval" / "validation-12.json").read_text())["loss"] == evaluated["loss"]

    # A file that is named is evaluated whole; the corpus is some fifty times its held-out part.
    status, text, _ = t5x("eval", out, f"data.path={corpus_file}", "--json")
    assert json.loads(text)["target_tokens"] > 20 * evaluated["target_tokens"]

    texts = ["the cat <extra_id_0> the letters in winter.", "nobody sells <extra_id_0> at night."]
    status, text, _ = t5x("generate", out, *texts, "--max-new-tokens", 6)
    assert status == 0
    assert len(text.splitlines()) == 2
    status, objects, _ = t5x("generate", out / "checkpoints" / "12", *texts, "--max-new-tokens", 6, "--json")
    rows = [json.loads(line) for line in objects.splitlines()]
    assert [row["input"] for row in rows] == texts
    assert [row["output"] for row in rows] == text.splitlines()


def test_generate_reads_stdin(trained_run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "t5x_lite", "generate", str(trained_run), "--max-new-tokens", "4"],
        input="the cat <extra_id_0>.\nmy neighbour <extra_id_0>.\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


def test_config_show_names_every_origin(t5x, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: t5-base\ntrain:\n  steps: 7\n")
    status, out, _ = t5x("config", "show", tmp_path / "run.yaml", "optimizer.learning_rate=0.5")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "= 7 " in lines["train.steps"]
    assert "run.yaml" in lines["train.steps"]
    assert "command line" in lines["optimizer.learning_rate"]
    assert "preset t5-base" in lines["model.embed_dim"]
    assert "default" in lines["mesh"]
    assert len(lines) == len(flatten(RunConfig()))


def test_data_show(t5x, tiny_settings: list[str], trained_run: Path) -> None:
    status, out, _ = t5x("data", "show", trained_run, "--examples", 1)
    assert status == 0
    assert "<extra_id_0>" in out
    assert "encoder sees" in out
    assert "padding in the decoder's rows" in out
    status, out, _ = t5x("data", "show", *tiny_settings, "out=nowhere", "--examples", 2, "--json")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2
    assert len(rows[0]["encoder_input_tokens"]) == 32
    assert not Path("nowhere").exists()


def test_tokenizer_train_and_check(t5x, corpus_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "small.model"
    status, out, err = t5x(
        "tokenizer", "train", model, "--vocab-size", 300, f"data.path={corpus_file}", "--type", "bpe", "--json"
    )
    assert status == 0, err
    assert json.loads(out) == {"model": str(model), "vocab_size": 300, "sentinels": 100}
    status, out, _ = t5x("tokenizer", "check", model, f"data.path={corpus_file}", "--json")
    assert status == 0
    report = json.loads(out)
    assert report["lines"] == 1500
    assert report["unknown_rate"] == 0
    assert report["round_trip_failures"] == 0
    assert (report["vocab_size"], report["sentinels"], report["pad_id"], report["eos_id"]) == (300, 100, 0, 1)


def test_doctor(t5x) -> None:
    status, out, _ = t5x("doctor", "--json")
    report = json.loads(out)
    assert report["problems"] == []
    assert status == 0
    assert report["devices"]["backend"] == "cpu"
    assert "jax" in report["versions"]


def test_doctor_names_what_is_missing(t5x, monkeypatch: pytest.MonkeyPatch) -> None:
    from t5x_lite.cli import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package"))
    status, out, _ = t5x("doctor")
    assert status == 1
    assert "problem: package no-such-package is not installed: pip install no-such-package" in out


# Bad input. Every case: one line on stderr, nothing on stdout, exit status 2.


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["train", "train.step=5"], ["unknown configuration key 'train.step'", "did you mean 'train.steps'"]),
        (["train", "train.steps=many"], ["train.steps='many'"]),
        (["train", "model=t5-smal"], ["unknown model 't5-smal'", "did you mean 't5-small'"]),
        (["train", "no.yaml"], ["no configuration file or run directory 'no.yaml'"]),
        (["train", "data.path=no/such/*.txt"], ["no/such/*.txt"]),
        (["train", "optimizer.name=adam"], ["optimizer.name='adam'", "'adafactor', 'adamw', 'lion', 'muon' or 'sgd'"]),
        (["train", "mesh=date:8"], ["unknown axis 'date'", "did you mean 'data'"]),
        (["train", "mesh=model:8", "model=t5-v1.1-small"], ["'heads' of size 6", "'model' of size 8"]),
        (["train", "mesh=data:3"], ["covers 3 devices, but there are 8"]),
        (["train", "model.dropout_rate=1.5"], ["model.dropout_rate", "1.5"]),
        (["train", "--fast"], ["--fast", "--help"]),
        (["tokenizer"], ["needs one of the words train, check"]),
        (["data", "shwo"], ["not 'shwo'", "did you mean 'show'"]),
        (["eval", "no-run"], ["no configuration file or run directory 'no-run'"]),
        (["generate", "no-run", "text"], ["'no-run' is not a run directory"]),
        (["generate", "", "text"], ["t5x-lite: '' is not a run directory"]),
        (["tokenizer", "train", "no-dir/x.model"], ["no directory 'no-dir'"]),
        (["tokenizer", "check", "no.model"], ["no.model"]),
        (["demo", "model=t5-smal"], ["unknown model"]),
        (["train", "optimizer.name=adamw"], ["adamw needs optimizer.learning_rate"]),
        (["train", "optimizer.learning_rate=inf"], ["optimizer.learning_rate", "finite", "inf"]),
        (["train", "model.norm_epsilon=-1"], ["model.norm_epsilon must be above 0 and finite, not -1"]),
        (["train", "train.seed=4294967296"], ["train.seed must be below 2**32"]),
        (["train", "data.noise_density=2"], ["data.noise_density must be above 0 and below 1, not 2"]),
        (["tokenizer", "train", "."], ["is a directory"]),
        (["data", "show", "--examples", "-1"], ["--examples must be at least 1, not -1"]),
        (["generate", "run", "-hello"], ["goes after '--'"]),
        (["generate", "run", "a\udcff"], ["input 1 is not valid UTF-8"]),
    ],
)
def test_bad_input(t5x, argv: list[str], words: list[str]) -> None:
    assert_refused(t5x(*argv), *words)


def test_empty_corpus(t5x, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_refused(t5x("train", f"data.path={tmp_path / 'empty.txt'}", f"out={tmp_path}/run"), "empty.txt")


def test_out_that_is_a_file_or_nothing(t5x, tiny_settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(t5x("train", *tiny_settings, f"out={tmp_path / 'file'}"), "cannot be a run directory")
    assert_refused(t5x("train", *tiny_settings, "out="), "out= is empty")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_outside_a_save(t5x, monkeypatch: pytest.MonkeyPatch) -> None:
    from t5x_lite.cli import doctor

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(doctor, "examine", fail)
    assert_refused(t5x("doctor"), "No space left on device (metrics.jsonl)", "free some space")


def test_what_a_failed_save_leaves_behind_is_not_printed(t5x, monkeypatch: pytest.MonkeyPatch, capsys, caplog) -> None:
    import tensorstore

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # a command replaces it, for good
    assert t5x("config", "show")[0] == 0

    def report(message: str) -> str:
        def fail(future: object) -> None:
            raise RuntimeError(message)

        promise, future = tensorstore.Promise.new()
        future.add_done_callback(fail)
        promise.set_result(0)
        return capsys.readouterr().err

    assert report("Event loop is closed") == ""
    assert "RuntimeError: something else" in report("something else")

    async def fail_unheard() -> None:
        asyncio.get_running_loop().create_future().set_exception(OSError("no space"))

    asyncio.run(fail_unheard())
    gc.collect()
    assert caplog.text == ""


def test_more_spans_than_sentinels(t5x, tiny_settings: list[str], tmp_path: Path) -> None:
    settings = [*tiny_settings, "tokenizer=bytes", "train.input_length=256", f"out={tmp_path}/run"]
    assert_refused(t5x("train", *settings), "14", "11", "mean_span_length")


def test_wrong_column_lists_the_columns_within_two_seconds(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n')
    argv = ["train", f"data.path={tmp_path / 'pairs.jsonl'}", "data.objective=text_to_text", f"out={tmp_path}/run"]
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy with other things
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "t5x_lite", *argv], capture_output=True, text=True, check=False)
        seconds.append(time.monotonic() - began)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "column 'inputs' is not in" in done.stderr
        assert "source, target" in done.stderr
    assert min(seconds) < 2.0
    assert not (tmp_path / "run").exists()


def test_a_corrupt_checkpoint_with_nothing_behind_it(t5x, tiny_settings, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "params" / "manifest.ocdbt").write_bytes(b"?")
    assert_refused(t5x("generate", run, "text"), "is damaged", "manifest.ocdbt has changed")
    status, _, err = t5x("train", *tiny_settings, f"out={run}")
    assert status == 2
    assert "no readable checkpoint is left" in err.splitlines()[-1]


def test_a_damaged_checkpoint_is_passed_over_with_a_word(t5x, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "checkpoints" / "12" / "params" / "manifest.ocdbt").write_bytes(b"?")
    status, out, err = t5x("generate", run, "the cat <extra_id_0>", "--max-new-tokens", 4)
    assert status == 0
    assert len(out.splitlines()) == 1
    assert "12 is damaged" in err
    assert len(err.splitlines()) == 1


def test_a_missing_checkpoint_lists_those_that_are_there(t5x, trained_run: Path) -> None:
    assert_refused(t5x("generate", trained_run / "checkpoints" / "5", "text"), "no checkpoint", "8, 12")


def test_an_unforeseen_failure_is_one_line_and_status_1(t5x, monkeypatch: pytest.MonkeyPatch) -> None:
    from t5x_lite.cli import doctor

    def fail() -> None:
        raise RuntimeError("the cat sat\non the keyboard")

    monkeypatch.setattr(doctor, "examine", fail)
    status, _, err = t5x("doctor")
    assert status == 1
    assert err == "t5x-lite: RuntimeError: the cat sat on the keyboard (--traceback shows where)\n"
    with pytest.raises(RuntimeError):
        main(["doctor", "--traceback"])
