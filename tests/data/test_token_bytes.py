"""What every token adds to a text, which is what stop strings are found in."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from t5x_lite.data.huggingface_tokenizers import HuggingFaceTokenizer
from t5x_lite.data.tokenizer_files import ModelDirectory
from t5x_lite.data.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece
from t5x_lite.errors import InputError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
TEXTS = json.loads((FIXTURES / "reference.json").read_text(encoding="utf-8"))["texts"]
ALPHABET = "aeinorst .,'\n\té東🚢Ж"
RANDOM = ["".join(random.Random(seed).choices(ALPHABET, k=40)) for seed in range(40)]
CORPUS = ["The keeper waited for ships, and the fog came in.\n2 ships, 30 miles: 'tis so!"] * 20


@pytest.fixture(
    scope="module",
    params=[*sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()), "bytes", "unigram", "byte fallback"],
)
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param in ("unigram", "byte fallback"):
        fallback = request.param == "byte fallback"
        path = tmp_path_factory.mktemp("model") / "spiece.model"
        return train_sentencepiece(CORPUS, path, 60 + 256 * fallback, extra_ids=5, byte_fallback=fallback)
    return load_tokenizer(FIXTURES / request.param)


def pipeline(tmp_path, decoder, pieces, **settings):
    """A tokenizer of whole words, of whose pipeline only the decoder matters."""
    backend = tokenizers.Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token=pieces[0]))
    backend.decoder = decoder
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return HuggingFaceTokenizer(backend, ModelDirectory(tmp_path))


def without_spaces_around_sentinels(text):
    return re.sub(r" *(<extra_id_\d+>) *", r"\1", text).strip()


def test_tokens_in_a_row_are_the_text(tokenizer):
    pieces = tokenizer.token_bytes()
    assert len(pieces) == tokenizer.vocab_size
    fills = [f"fill <extra_id_{n}> it" for n in range(3)]
    for text in [*TEXTS, *RANDOM, *fills]:
        ids = tokenizer.encode(text)
        if tokenizer.eos_id in ids:  # where decoding stops
            ids = ids[: ids.index(tokenizer.eos_id)]
        spelled = b"".join(pieces[token] for token in ids).decode()
        expected = tokenizer.decode(ids)
        assert without_spaces_around_sentinels(spelled) == without_spaces_around_sentinels(expected)


def test_tokens_that_are_no_text_are_empty(tokenizer):
    pieces = tokenizer.token_bytes()
    special = {tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, *tokenizer.prefix_ids, *tokenizer.suffix_ids}
    assert {pieces[token] for token in special - {None}} == {b""}
    for n, sentinel in enumerate(tokenizer.sentinels):
        assert pieces[sentinel] == f"<extra_id_{n}>".encode()


def test_every_token_in_the_middle_of_a_text(tokenizer):
    """Also those that no text here is divided into, and halves of characters."""
    pieces = tokenizer.token_bytes()
    letter = tokenizer.encode("the")[-1]
    for token in set(range(tokenizer.vocab_size)) - {tokenizer.eos_id, *tokenizer.sentinels}:
        spelled = b"".join(pieces[n] for n in (letter, token, letter)).decode(errors="ignore")
        assert spelled.strip() == tokenizer.decode([letter, token, letter]).replace("\ufffd", "").strip()


def test_the_decoder_of_llamas_tokenizer_json(tmp_path):
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = pipeline(tmp_path, decoder, ["▁a", "b", "▁▁", "<0x0A>", "<0xE6>", "<0x9d>", "<0xB1>", "<0x>"])
    assert tokenizer.token_bytes() == [b" a", b"b", b"  ", b"\n", b"\xe6", b"\x9d", b"\xb1", b"<0x>"]
    assert tokenizer.decode([0, 1, 4, 5, 6, 2, 0, 3]) == "ab東   a\n"


def test_a_pipeline_without_a_decoder_puts_a_space_between_tokens(tmp_path):
    tokenizer = pipeline(tmp_path, None, ["a", "b", "<extra_id_0>"])
    assert tokenizer.token_bytes() == [b" a", b" b", b"<extra_id_0>"]
    assert tokenizer.decode([0, 1, 2]) == "a b <extra_id_0>"


def test_an_end_that_only_the_model_names(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert pipeline(tmp_path, decoders.Fuse(), ["a", "b"]).token_bytes() == [b"a", b""]


def test_spaces_that_are_cleaned_up(tmp_path):
    tokenizer = pipeline(tmp_path, None, ["a", ".", "n't"], clean_up_tokenization_spaces=True)
    assert tokenizer.token_bytes() == [b" a", b".", b"n't"]
    assert tokenizer.decode([0, 2, 1]) == "an't."


def test_ids_without_a_token(tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<new>": 1}')
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    backend.add_tokens(["<new>"])
    backend.decoder = decoders.Fuse()
    tokenizer = HuggingFaceTokenizer(backend, ModelDirectory(tmp_path / "no files"))
    assert tokenizer.vocab_size == 4
    assert tokenizer.token_bytes() == [b"a", b"", b"<new>", b"b"]


def test_tokens_that_are_added_to_a_sentencepiece_model(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text('{"<new>": 420}')
    assert load_tokenizer(tmp_path).token_bytes()[420] == b"<new>"
    tokenizer = load_tokenizer(FIXTURES / "llama" / "tokenizer.model", extra_ids=2)
    assert tokenizer.token_bytes()[420:] == [b"<extra_id_1>", b"<extra_id_0>"]


def test_a_decoder_that_is_not_known_matters_only_when_asked(tmp_path):
    tokenizer = pipeline(tmp_path, decoders.Sequence([decoders.CTC(), decoders.Fuse()]), ["a", "b"])
    assert tokenizer.decode([0, 1]) == "ab"
    with pytest.raises(InputError, match="decoder CTC, Fuse"):
        tokenizer.token_bytes()


def test_bytes_have_no_file():
    pieces = ByteTokenizer().token_bytes()
    assert pieces[:3] == [b"", b"", b""]
    assert pieces[ord("a") + 3] == b"a"
    assert pieces[258] == b"<extra_id_0>"
