import numpy as np

from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.data.tokens import Tokens, id_type, text_hashes, tokenize


def test_texts_come_back_as_they_were_encoded():
    tokenizer = ByteTokenizer()
    texts = [f"text {n} " * (n % 4) for n in range(2500)]
    tokens = tokenize(iter(texts), tokenizer)
    assert isinstance(tokens, Tokens)
    assert len(tokens) == 2500
    assert tokens.flat.dtype == np.uint16
    assert tokens.offsets.dtype == np.int64
    assert [tokens[n].tolist() for n in range(2500)] == [tokenizer.encode(text) for text in texts]
    assert tokens.lengths.tolist() == [len(text) for text in texts]
    assert tokens.offsets[-1] == len(tokens.flat) == sum(map(len, texts))


def test_no_texts():
    tokens = tokenize([], ByteTokenizer())
    assert (len(tokens), len(tokens.flat), tokens.lengths.tolist()) == (0, 0, [])


def test_a_vocabulary_too_large_for_two_bytes():
    class Wide(ByteTokenizer):
        vocab_size = 2**16 + 1

        def encode_batch(self, texts):
            return [[2**16, 5] for _ in texts]

    assert tokenize(["a"], Wide()).flat.tolist() == [2**16, 5]
    assert (id_type(2**16), id_type(2**16 + 1)) == ("uint16", "int32")


def test_hashes_of_texts():
    found = text_hashes(["", "a question", "é", "\ud800"])
    assert found.dtype == np.uint64
    # The side of a hold-out hangs on these: they must not change between versions. b2sum -l 64 gives the bytes.
    assert found[:2].tolist() == [0xB4B2797457A0A6E4, 0x9D1142AE3334C97B]
    assert len(set(found.tolist())) == 4
    assert len(text_hashes([])) == 0
