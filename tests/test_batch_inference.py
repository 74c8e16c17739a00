"""Every line has its record, and a file that is cut short anywhere is continued to the same bytes."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite.batch_inference import Observer, Output, fingerprint, generate_file, generate_records, score_records
from t5x_lite.data.lines import Column, Line, LineFile
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.errors import InputError
from t5x_lite.language_model import Answer, LanguageModel, Scores
from t5x_lite.models import build


class Echo:
    """Answers with the text and what a sample would depend on. It breaks at `boom`, and is stopped at `stop`."""

    config = "echo"
    tokenizer = ByteTokenizer()

    def __init__(self, seed: int = 0) -> None:
        self.params = {"kernel": np.full((3, 40), seed, np.float32)}
        self.batches: list[list[str]] = []

    def generation_config(self, **settings) -> GenerationConfig:
        return GenerationConfig.from_settings(settings)

    def check_input(self, text: str, **settings) -> None:
        if not text:
            raise InputError("an empty text is no prompt")

    def generate_scored(self, texts, *, batch_size, row_ids, draft=None, **settings) -> list[list[Answer]]:
        assert len(texts) <= batch_size
        self.batches.append(list(texts))
        if "stop" in texts:
            raise KeyboardInterrupt
        if any("boom" in text for text in texts):
            raise RuntimeError("out of\nmemory")
        if any("refuse" in text for text in texts):
            raise InputError("the draft model has another vocabulary")
        return [
            [Answer(f"{text} {row}.{n}", -float(row), 2) for n in range(settings.get("num_return_sequences", 1))]
            for text, row in zip(texts, row_ids, strict=True)
        ]

    def score(self, inputs, targets, *, batch_size) -> Scores:
        if any("refuse" in text for text in targets):
            raise InputError("too long")
        counts = [len(text) for text in targets]
        return Scores(np.array(counts, np.float32) * -len(inputs[0]), np.array(counts, np.int32))


class Log(Observer):
    def __init__(self) -> None:
        self.notes, self.failures, self.done = [], [], []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def failed(self, line: int, reason: str) -> None:
        self.failures.append((line, reason))

    def progress(self, done: int, total: int) -> None:
        self.done.append((done, total))


def lines(*texts: str) -> list[Line]:
    return [Line(number, (text,)) for number, text in enumerate(texts, 1)]


@pytest.fixture
def source(tmp_path: Path) -> LineFile:
    """Seven lines, of which the third, the fourth and the last fail."""
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"text": "a"}\n{"text": "bb"}\n{"text": ""}\n{broken\n{"text": "c"}\n{"text": "é"}\n{"text": "boom"}'
    )
    return LineFile(path, [Column(("text",))])


def generate(source: LineFile, output: object, lm: Echo | None = None, **changes):
    """Generates with shards of two lines; returns what `generate_file` does, and what its observer heard."""
    log, described = Log(), {"path": "runs/echo", "dtype": changes.pop("dtype", "float32")}
    options = {"settings": {}, "batch_size": 2, "shard_size": 2, "described": described, "observer": log}
    result = generate_file(lm or Echo(), source, Output(str(output)), **{**options, **changes})  # type: ignore[arg-type]
    return result, log


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_records_are_in_the_order_of_the_lines_and_say_what_failed() -> None:
    lm, texts = Echo(), ["three", "", "a", "boom", "aa"]
    given = [*lines(*texts), Line(6, error="not valid UTF-8")]
    assert generate_records(lm, given, 2, {}) == [
        {"line": 1, "input": "three", "output": "three 1.0", "score": -1.0, "num_tokens": 2},
        {"line": 2, "error": "an empty text is no prompt"},
        {"line": 3, "input": "a", "output": "a 3.0", "score": -3.0, "num_tokens": 2},
        {"line": 4, "error": "RuntimeError: out of memory"},
        {"line": 5, "input": "aa", "output": "aa 5.0", "score": -5.0, "num_tokens": 2},
        {"line": 6, "error": "not valid UTF-8"},
    ]
    # Those of like length together, and only those of the batch that failed once more.
    assert lm.batches == [["a", "aa"], ["boom", "three"], ["boom"], ["three"]]
    assert generate_records(lm, lines("a", "b"), 2, {}, first_row=0)[1]["output"] == "b 1.0"
    assert generate_records(lm, lines("a"), 2, {"num_return_sequences": 2, "do_sample": True}) == [
        {"line": 1, "input": "a", "outputs": ("a 1.0", "a 1.1"), "scores": (-1.0, -1.0), "num_tokens": (2, 2)}
    ]


def test_what_fails_for_every_line_is_not_a_line_s_fault() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        generate_records(Echo(), lines("boom", "boom again"), 2, {})
    with pytest.raises(InputError, match="another vocabulary"):
        generate_records(Echo(), lines("refuse", "a"), 1, {})
    assert generate_records(Echo(), lines("boom"), 2, {})[0]["error"].startswith("RuntimeError")
    with pytest.raises(RuntimeError, match="memory"):  # the device has died after a batch
        generate_records(Echo(), lines("a", "b", "boom 3", "boom 4"), 2, {})


def test_no_shard_is_made_of_a_batch_that_failed(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb\nboom 3\nboom 4\n")
    with pytest.raises(RuntimeError, match="memory"):
        generate(LineFile(tmp_path / "x.txt", [Column(("text",))]), f"{tmp_path}/shards/", shard_size=4)
    assert contents(tmp_path / "shards").keys() == {"manifest.json"}


def test_every_error_can_be_written_on_one_line(tmp_path: Path) -> None:
    class Refusing(Echo):
        def check_input(self, text: str, **settings) -> None:
            raise InputError("no\n\ud800")

    (tmp_path / "x.jsonl").write_text('{"\\ud800": "x"}\n{"text": "x"}\n')
    generate(LineFile(tmp_path / "x.jsonl", [Column(("text",))]), tmp_path / "out.jsonl", Refusing())
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["error"] for record in records] == [
        "no field 'text'; the fields are: \\ud800",
        "no \\ud800",
    ]


def test_a_number_that_json_does_not_have_is_none(tmp_path: Path) -> None:
    class Broken(Echo):
        def generate_scored(self, texts, **kwargs):
            return [[Answer(text, score, 2) for score in (float("nan"), -float("inf"), -1.0)] for text in texts]

        def score(self, inputs, targets, *, batch_size) -> Scores:
            return Scores(np.array([np.nan, -np.inf], np.float32), np.array([1, 1], np.int32))

    assert generate_records(Broken(), lines("a"), 1, {})[0]["scores"] == (None, None, -1.0)
    for record in score_records(Broken(), [Line(1, ("", "a")), Line(2, ("", "b"))], 2):
        assert (record["log_likelihood"], record["perplexity"]) == (None, None)


def test_scores_of_lines() -> None:
    pairs = [Line(1, ("ab", "ccc")), Line(2, ("ab", "")), Line(3, ("ab", "refuse")), Line(4, error="broken")]
    assert score_records(Echo(), pairs, 3) == [
        {"line": 1, "log_likelihood": -6.0, "num_tokens": 3, "perplexity": pytest.approx(np.exp(2))},
        {"line": 2, "log_likelihood": 0.0, "num_tokens": 0, "perplexity": None},
        {"line": 3, "error": "too long"},
        {"line": 4, "error": "broken"},
    ]


def test_a_file_is_made_of_its_shards(source: LineFile, tmp_path: Path) -> None:
    result, log = generate(source, tmp_path / "out.jsonl")
    assert result == (3, 7)
    assert [failure[0] for failure in log.failures] == [3, 4, 7]
    assert log.done[-1] == (7, 7)
    assert log.notes == []
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["line"] for record in records] == [*range(1, 8)]
    assert records[5] == {"line": 6, "input": "é", "output": "é 6.0", "score": -6.0, "num_tokens": 2}
    assert "é 6.0" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert contents(tmp_path / "out.jsonl.parts").keys() == {"manifest.json"}

    result, _ = generate(source, f"{tmp_path}/shards/")
    shards = contents(tmp_path / "shards")
    assert result == (3, 7)
    assert shards.keys() == {"manifest.json", *(f"part-0000{n}.jsonl" for n in range(4))}
    assert b"".join(shards[f"part-0000{n}.jsonl"] for n in range(4)) == (tmp_path / "out.jsonl").read_bytes()


def test_the_same_again_does_nothing(source: LineFile, tmp_path: Path) -> None:
    for output in (f"{tmp_path / 'out.jsonl'}", f"{tmp_path}/shards/"):
        generate(source, output)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
        lm = Echo()
        result, log = generate(source, output, lm)
        assert result == (3, 7)
        assert lm.batches == []
        assert "complete already" in log.notes[0]
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == before


@pytest.mark.parametrize("as_file", [True, False])
def test_what_was_stopped_is_continued_to_the_same_bytes(source: LineFile, tmp_path: Path, as_file: bool) -> None:
    class Stopped(Echo):
        def generate_scored(self, texts, **kwargs):
            if "c" in texts:
                raise KeyboardInterrupt
            return super().generate_scored(texts, **kwargs)

    whole, part = (f"{tmp_path / name}.jsonl" if as_file else f"{tmp_path / name}/" for name in ("whole", "part"))
    generate(source, whole)
    with pytest.raises(KeyboardInterrupt):
        generate(source, part, Stopped())
    folder = Output(part).folder
    assert contents(folder).keys() == {"manifest.json", "part-00000.jsonl", "part-00001.jsonl"}
    (folder / "part-00002.jsonl.partial").write_text('{"line": 5, "inp')
    lm = Echo()
    result, log = generate(source, part, lm, batch_size=1)
    assert result == (3, 7)
    assert log.notes == [f"output {part} is continued after 4 of 7 lines"]
    assert log.done[-1] == (7, 7)
    assert [failure[0] for failure in log.failures] == [7]
    assert not {"a", "bb"} & {text for batch in lm.batches for text in batch}
    if as_file:
        assert Path(part).read_bytes() == Path(whole).read_bytes()
    ours, theirs = contents(Output(part).folder), contents(Output(whole).folder)
    for each in (ours, theirs):
        each.pop("manifest.json")
    assert ours == theirs


@pytest.mark.parametrize("cut", ["before the name", "after the name", "amid the shards"])
def test_a_file_that_was_cut_short_while_it_was_joined(
    source: LineFile, tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        rename, unlink = Path.rename, Path.unlink

        def renamed(path: Path, target: Path) -> Path:
            if cut == "before the name" and target == output:
                raise KeyboardInterrupt
            return rename(path, target)

        def unlinked(path: Path) -> None:
            if cut == "after the name" or (cut == "amid the shards" and "00001" in path.name):
                raise KeyboardInterrupt
            unlink(path)

        patch.setattr(Path, "rename", renamed)
        patch.setattr(Path, "unlink", unlinked)
        with pytest.raises(KeyboardInterrupt):
            generate(source, output)
    lm = Echo()
    assert generate(source, output, lm)[0] == (3, 7)
    assert lm.batches == []
    assert len(output.read_text().splitlines()) == 7
    assert contents(tmp_path / "out.jsonl.parts").keys() == {"manifest.json"}


def test_another_input_model_or_setting_is_refused_by_name(source: LineFile, tmp_path: Path) -> None:
    output = f"{tmp_path}/shards/"
    settings = {"settings": {"do_sample": True, "temperature": 0.5, "stop_strings": ["."]}}
    generate(source, output, **settings)
    generate(source, output, **settings, batch_size=1)
    other = tmp_path / "other.jsonl"
    other.write_text(source.path.read_text() + "\n")
    for words, changes in {
        "another input .*texts.jsonl": {"source": LineFile(other, [Column(("text",))])},
        "another model .runs/echo.": {"lm": Echo(seed=1)},
        "temperature 0.5, not 0.7": {"settings": {**settings["settings"], "temperature": 0.7}},
        r'stop_strings \["."\], not \[\]': {"settings": {"do_sample": True, "temperature": 0.5}},
        "shard_size 2, not 3": {"shard_size": 3},
        'dtype "float32", not "bfloat16"': {"dtype": "bfloat16"},
    }.items():
        with pytest.raises(InputError, match=f"was begun with {words}"):
            generate(**{"source": source, "output": output, **settings, **changes})
    with pytest.raises(InputError, match="shard_size must be at least 1, not 0"):
        generate(source, output, **settings, shard_size=0)


def test_what_has_no_records_yet_may_be_begun_in_another_way(source: LineFile, tmp_path: Path) -> None:
    class Broken(Echo):
        def generate_scored(self, texts, **kwargs):
            raise KeyboardInterrupt

    for output in (f"{tmp_path}/shards/", f"{tmp_path}/out.jsonl"):
        with pytest.raises(KeyboardInterrupt):
            generate(source, output, Broken(), dtype="bfloat16")
        assert generate(source, output)[0] == (3, 7)
        assert generate(source, output)[0] == (3, 7)
        with pytest.raises(InputError, match=r'was begun with dtype "float32", not "bfloat16"'):
            generate(source, output, dtype="bfloat16")


def test_a_draft_is_known_by_what_it_is(source: LineFile, tmp_path: Path) -> None:
    generate(source, f"{tmp_path}/shards/", draft=Echo(seed=1))
    generate(source, f"{tmp_path}/shards/", draft=Echo(seed=1))
    for draft in (Echo(seed=2), None):
        with pytest.raises(InputError, match="was begun with draft "):
            generate(source, f"{tmp_path}/shards/", draft=draft)


def test_nothing_that_was_there_is_overwritten(source: LineFile, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(InputError, match=r"out.jsonl exists already; give another"):
        generate(source, output)
    output.unlink()
    generate(source, output)
    output.write_text("mine")
    with pytest.raises(InputError, match="exists already and is not what was written there"):
        generate(source, output)
    output.unlink()

    class Meddling(Echo):
        def generate_scored(self, texts, **kwargs):
            output.write_text("mine")
            return super().generate_scored(texts, **kwargs)

    with pytest.raises(InputError, match=r"exists already; its records are in .*parts"):
        generate(source, output, Meddling())
    assert output.read_text() == "mine"

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds something else \(notes.txt\)"):
        generate(source, tmp_path / "folder")
    ours = json.loads((tmp_path / "out.jsonl.parts" / "manifest.json").read_text())
    for other in ({"name": "of a browser extension"}, ours | {"format": "of a later version"}):
        (tmp_path / "folder" / "manifest.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=r"manifest.json is not a manifest of this version"):
            generate(source, tmp_path / "folder")
    for name, words in {"out.txt": "must end in .jsonl, or in /", "texts.jsonl/": "cannot be a directory"}.items():
        with pytest.raises(InputError, match=words):
            generate(source, f"{tmp_path}/{name}")


def test_a_result_that_was_moved_away_is_made_again(source: LineFile, tmp_path: Path) -> None:
    generate(source, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").rename(tmp_path / "kept.jsonl")
    assert generate(source, tmp_path / "out.jsonl")[0] == (3, 7)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "kept.jsonl").read_bytes()


def test_a_damaged_shard_is_named(source: LineFile, tmp_path: Path) -> None:
    generate(source, f"{tmp_path}/shards/")
    (tmp_path / "shards" / "part-00001.jsonl").write_bytes(b'{"line": 3, "inp')
    with pytest.raises(InputError, match=r"part-00001.jsonl is damaged; remove it and run again"):
        generate(source, f"{tmp_path}/shards/")


def test_one_process_writes_at_a_time(source: LineFile, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Output(str(output)).lock(), pytest.raises(InputError, match="another process is writing output"):
        generate(source, output)
    assert generate(source, output)[0] == (3, 7)


def test_a_shard_is_on_the_disk_before_it_has_its_name(
    source: LineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    rename = Path.rename
    monkeypatch.setattr("os.fsync", lambda file: events.append("sync"))
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append(target.name) or rename(path, target))
    generate(source, f"{tmp_path}/shards/")
    shard = events.index("part-00000.jsonl")
    assert events[shard - 1 : shard + 2] == ["sync", "part-00000.jsonl", "sync"]
    assert events.count("sync") == 2 * 5


def test_a_model_is_known_by_what_it_is(tiny_config, random_params) -> None:
    params = random_params(tiny_config)

    def model(params=params, config=tiny_config, tokenizer=None) -> LanguageModel:
        return LanguageModel(build(config), params, tokenizer, mesh=None)  # type: ignore[arg-type]

    digest = fingerprint(model())
    assert fingerprint(model({**params})) == digest
    assert fingerprint(model(random_params(tiny_config, seed=1))) != digest
    last = jax.tree_util.tree_leaves_with_path(params)[-1][0]
    other = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + (path == last), params)
    assert fingerprint(model(other)) != digest
    assert fingerprint(model(config=dataclasses.replace(tiny_config, eos_id=2))) != digest
    assert fingerprint(model(tokenizer=ByteTokenizer())) != digest
