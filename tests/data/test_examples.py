"""Examples by their number, against what one would write without an index."""

import itertools
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest

from t5x_lite.data.examples import InMemory, Pieces, Records, Stream, Windows, examples_of
from t5x_lite.data.objectives import CausalLM, MaskedLM, NextSentence, PrefixLM, SpanCorruption, TextToText, Vocabulary
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.data.tokens import Tokens
from t5x_lite.errors import InputError

BYTES = ByteTokenizer()
VOCABULARY = Vocabulary.of(BYTES)
EOS = BYTES.eos_id
RNG = np.random.default_rng(0)


def tokens_of(documents: list[list[int]]) -> Tokens:
    offsets = np.cumsum([0, *map(len, documents)])
    return Tokens(np.array(list(itertools.chain(*documents)), np.uint16), offsets)


def random_documents(rng: np.random.Generator, count: int, longest: int = 9) -> list[list[int]]:
    """Returns documents of letters, many of them empty."""
    sizes = rng.integers(0, longest + 1, count) * (rng.random(count) < 0.7)
    return [rng.integers(100, 126, size).tolist() for size in sizes]


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


class Asked:
    """An objective that gives what it was given."""

    def __init__(self, arrays: tuple[str, ...] = ("tokens",)) -> None:
        self.arrays = arrays

    sides = "encoder"

    def sizes(self, raw: int, vocabulary: Vocabulary) -> tuple[int, int]:
        return raw + 1, 2 * raw

    def __call__(self, *arguments: Any) -> Any:
        return tuple(array.tolist() for array in arguments[:-2])


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [(), (1,), (1, 2)])
@pytest.mark.parametrize("seed", range(6))
def test_a_stream_is_what_is_left_of_the_documents_end_to_end(separator: tuple[int, ...], seed: int) -> None:
    rng = drawn(seed)
    documents = random_documents(rng, int(rng.integers(1, 25)))
    kept = rng.random(len(documents)) < (0.3, 0.7, 1.0)[seed % 3]
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).reshape(-1, 2)
    stream = Stream(InMemory({"tokens": tokens_of(documents)}), edges, separator)
    # Each token beside the document that it is of.
    plain = [(number, token) for number in np.flatnonzero(kept).tolist() for token in (*documents[number], *separator)]
    assert len(stream) == len(plain)
    for start, stop in itertools.combinations(range(len(plain) + 3), 2):
        wanted = plain[start:stop]
        got = stream.read(start, stop)
        assert got.dtype == np.int32
        assert got.tolist() == [token for _, token in wanted]
        pieces = [piece.tolist() for piece in stream.documents(start, stop)]
        assert pieces == [[token for _, token in group] for _, group in itertools.groupby(wanted, lambda pair: pair[0])]


def test_a_stream_of_nothing_is_empty() -> None:
    source = InMemory({"tokens": tokens_of([[], [5]])})
    for stretches in (np.zeros((0, 2), np.int64), np.array([[0, 1]])):
        stream = Stream(source, stretches)
        assert (len(stream), stream.read(0, 5).tolist(), list(stream.documents(0, 5))) == (0, [], [])


# --- windows and pieces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "least"), [(CausalLM(), 1), (MaskedLM(), 2)])
@pytest.mark.parametrize("divided", [False, True])
def test_windows_are_all_of_the_stream(objective: Any, least: int, divided: bool) -> None:
    for seed in range(8):
        rng = drawn(seed)
        documents = random_documents(rng, 12)
        size = int(rng.integers(1, 8))
        stream = Stream(InMemory({"tokens": tokens_of(documents)}), np.array([[0, 12]]), (EOS,))
        windows = Windows(stream, size, objective, VOCABULARY, divided)
        whole = stream.read(0, len(stream)).tolist()
        cut = [whole[at : at + size] for at in range(0, len(whole), size)]
        if len(cut[-1]) < least:
            cut.pop()
        assert len(windows) == len(cut)
        assert windows.sizes().tolist() == [list(objective.sizes(size, VOCABULARY))] * len(cut)
        for index, window in enumerate(cut):
            examples = windows(index, RNG)
            # Of a masked text the targets are the text, between the special tokens of which bytes have an EOS.
            says = [x.targets.tolist() if least == 1 else x.input_targets[:-1].tolist() for x in examples]
            assert list(itertools.chain(*says)) == window
            # A document ends with the separator, and a window may begin and end within one.
            assert all(EOS not in text[:-1] for text in says) if divided else len(says) == 1
            for side, ids in enumerate((examples[0].inputs, examples[0].targets)):
                assert ids is None or len(ids) <= windows.sizes()[index, side]


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_all_of_each_document(seed: int) -> None:
    rng = drawn(seed)
    documents = random_documents(rng, 12)
    records, size = np.flatnonzero(rng.random(12) < 0.7), int(rng.integers(1, 6))
    objective: Any = Asked()
    pieces = Pieces(InMemory({"tokens": tokens_of(documents)}), records, size, objective, VOCABULARY)
    cut = [
        documents[number][at : at + size]
        for number in records.tolist()
        for at in range(0, len(documents[number]), size)
    ]
    assert len(pieces) == len(cut)
    assert [pieces(index, RNG)[0][0] for index in range(len(cut))] == cut
    assert pieces.sizes().tolist() == [[len(piece) + 1, 2 * len(piece)] for piece in cut]


def test_the_other_document_is_any_but_the_own() -> None:
    documents = [[100] * 9, [], [101] * 3, [102] * 3, [103] * 6, []]
    objective: Any = Asked(("tokens", "other"))
    source, records = InMemory({"tokens": tokens_of(documents)}), np.array([0, 1, 2, 4, 5])
    pieces = Pieces(source, records, 3, objective, VOCABULARY)
    assert len(pieces) == 6
    rng, draws = drawn(0), 1200
    for index in range(6):
        own, *_ = pieces(index, rng)[0][0]
        others: Counter[int] = Counter()
        for _ in range(draws):
            _, other = pieces(index, rng)[0]
            assert other in (documents[0], documents[2], documents[4])  # the whole of it
            others[other[0]] += 1
        # Each as often as it has pieces: 3, 1 and 2 there are of them, of which those of the own are left out.
        share = {token: number for token, number in ((100, 3), (101, 1), (103, 2)) if token != own}
        assert others.keys() == share.keys()
        for token, number in share.items():
            rate = number / sum(share.values())
            assert abs(others[token] / draws - rate) < 4 * (rate * (1 - rate) / draws) ** 0.5


@pytest.mark.parametrize("documents", [[[1] * 20], [[1] * 20, []], [[], [1] * 20, [], []]])
def test_next_sentences_need_two_documents(documents: list[list[int]]) -> None:
    source, objective = InMemory({"tokens": tokens_of(documents)}), cast(Any, NextSentence())
    with pytest.raises(InputError, match="drawn from other documents, and there is only one document"):
        Pieces(source, np.arange(len(documents)), 4, objective, VOCABULARY)


# --- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["encoder_decoder", "decoder"])
def test_records_are_all_of_the_pairs(sides: Any) -> None:
    rng = drawn(0)
    inputs, targets = random_documents(rng, 30), random_documents(rng, 30)
    source = InMemory({"inputs": tokens_of(inputs), "targets": tokens_of(targets)})
    numbers = np.flatnonzero(rng.random(30) < 0.7)
    objective: Any = TextToText(7, 6, sides)
    records = Records(source, numbers, objective, VOCABULARY)
    assert len(records) == len(numbers)
    cut = [0, 0]
    for index, number in enumerate(numbers.tolist()):
        example: Any = records(index, RNG)[0]
        said, asked = targets[number], inputs[number]
        if sides == "decoder":
            room = 6 - len(said[:5])  # what is read before the first target is no part of the row
            row = [*asked[:room], *said[:5], EOS]
            start = [] if example.start is None else [example.start]
            assert ([*start, *example.targets.tolist()], len(start)) == (row, len(asked[:room]) > 0)
            cut = [cut[0] + (len(asked) > room), cut[1] + (len(said) > 5)]
        else:
            assert (example.inputs.tolist(), example.targets.tolist()) == ([*asked[:6], EOS], [*said[:5], EOS])
            cut = [cut[0] + (len(asked) > 6), cut[1] + (len(said) > 5)]
        sizes = [0 if ids is None else len(ids) for ids in (example.inputs, example.targets)]
        assert records.sizes()[index].tolist() == sizes
    assert records.truncated() == tuple(cut)
    assert all(cut)


# --- which of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "packed", "kind", "divided"),
    [
        (SpanCorruption(), False, Windows, False),  # T5 joins documents and cuts them
        (SpanCorruption(), True, Pieces, False),
        (PrefixLM(), False, Pieces, False),  # each text is split by itself
        (PrefixLM(sides="decoder"), False, Windows, False),
        (PrefixLM(sides="decoder"), True, Windows, True),  # as long as their texts, so that rows are always full
        (CausalLM(), False, Windows, False),
        (CausalLM(), True, Windows, True),
        (MaskedLM(), True, Pieces, False),
        (TextToText(8, 8), True, Records, False),
    ],
    ids=str,
)
def test_documents_are_joined_where_they_may_be(objective: Any, packed: bool, kind: type, divided: bool) -> None:
    documents = random_documents(drawn(1), 20)
    kept = drawn(2).random(20) < 0.6
    source = InMemory({name: tokens_of(documents) for name in objective.arrays})
    examples = examples_of(source, kept, objective, 8, VOCABULARY, packed=packed)
    assert type(examples) is kind
    assert getattr(examples, "divided", False) == divided
    left = [document for document, keep in zip(documents, kept, strict=True) if keep]
    if isinstance(examples, Windows):
        separator = objective.separator(VOCABULARY)
        plain = list(itertools.chain(*([*document, *separator] for document in left)))
        assert examples.stream.read(0, len(plain)).tolist() == plain
    elif isinstance(examples, Pieces):
        assert len(examples) == sum(-(-len(document) // 8) for document in left)
    else:
        assert len(examples) == len(left)
