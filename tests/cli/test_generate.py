"""`t5x-lite generate`: its options, its files, and what it does with lines that cannot be used."""

import dataclasses
import inspect
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from t5x_lite import GenerationConfig, loading
from t5x_lite.cli.line_progress import LineProgress
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError
from t5x_lite.language_model import Answer
from t5x_lite.models.registry import DTYPES

QUICK = "--max-new-tokens", 5, "--batch-size", 2
SAMPLED = *QUICK, "--do-sample", "--seed", 3, "--shard-size", 2
TEXTS = ["one", "a ship", "the fog", "20 miles", "é", "and", "seven"]

# `kill -9` where the third shard has been written, but does not have its name yet.
KILLED = """
import os, pathlib, signal, sys
rename = pathlib.Path.rename
def rename_or_die(path, target):
    if target.name == "part-00002.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
pathlib.Path.rename = rename_or_die
from t5x_lite.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Parrot:
    """Answers with the text, and remembers what it was asked."""

    config = SimpleNamespace(num_decoder_layers=1)
    tokenizer = ByteTokenizer()
    mesh = checkpoint = None

    def __init__(self) -> None:
        self.params, self.settings, self.loaded = {}, [], []

    def load(self, *args: object, **kwargs: object) -> "Parrot":
        self.loaded.append((*args, kwargs))
        return self

    def require_tokenizer(self) -> ByteTokenizer:
        return self.tokenizer

    def generation_config(self, **settings) -> GenerationConfig:
        self.settings.append(settings)
        return GenerationConfig.from_settings(settings)

    def check_draft(self, draft: "Parrot | None", **settings) -> None:
        pass

    def check_input(self, text: str, **settings) -> None:
        if len(text) > 20:
            raise InputError(f"the {len(text)} tokens of an input take more positions than there are")

    def generate_scored(self, texts, *, batch_size, row_ids, draft, **settings) -> list[list[Answer]]:
        several = settings.get("num_return_sequences", 1)
        return [[Answer(f"{text}\\{n}\n", -1.5, 2) for n in range(several)] for text in texts]

    def stream(self, text: str, **settings):
        if settings.get("num_beams", 1) > 1:
            raise InputError("num_beams 2 cannot be streamed")
        return iter([text[:1], text[1:]])


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    """Is loaded instead of any model."""
    parrot = Parrot()
    monkeypatch.setattr(loading, "load", parrot.load)
    return parrot


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch):
    """Sets what is on stdin."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_what_is_given_is_passed_on(t5x, parrot: Parrot) -> None:
    argv = "--num-beams 4 --no-do-sample --early-stopping never --length-penalty -0.5 --num-return-sequences 2"
    argv += " --bad-words-ids 5,6 --bad-words-ids 7 --eos-token-id 1,2 --cache-dtype int8 --min-new-tokens 1"
    status, out, err = t5x("generate", "run", "hi", *argv.split(), "--stop-strings", "a b", "--stop-strings=-")
    assert (status, err) == (0, "")
    assert out == "hi\\\\0\\n\nhi\\\\1\\n\n"
    assert parrot.settings[0] == {
        "num_beams": 4,
        "do_sample": False,
        "early_stopping": "never",
        "length_penalty": -0.5,
        "num_return_sequences": 2,
        "bad_words_ids": [[5, 6], [7]],
        "eos_token_id": [1, 2],
        "cache_dtype": "int8",
        "min_new_tokens": 1,
        "stop_strings": ["a b", "-"],
    }
    t5x("generate", "run", "hi", "--do-sample", "--early-stopping", "true", "--eos-token-id", "")
    assert parrot.settings[-1] == {"do_sample": True, "early_stopping": True, "eos_token_id": []}


@pytest.mark.parametrize("command", ["generate", "score"])
def test_the_help_names_every_dtype(t5x, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        t5x(command, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert f"of the model: {', '.join(DTYPES[:-1])} or {DTYPES[-1]} (default float32)" in text


def test_every_setting_has_an_option_and_its_meaning(t5x, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        t5x("generate", "--help")
    text = " ".join(capsys.readouterr().out.partition("how to generate:")[2].split())
    meanings = dict(re.findall(r"^  (\w+): (\S+ \S+ [^\s.]+)", inspect.getdoc(GenerationConfig) or "", re.MULTILINE))
    for field in dataclasses.fields(GenerationConfig):
        option, meaning = f"--{field.name.replace('_', '-')}", re.escape(meanings[field.name])
        assert re.search(rf"{option}\b.{{0,40}} {meaning}", text), option


def test_how_the_model_is_loaded(t5x, parrot: Parrot) -> None:
    options = "--dtype", "bfloat16", "--mesh", "model:2", "--quantization", "int8", "--draft", "small"
    assert t5x("generate", "run", "hi", *options)[0] == 0
    assert parrot.loaded == [
        ("run", "bfloat16", "model:2", {"quantization": "int8"}),
        ("small", "bfloat16", None, {"quantization": "int8"}),
    ]


def test_one_answer_a_line_also_for_a_line_that_fails(t5x, parrot: Parrot, stdin) -> None:
    stdin(b"one\n\xff\n" + b"long " * 9 + b"\nlast")
    status, out, err = t5x("generate", "run")
    assert status == 1
    assert out.splitlines() == ["one\\\\0\\n", "", "", "last\\\\0\\n"]
    assert err.splitlines() == [
        "t5x-lite: input 2: not valid UTF-8 (0xff at byte 1)",
        "t5x-lite: input 3: the 45 tokens of an input take more positions than there are",
        "t5x-lite: 2 of 4 inputs failed",
    ]
    status, out, err = t5x("generate", "run", "one", "a\udcff", "--json", "--do-sample", "--num-return-sequences", 2)
    assert status == 1
    first = {"outputs": ["one\\0\n", "one\\1\n"], "scores": [-1.5, -1.5], "num_tokens": [2, 2]}
    assert [json.loads(line) for line in out.splitlines()] == [
        {"line": 1, "input": "one", **first},
        {"line": 2, "error": "not valid UTF-8 (0xff at byte 2)"},
    ]


def test_a_line_that_fails_has_as_many_lines_as_the_others(t5x, parrot: Parrot, stdin) -> None:
    stdin(b"one\n\xff\ntwo")
    out = t5x("generate", "run", "--do-sample", "--num-return-sequences", 2)[1]
    assert out.splitlines() == ["one\\\\0\\n", "one\\\\1\\n", "", "", "two\\\\0\\n", "two\\\\1\\n"]


def test_texts_are_taken_as_they_are(t5x, parrot: Parrot, stdin) -> None:
    texts = ["\ufeffone\r\n", "two\n\n"]
    out = t5x("generate", "run", *texts, "--json")[1]
    assert [json.loads(line)["input"] for line in out.splitlines()] == texts
    stdin("\ufeffone\r\ntwo\r\r\n".encode())
    out = t5x("generate", "run", "--json")[1]
    assert [json.loads(line)["input"] for line in out.splitlines()] == ["one", "two\r"]


def test_streams(t5x, parrot: Parrot) -> None:
    assert t5x("generate", "run", "hello", "--stream") == (0, "hello\n", "")


def test_a_sample_is_the_same_printed_and_streamed(t5x, decoder_run: Path) -> None:
    argv = "generate", decoder_run, "the", "--do-sample", "--seed", 3, "--temperature", 3.0, "--max-new-tokens", 8
    assert t5x(*argv, "--stream")[1] == json.loads(t5x(*argv, "--json")[1])["output"] + "\n"


def test_what_is_shown_of_a_file_is_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    with LineProgress("generate", "x.txt") as progress:
        progress.failed(1, "the fields are: :100: [b]")
    assert capsys.readouterr().err == "t5x-lite: x.txt:1: the fields are: :100: [b]\n"


def test_a_score_that_is_not_finite(t5x, parrot: Parrot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parrot, "generate_scored", lambda *args, **kwargs: [[Answer("x", float("nan"), 1)]])
    assert json.loads(t5x("generate", "run", "hi", "--json")[1])["score"] is None


def test_a_file_without_an_output_goes_to_stdout(t5x, parrot: Parrot, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "no", "b": "yes"}\n{}\n')
    status, out, err = t5x("generate", "run", "--input", tmp_path / "x.jsonl", "--field", "b", "--json")
    assert status == 1
    assert [json.loads(line).get("input") for line in out.splitlines()] == ["yes", None]
    assert f"{tmp_path}/x.jsonl:2: no field 'b'" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["hi", "--input", "x.txt"], "--input x.txt and the text 'hi' exclude each other"),
        (["hi", "--output", "x.jsonl"], "--output x.jsonl needs --input"),
        (["hi", "--field", "x"], "--field x needs --input"),
        (["hi", "ho", "--stream"], "--stream takes one text, not 2"),
        (["hi", "--stream", "--num-beams", 2], "num_beams 2 cannot be streamed"),
        (["hi", "--stream", "--json"], "--stream and --json exclude each other"),
        (["--stream", "--input", "x.txt"], "--stream and --input exclude each other"),
        (
            ["--input", "x.txt", "--field", "y"],
            "--field y needs a .jsonl or .tsv file; --input x.txt has a text a line",
        ),
        (["--input", "x.txt", "--output", ""], "--output must not be empty"),
        (["--input", "x.txt", "--field", ""], "--field must not be empty"),
        (["--input", ""], "--input must not be empty"),
        (["hi", "--draft", ""], "--draft must not be empty"),
        (["hi", "--stop-strings", "\udcff"], r"stop_strings must be valid UTF-8, not '\udcff'"),
        (["--input", "no.txt"], "cannot read no.txt: No such file"),
        (["--input", "x.pdf"], "x.pdf must end in .txt"),
        (["hi", "--shard-size", 0], "--shard-size must be at least 1, not 0"),
        (["hi", "--shard-size", 5], "--shard-size 5 needs --output"),
        (["hi", "--num-assistant-tokens", 5], "--num-assistant-tokens 5 needs --draft"),
        (["--input", "x.txt", "--output", "o.jsonl", "--json"], "--json and --output o.jsonl"),
        (["hi", "--batch-size", 0], "--batch-size must be at least 1, not 0"),
        (["hi", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (["hi", "--suppress-tokens", "7;8"], "argument --suppress-tokens: '7;8' must be ids such as 7 or 7,12"),
        (["hi", "--quantization", "int3"], "invalid choice: 'int3'"),
        (["hi", "--temperature", 0, "--do-sample"], "temperature must be 1e-30 to 1e30"),
        (["hi", "--early-stopping", "maybe"], "early_stopping must be one of True, False, never, not 'maybe'"),
        (["hi", "--cache-dtype", "int4"], "cache_dtype must be one of float32, bfloat16, int8, not 'int4'"),
        (["long " * 9], "the 45 tokens of an input"),
    ],
)
def test_bad_input(
    t5x, parrot: Parrot, argv: list[object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a text\n")
    status, out, err = t5x("generate", "run", *argv)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert words in err


def test_outputs_that_are_refused(t5x, parrot: Parrot, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n")
    for output, words in {tmp_path: "holds something else (x.txt)", "x.csv": "must end in .jsonl, or in /"}.items():
        status, _, err = t5x("generate", "run", "--input", tmp_path / "x.txt", "--output", output)
        assert (status, len(err.splitlines())) == (2, 1)
        assert words in err
    assert parrot.loaded == []  # which would have taken a while


def test_a_killed_process_is_continued_to_the_same_bytes(t5x, decoder_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]) + "{broken\n" + '{"text": ""}\n')
    with source.open("a") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*TEXTS[3:], "too long " * 9])
    argv = ["generate", decoder_run, "--input", source, *SAMPLED, "--output"]
    status, out, err = t5x(*argv, tmp_path / "whole.jsonl")
    assert (status, out) == (1, "")
    assert re.findall(r"x.jsonl:(\d+): ", err) == ["4", "5", "10"]
    assert err.splitlines()[-1] == "t5x-lite: 3 of 10 inputs failed"
    records = written(tmp_path / "whole.jsonl")
    assert [record["line"] for record in records] == [*range(1, 11)]
    assert len({record["output"] for record in records if "output" in record}) > 1

    part = tmp_path / "part.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, argv), part], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "part.jsonl.parts"
    assert sorted(path.name for path in folder.glob("part*")) == [
        "part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl.partial"
    ]  # fmt: skip
    assert not part.exists()
    status, _, err = t5x(*argv, part)
    assert status == 1
    assert "is continued after 4 of 10 lines" in err
    assert err.splitlines()[-1] == "t5x-lite: 3 of 10 inputs failed"
    assert part.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    status, _, err = t5x(*argv, part, "--seed", 4)
    assert status == 2
    assert "was begun with seed 3, not 4" in err


def test_settings_that_this_model_refuses(t5x, decoder_run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("the\n")
    file = "--input", tmp_path / "x.txt", "--output", tmp_path / "o.jsonl"
    every = ",".join(map(str, range(264)))
    for argv, words in (
        (("--decoder-start-token-id", 5), "decoder_start_token_id 5 needs a model with an encoder"),
        (("--suppress-tokens", every), "suppress_tokens and begin_suppress_tokens leave none of the 2"),
        (
            ("--bad-words-ids", 7, "--forced-eos-token-id", 7),
            "bad_words_ids must not contain 7, which is the forced_eos",
        ),
        (("--num-beams", 2, "--length-penalty", 1e30), "length_penalty 1e+30 is too far from 0"),
    ):
        for source in (("the",), file):
            status, out, err = t5x("generate", decoder_run, *source, *argv, "--max-new-tokens", 5)
            assert (status, out, len(err.splitlines())) == (2, "", 1), err
            assert words in err
    assert list(tmp_path.iterdir()) == [tmp_path / "x.txt"]


def test_a_text_too_long_for_the_draft_alone_fails_alone(
    t5x, decoder_run: Path, short_draft: Path, tmp_path: Path
) -> None:
    long, reason = "x" * 40, "the 40 tokens of a text take 40 positions, but the draft model has 32"
    (tmp_path / "x.txt").write_text(f"one\n{long}\ntwo\n")
    argv = ["generate", decoder_run, "--draft", short_draft, *QUICK]
    source = "--input", tmp_path / "x.txt"
    status, _, err = t5x(*argv, *source, "--output", tmp_path / "o.jsonl")
    assert (status, err.splitlines()[-1]) == (1, "t5x-lite: 1 of 3 inputs failed")
    records = written(tmp_path / "o.jsonl")
    assert [record.get("error") for record in records] == [None, reason, None]
    status, out, err = t5x(*argv, "one", long, "two", "--json")
    assert (status, f"t5x-lite: input 2: {reason}" in err) == (1, True)
    assert [json.loads(line).get("output") for line in out.splitlines()] == [r.get("output") for r in records]
    assert t5x(*argv, long) == (2, "", f"t5x-lite: {reason}\n")
    # The whole of it is the draft's to read as well: 30 + 5 tokens, the last of which nobody reads.
    assert "max_new_tokens 5 and the prompt take 34 positions, but the draft model has 32" in t5x(*argv, "x" * 30)[2]
    assert t5x(*argv, "x" * 28)[0] == 0


def test_a_draft_of_another_kind_is_refused_for_what_it_is(
    t5x, decoder_run: Path, pair_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text("one\n" + "x" * 60)
    words = "the draft model must have 264 tokens and {} encoder as the model has, not 264 tokens and {} encoder"
    for run, draft, given in ((decoder_run, pair_run, ("no", "an")), (pair_run, decoder_run, ("an", "no"))):
        output = tmp_path / f"{given[0]}.jsonl"
        for source in (["x" * 60], ["one", "two"], ["--input", tmp_path / "x.txt", "--output", output]):
            status, out, err = t5x("generate", run, "--draft", draft, "--max-new-tokens", 60, *source)
            assert (status, out, err) == (2, "", f"t5x-lite: {words.format(*given)}\n")
        assert not output.with_name(f"{output.name}.parts").exists()


def test_shards_over_a_mesh_say_the_same(t5x, decoder_run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(TEXTS[:4]))
    argv = ["generate", decoder_run, "--input", tmp_path / "x.txt", *QUICK, "--shard-size", 2, "--output"]
    assert t5x(*argv, f"{tmp_path}/one/")[0] == 0
    assert t5x(*argv, f"{tmp_path}/mesh/", "--mesh", "data:4,model:2")[0] == 0
    for name in ("part-00000.jsonl", "part-00001.jsonl"):
        one, mesh = written(tmp_path / "one" / name), written(tmp_path / "mesh" / name)
        assert [record["output"] for record in mesh] == [record["output"] for record in one]
        # Sums of five float32 log-probabilities, in another order.
        assert [record["score"] for record in mesh] == pytest.approx([record["score"] for record in one], abs=1e-4)
    # What was done on one device is the same run on several.
    status, _, err = t5x(*argv, f"{tmp_path}/one/", "--mesh", "data:4,model:2")
    assert status == 0
    assert "is complete already" in err
