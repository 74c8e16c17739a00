import pathlib
import pickle

import numpy as np
import pytest

from t5x_lite.data.objectives import Vocabulary
from t5x_lite.data.tokenizers import ByteTokenizer, load_tokenizer
from t5x_lite.errors import InputError

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "tokenizers"


def test_of_bytes():
    vocabulary = Vocabulary.of(ByteTokenizer())
    assert (vocabulary.vocab_size, vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (259, 0, 1, None)
    assert np.flatnonzero(vocabulary.special).tolist() == [0, 1, 2, *range(248, 259)]
    assert [chr(token - 3) for token in np.flatnonzero(vocabulary.sentence_ends)] == ["!", ".", "?"]
    starts = {chr(token - 3) for token in np.flatnonzero(vocabulary.word_starts & ~vocabulary.special)}
    assert {" ", "\n", "-", ","} <= starts
    assert not starts & {"a", "Z", "0", "é"}
    assert vocabulary.modes["[S2S]"] == tuple(byte + 3 for byte in b"[S2S]")
    assert len(vocabulary.ordinary) == 245
    assert not vocabulary.special[vocabulary.ordinary].any()


@pytest.mark.parametrize(
    ("name", "starts", "others"),
    [
        ("bert_uncased", ("the", ",", "!"), ("##s", "##ing")),
        ("roberta", ("Ġthe", "."), ("ing", "s")),
        ("t5_json", ("▁the", ","), ("s", "ing")),
    ],
)
def test_where_words_begin(name, starts, others):
    tokenizer = load_tokenizer(FIXTURES / name)
    vocabulary = Vocabulary.of(tokenizer)
    known = {piece: tokenizer._backend.token_to_id(piece) for piece in (*starts, *others)}
    known = {piece: token for piece, token in known.items() if token is not None}
    assert len(known) >= 3
    assert {piece for piece, token in known.items() if vocabulary.word_starts[token]} == set(starts) & set(known)
    special = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, *tokenizer.prefix_ids, *tokenizer.sentinels)
    assert vocabulary.special[list(special)].all()
    assert vocabulary.special.sum() < 20
    assert vocabulary.sentence_ends[tokenizer.encode("a.")[-1]]


def test_words_of_a_vocabulary_that_does_not_show_them():
    gpt1 = Vocabulary.of(load_tokenizer(FIXTURES / "gpt1"))
    with pytest.raises(InputError, match="does not show where a word begins"):
        gpt1.require_word_starts()
    with pytest.raises(InputError, match="no end-of-sequence token"):
        gpt1.require_eos()


def test_modes_that_cannot_be_spelled_are_left_out():
    bert = Vocabulary.of(load_tokenizer(FIXTURES / "bert_uncased"), ("[NLU]", "the"))
    assert list(bert.modes) == ["the"]


def test_it_can_be_pickled():
    vocabulary = Vocabulary.of(ByteTokenizer())
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again.sentinels == vocabulary.sentinels
    np.testing.assert_array_equal(again.special, vocabulary.special)


def test_ids_without_text_are_special():
    mbart = Vocabulary.of(load_tokenizer(FIXTURES / "mbart"))
    # Its languages' codes among them, of which a text has only one.
    assert mbart.special.sum() == 30
