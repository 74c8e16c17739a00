"""`t5x-lite score`: the model's own numbers, in the order of the lines, and their totals."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import t5x_lite
from t5x_lite.language_model import LanguageModel, Scores


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_pairs_of_an_encoder_and_a_decoder(t5x, pair_run: Path, tmp_path: Path) -> None:
    pairs = [("the cat", "sat"), ("a dog that", "ran away"), ("it", "is")]
    rows = [json.dumps({"question": source, "answer": target}) for source, target in pairs]
    rows.insert(1, '{"question": "what"}')
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    fields = "--inputs-field", "question", "--targets-field", "answer"
    status, out, err = t5x("score", pair_run, "--input", tmp_path / "x.jsonl", *fields, "--json", "--batch-size", 3)
    assert status == 1
    assert err.splitlines() == [
        f"t5x-lite: {tmp_path}/x.jsonl:2: no field 'answer'; the fields are: question",
        "t5x-lite: 1 of 4 inputs failed",
    ]
    *records, total = objects(out)
    assert [record["line"] for record in records] == [1, 2, 3, 4]
    expected = t5x_lite.load(pair_run).score(*map(list, zip(*pairs, strict=True)))
    good = [record for record in records if "error" not in record]
    assert [record["num_tokens"] for record in good] == expected.num_tokens.tolist()
    # The same program on other batches: float32, on sums of tens of nats.
    assert [record["log_likelihood"] for record in good] == pytest.approx(expected.log_likelihood, abs=1e-4)
    for record in good:
        assert record["perplexity"] == pytest.approx(math.exp(-record["log_likelihood"] / record["num_tokens"]))
    nats, tokens = (sum(record[key] for record in good) for key in ("log_likelihood", "num_tokens"))
    assert total == {
        "examples": 3,
        "failed": 1,
        "log_likelihood": pytest.approx(nats),
        "num_tokens": tokens,
        "perplexity": pytest.approx(math.exp(-nats / tokens)),
    }
    (tmp_path / "x.tsv").write_text("source\ttarget\n" + "\n".join("\t".join(pair) for pair in pairs))
    status, out, _ = t5x("score", pair_run, "--input", tmp_path / "x.tsv", "--json")
    assert status == 0
    assert objects(out)[-1]["log_likelihood"] == pytest.approx(nats, abs=1e-4)


def test_texts_of_a_decoder_alone(t5x, decoder_run: Path, tmp_path: Path) -> None:
    texts = ["the fog", "too long " * 9, "", "ships"]
    (tmp_path / "x.txt").write_text("\n".join(texts))
    status, out, err = t5x("score", decoder_run, "--input", tmp_path / "x.txt", "--json", "--batch-size", 2)
    assert status == 1
    assert len(err.splitlines()) == 2
    assert "x.txt:2: the 82 tokens of a text take 81 positions, but the model has 64" in err
    first, failed, empty, last, total = objects(out)
    assert failed.keys() == {"line", "error"}
    assert empty == {"line": 3, "log_likelihood": 0.0, "num_tokens": 0, "perplexity": None}
    assert (first["num_tokens"], last["num_tokens"], total["num_tokens"]) == (7, 5, 12)
    status, out, _ = t5x("score", decoder_run, "the fog", "--json")
    assert objects(out)[0] == {
        **first,
        "log_likelihood": pytest.approx(first["log_likelihood"], abs=1e-4),
        "perplexity": pytest.approx(first["perplexity"], rel=1e-4),
    }


def test_an_input_and_a_target_by_hand(t5x, decoder_run: Path) -> None:
    status, out, err = t5x("score", decoder_run, "the", " fog")
    assert (status, err) == (0, "")
    head, row, total = (line.split() for line in out.splitlines())
    assert head == ["line", "nats", "tokens", "perplexity"]
    scores = t5x_lite.load(decoder_run).score(["the"], [" fog"])
    assert row == ["1", f"{scores.log_likelihood[0]:.4f}", "4", f"{math.exp(-scores.log_likelihood[0] / 4):.4f}"]
    assert total == ["total", *row[1:]]
    status, out, err = t5x("score", decoder_run, "the", "too long " * 9)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "the model has 64" in err


def test_what_just_fits_is_scored(t5x, decoder_run: Path, tmp_path: Path) -> None:
    lm = t5x_lite.load(decoder_run)
    text = "x1" * 32
    tokens = np.array([[1, *lm.require_tokenizer().encode(text)]])
    assert tokens.shape == (1, 65)  # the last of which is not read: there are 64 positions
    logs = np.asarray(
        jax.nn.log_softmax(lm.model.apply({"params": lm.params}, {"decoder_input_tokens": tokens[:, :-1]}))
    )
    wanted = np.sum(logs[0, np.arange(64), tokens[0, 1:]])
    status, out, _ = t5x("score", decoder_run, text, "--json")
    assert status == 0
    # Sums of 64 float32 log-probabilities of size 5.
    assert objects(out)[0] == {
        "line": 1,
        "log_likelihood": pytest.approx(wanted, rel=1e-5),
        "num_tokens": 64,
        "perplexity": pytest.approx(np.exp(-wanted / 64), rel=1e-5),
    }
    status, _, err = t5x("score", decoder_run, text + "x")
    assert (status, err) == (2, "t5x-lite: the 66 tokens of a text take 65 positions, but the model has 64\n")


def test_what_was_generated_can_be_scored(t5x, decoder_run: Path) -> None:
    letters = {*t5x_lite.load(decoder_run).require_tokenizer().encode("abcdefghij ")}
    others = ",".join(str(token) for token in range(264) if token not in letters)
    argv = (
        "--max-new-tokens",
        62,
        "--suppress-tokens",
        others,
        "--eos-token-id",
        "",
        "--no-repeat-ngram-size",
        2,
        "--json",
    )
    made = json.loads(t5x("generate", decoder_run, "the", *argv)[1])
    assert made["num_tokens"] == 62
    scored = objects(t5x("score", decoder_run, "the", made["output"], "--json")[1])[0]
    assert scored["num_tokens"] == 62
    assert scored["log_likelihood"] == pytest.approx(made["score"], rel=1e-5)


def test_a_score_that_is_not_finite(t5x, decoder_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores(np.array([-np.inf], np.float32), np.array([2], np.int32))
    monkeypatch.setattr(LanguageModel, "score", lambda *args, **kwargs: scores)
    none = {"log_likelihood": None, "num_tokens": 2, "perplexity": None}
    status, out, _ = t5x("score", decoder_run, "a text", "--json")
    assert (status, objects(out)) == (0, [{"line": 1, **none}, {"examples": 1, "failed": 0, **none}])
    _, row, total = (line.split() for line in t5x("score", decoder_run, "a text")[1].splitlines())
    assert (row, total) == (["1", "-", "2", "-"], ["total", "-", "2", "-"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give an input and a target, or --input FILE, not 0 texts"),
        (["a", "b", "c"], "not 3 texts"),
        (["a", "b\udcff"], "'b\\udcff' is not valid UTF-8"),
        (["a", "--input", "x.txt"], "--input x.txt and the text 'a' exclude each other"),
        (["a", "b", "--inputs-field", "x"], "--inputs-field x needs --input"),
        (["--input", "no.tsv"], "cannot read no.tsv"),
        (["a", "b", "--batch-size", 0], "--batch-size must be at least 1, not 0"),
        (["a", "b"], "'no-run' is not a run directory"),
        (
            ["--input", "x.txt", "--targets-field", "y"],
            "--targets-field y needs a .jsonl or .tsv file; --input x.txt has",
        ),
        (["--input", "x.txt", "--inputs-field", "y"], "x.txt has one text a line; y and targets of a line go into"),
        (["--input", "x.jsonl", "--inputs-field", ""], "--inputs-field must not be empty"),
        (["--input", ""], "--input must not be empty"),
    ],
)
def test_bad_input(t5x, argv: list[object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a text\n")
    status, out, err = t5x("score", "no-run", *argv)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert words in err


def test_an_encoder_needs_inputs(t5x, pair_run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a text\n")
    for argv, words in {
        ("a text",): "give an input and a target",
        ("--input", tmp_path / "x.txt"): "one text a line",
    }.items():
        status, out, err = t5x("score", pair_run, *argv)
        assert (status, out) == (2, "")
        assert words in err
