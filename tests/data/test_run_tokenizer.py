"""The tokenizer of a run."""

import dataclasses
from pathlib import Path

import pytest

from t5x_lite.config import RunConfig
from t5x_lite.data.run_tokenizer import obtain_tokenizer, run_tokenizer
from t5x_lite.errors import InputError

TEXTS = [f"number {n} is followed by number {n + 1}, as everyone knows" for n in range(300)]


@pytest.mark.parametrize("spec", ["unigram:200", "bpe:200", "word:120", "char", "bytes"])
def test_tokenizers_are_saved_with_the_run(tmp_path: Path, spec: str) -> None:
    directory = tmp_path / "tokenizer"
    tokenizer = obtain_tokenizer(spec, 100, TEXTS, directory)
    if not spec.startswith("word"):  # a small vocabulary of whole words does not hold every number
        assert tokenizer.decode(tokenizer.encode(TEXTS[7])) == TEXTS[7]
    again = obtain_tokenizer(str(directory), 100, [], tmp_path / "copy")
    assert again.encode(TEXTS[8]) == tokenizer.encode(TEXTS[8])
    assert again.vocab_size == tokenizer.vocab_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "tokenizer"]
    assert not list(directory.glob("trained*"))


def test_a_given_model_is_copied_byte_for_byte(tmp_path: Path) -> None:
    obtain_tokenizer("unigram:200", 100, TEXTS, tmp_path / "first")
    obtain_tokenizer(str(tmp_path / "first" / "spiece.model"), 100, [], tmp_path / "second")
    assert (tmp_path / "second/spiece.model").read_bytes() == (tmp_path / "first/spiece.model").read_bytes()


def test_a_run_keeps_its_tokenizer_from_its_first_checkpoint_on(tmp_path: Path) -> None:
    config = RunConfig(out=str(tmp_path), tokenizer="unigram:200")
    first = run_tokenizer(config, TEXTS)
    # No checkpoint yet: what the configuration asks for is made anew.
    assert run_tokenizer(dataclasses.replace(config, tokenizer="bytes"), []).vocab_size == 259
    assert run_tokenizer(config, TEXTS).encode(TEXTS[3]) == first.encode(TEXTS[3])
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert run_tokenizer(config, []).encode(TEXTS[3]) == first.encode(TEXTS[3])


def test_training_that_was_cut_short_leaves_no_tokenizer(tmp_path: Path) -> None:
    def interrupted():
        yield from TEXTS[:100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obtain_tokenizer("unigram:200", 100, interrupted(), tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
    obtain_tokenizer("unigram:200", 100, TEXTS, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("unigram", "needs a vocabulary size"), ("bpe:many", "needs a vocabulary size"), ("nothing.model", "nothing")],
)
def test_bad_tokenizers(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        obtain_tokenizer(spec, 100, TEXTS, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
