"""From the configuration to tokenizer and datasets."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from t5x_lite.config import DataConfig, RunConfig, TrainConfig
from t5x_lite.data import recipe
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError


def write_lines(path: Path, count: int) -> Path:
    path.write_text("\n".join(f"line {n} of the text, which is neither long nor short" for n in range(count)))
    return path


def test_running_text_is_held_out_in_blocks_of_neighbours(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "text.txt", 20_000)
    records = recipe.read(DataConfig(path=str(path), eval_fraction=0.05))
    assert len(records.train) + len(records.validation) == 20_000
    assert not set(records.train) & set(records.validation)
    # About one in twenty of some hundred blocks: three standard deviations of the binomial are 3.1 %.
    assert 0.02 < len(records.validation) / 20_000 < 0.08
    numbers = [int(text.split()[1]) for text in records.validation]
    neighbours = sum(b == a + 1 for a, b in itertools.pairwise(numbers))
    assert neighbours > 0.9 * len(numbers)
    assert records == recipe.read(DataConfig(path=str(path), eval_fraction=0.05))


def test_a_small_text_is_divided_too(tmp_path: Path) -> None:
    records = recipe.read(DataConfig(path=str(write_lines(tmp_path / "text.txt", 40)), eval_fraction=0.1))
    assert records.train
    assert records.validation


def test_pairs_take_the_prefix_and_equal_inputs_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"q": f"question {n % 50}", "a": f"answer {n}", "extra": 1} for n in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(
        path=str(tmp_path / "pairs.jsonl"),
        objective="text_to_text",
        inputs="q",
        targets="a",
        prefix="answer: ",
        eval_fraction=0.2,
    )
    records = recipe.read(data)
    assert len(records.train) + len(records.validation) == 200
    # Four answers to every question: a question that is held out is held out with all of them.
    assert not {source for source, _ in records.train} & {source for source, _ in records.validation}
    assert all(source.startswith("answer: question ") for source, _ in records.train)
    assert len(list(records.texts())) == 2 * len(records.train)
    train, validation = recipe.datasets(records, data, TrainConfig(input_length=32), ByteTokenizer())
    assert (train.input_length, train.target_length) == (32, 32)
    assert train.num_examples == len(records.train)
    assert validation.num_examples == len(records.validation)


def test_separate_files_for_evaluation(tmp_path: Path) -> None:
    paths = [str(write_lines(tmp_path / name, 30)) for name in ("train.txt", "dev.txt")]
    records = recipe.read(DataConfig(path=paths[0], eval_path=paths[1]))
    assert len(records.train) == len(records.validation) == 30
    (tmp_path / "dev.csv").write_text("body\nwords\n")
    with pytest.raises(InputError, match=r"dev\.csv"):
        recipe.check(DataConfig(path=paths[0], eval_path=str(tmp_path / "dev.csv")))


def test_the_fingerprint_is_of_content_and_order() -> None:
    first = recipe.Records(["ab", "c"], ["d"])
    assert first.fingerprint() == recipe.Records(["ab", "c"], ["d"]).fingerprint()
    others = [
        recipe.Records(["a", "bc"], ["d"]),
        recipe.Records(["c", "ab"], ["d"]),
        recipe.Records(["ab", "c", "d"], []),
        recipe.Records([("ab", "c")], ["d"]),
    ]
    assert first.fingerprint() not in {other.fingerprint() for other in others}


TEXTS = [f"number {n} is followed by number {n + 1}, as everyone knows" for n in range(300)]


@pytest.mark.parametrize("spec", ["unigram:200", "bpe:200", "word:120", "char", "bytes"])
def test_tokenizers_are_saved_with_the_run(tmp_path: Path, spec: str) -> None:
    directory = tmp_path / "tokenizer"
    tokenizer = recipe.obtain_tokenizer(spec, 100, TEXTS, directory)
    if not spec.startswith("word"):  # a small vocabulary of whole words does not hold every number
        assert tokenizer.decode(tokenizer.encode(TEXTS[7])) == TEXTS[7]
    again = recipe.obtain_tokenizer(str(directory), 100, [], tmp_path / "copy")
    assert again.encode(TEXTS[8]) == tokenizer.encode(TEXTS[8])
    assert again.vocab_size == tokenizer.vocab_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "tokenizer"]
    assert not list(directory.glob("trained*"))


def test_a_given_model_is_copied_byte_for_byte(tmp_path: Path) -> None:
    recipe.obtain_tokenizer("unigram:200", 100, TEXTS, tmp_path / "first")
    recipe.obtain_tokenizer(str(tmp_path / "first" / "spiece.model"), 100, [], tmp_path / "second")
    assert (tmp_path / "second/spiece.model").read_bytes() == (tmp_path / "first/spiece.model").read_bytes()


def test_a_run_keeps_its_tokenizer_from_its_first_checkpoint_on(tmp_path: Path) -> None:
    config = RunConfig(out=str(tmp_path), tokenizer="unigram:200")
    first = recipe.run_tokenizer(config, TEXTS)
    # No checkpoint yet: what the configuration asks for is made anew.
    assert recipe.run_tokenizer(dataclasses.replace(config, tokenizer="bytes"), []).vocab_size == 259
    assert recipe.run_tokenizer(config, TEXTS).encode(TEXTS[3]) == first.encode(TEXTS[3])
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert recipe.run_tokenizer(config, []).encode(TEXTS[3]) == first.encode(TEXTS[3])


def test_training_that_was_cut_short_leaves_no_tokenizer(tmp_path: Path) -> None:
    def interrupted():
        yield from TEXTS[:100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.obtain_tokenizer("unigram:200", 100, interrupted(), tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
    recipe.obtain_tokenizer("unigram:200", 100, TEXTS, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("unigram", "needs a vocabulary size"), ("bpe:many", "needs a vocabulary size"), ("nothing.model", "nothing")],
)
def test_bad_tokenizers(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.obtain_tokenizer(spec, 100, TEXTS, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
