import functools
import json
import pathlib
import shutil

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from t5x_lite.data.corpus import stdlib_documents
from t5x_lite.data.tokenizer_check import check_tokenizer
from t5x_lite.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from t5x_lite.errors import InputError
from t5x_lite.models.registry import PRESETS

SHARED = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
TEXTS = ["Thank you for inviting me to your party.", "", " two  spaces ", "naïve café, 日本語 🎉", "{code}\ttabs"]


@pytest.fixture(scope="module")
def corpus():
    return [document.text for document in stdlib_documents()][:600]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    return train_sentencepiece(corpus, tmp_path_factory.mktemp("sp") / "m.model", 500, extra_ids=10)


@pytest.fixture(scope="module")
def plain_model(corpus, tmp_path_factory):
    """A model as sentencepiece itself trains it: no sentinels, BOS 1, EOS 2, no pad."""
    prefix = tmp_path_factory.mktemp("plain") / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(prefix), vocab_size=300, minloglevel=3, num_threads=1
    )
    return prefix.with_suffix(".model")


@pytest.mark.parametrize(
    ("model_type", "byte_fallback"),  # but for words spelled in bytes, which is refused: see test_training_errors
    [(kind, fallback) for kind in ("unigram", "bpe", "char", "word") for fallback in (False, True)][:-1],
)
def test_training_every_model_type(tmp_path, corpus, model_type, byte_fallback):
    file = tmp_path / "new" / "m.model"
    tokenizer = train_sentencepiece(corpus, file, 600, model_type, extra_ids=20, byte_fallback=byte_fallback)
    size = tokenizer.vocab_size
    assert size == 600 or (model_type == "char" and size < 600)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, None)
    assert tokenizer.sentinels == tuple(range(size - 1, size - 21, -1))
    # The file needs nothing beside it: sentencepiece alone finds the sentinels at the top.
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert processor.get_piece_size() == size
    assert [processor.id_to_piece(size - 1 - n) for n in (0, 7, 19)] == [
        "<extra_id_0>",
        "<extra_id_7>",
        "<extra_id_19>",
    ]
    assert "extra" not in processor.id_to_piece(size - 21)
    assert all(0 <= token < size - 20 for text in corpus for token in processor.encode(text))
    report = check_tokenizer(tokenizer, [*corpus, "unseen: 日本語 🎉"])
    assert report.unknown_rate == 0 if byte_fallback else report.unknown_rate > 0
    if byte_fallback:
        assert tokenizer.decode(tokenizer.encode("naïve 日本語 🎉")) == "naïve 日本語 🎉"


def test_training_is_deterministic(tmp_path, corpus, trained):
    train_sentencepiece(corpus, tmp_path / "again.model", 500, extra_ids=10)
    trained.save(tmp_path / "first")
    assert (tmp_path / "again.model").read_bytes() == (tmp_path / "first" / "spiece.model").read_bytes()


def test_training_keeps_all_of_a_long_line(tmp_path):
    line = "word " * 5000 + "zebra " * 5000 + "x" * 3000
    tokenizer = train_sentencepiece([line], tmp_path / "m.model", 30, extra_ids=2)
    assert tokenizer.unk_id not in tokenizer.encode("zebra x word")


def test_training_without_sentinels(tmp_path, corpus):
    tokenizer = train_sentencepiece(corpus, tmp_path / "m.model", 300, extra_ids=0)
    assert (tokenizer.vocab_size, tokenizer.sentinels) == (300, ())


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        ([], {}, "no text to train a vocabulary on"),
        (["", "  \n "], {}, "no text to train a vocabulary on"),
        (None, {"vocab_size": 40}, "cannot train vocab_size 40 .* Vocabulary size is smaller than required_chars"),
        (None, {"vocab_size": 12}, "vocab_size 12 with extra_ids 10: needs at least 14"),
        (None, {"vocab_size": 200, "byte_fallback": True}, "vocab_size 200 with extra_ids 10: needs at least 270"),
        (None, {"vocab_size": -5}, "vocab_size -5"),
        (None, {"extra_ids": -1}, "extra_ids -1"),
        (None, {"model_type": "unigrams"}, "model_type 'unigrams': allowed are unigram, bpe, char, word"),
        (
            None,
            {"model_type": "word", "byte_fallback": True, "vocab_size": 900},
            "byte_fallback with model_type 'word'",
        ),
        (None, {"character_coverage": 1.5}, "character_coverage 1.5: must be from 0.98 to 1"),
    ],
)
def test_training_errors(tmp_path, corpus, texts, arguments, message):
    arguments = {"vocab_size": 300, "extra_ids": 10} | arguments
    with pytest.raises(InputError, match=message) as error:
        train_sentencepiece(corpus if texts is None else texts, tmp_path / "m.model", **arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m.model").exists()


def test_an_error_of_the_corpus_reaches_the_caller(tmp_path):
    def broken():
        yield "fine"
        raise InputError("corpus.jsonl:2: not a JSON object")

    with pytest.raises(InputError, match=r"corpus\.jsonl:2"):
        train_sentencepiece(broken(), tmp_path / "m.model", 200)


def test_ids_equal_sentencepiece(corpus, plain_model, tmp_path, trained):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(plain_model))
    tokenizer = SentencePieceTokenizer(plain_model)
    expected = [processor.encode(text) for text in [*corpus, *TEXTS]]
    assert [tokenizer.encode(text) for text in [*corpus, *TEXTS]] == expected
    assert tokenizer.encode_batch([*corpus, *TEXTS]) == expected
    assert tokenizer.encode_batch([]) == []
    # EOS and pad aside, decoding is sentencepiece's too.
    assert [tokenizer.decode(ids) for ids in expected] == [processor.decode(ids) for ids in expected]


def test_sentinels_added_to_a_model_that_has_none(plain_model):
    tokenizer = SentencePieceTokenizer(plain_model, extra_ids=100)
    assert tokenizer.vocab_size == 400
    assert tokenizer.sentinels == tuple(range(399, 299, -1))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)  # no pad piece: EOS pads
    assert SentencePieceTokenizer(plain_model, extra_ids=0).vocab_size == 300


def test_sentinels_that_a_model_spells_with_the_word_start_mark(trained, tmp_path):
    trained.save(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "spiece.model").read_bytes())
    for piece in proto.pieces:
        if piece.piece.startswith("<extra_id_"):
            piece.piece = "▁" + piece.piece
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path, extra_ids=50)
    assert (tokenizer.vocab_size, tokenizer.sentinels) == (trained.vocab_size, trained.sentinels)
    assert tokenizer.encode("a <extra_id_2> b") == trained.encode("a <extra_id_2> b")


@pytest.mark.parametrize("kind", ["own", "added"])
def test_sentinels_in_text(kind, trained, plain_model):
    tokenizer = trained if kind == "own" else SentencePieceTokenizer(plain_model, extra_ids=10)
    text = "hello <extra_id_3> world <extra_id_0>"
    third, zeroth = tokenizer.sentinels[3], tokenizer.sentinels[0]
    expected = [*tokenizer.encode("hello"), third, *tokenizer.encode("world"), zeroth]
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_batch(["a", text]) == [tokenizer.encode("a"), expected]
    assert tokenizer.decode(expected) == text
    for other in ("<extra_id_10>", "<extra_id_007>", "<extra_id_>", "<extra_id_99999999>"):
        assert not set(tokenizer.encode(other)) & set(tokenizer.sentinels)


def test_decode_stops_at_eos_and_leaves_out_padding_and_foreign_ids(trained):
    ids = trained.encode("hello world")
    assert trained.decode([0, *ids[:2], 0, -1, 5000, *ids[2:], 1, *ids]) == "hello world"
    assert trained.decode([]) == trained.decode([1]) == ""


@pytest.mark.parametrize("kind", ["own", "added", "bytes"])
def test_save_round_trip(tmp_path, kind, trained, plain_model):
    tokenizer = {"own": trained, "added": SentencePieceTokenizer(plain_model, 7), "bytes": ByteTokenizer()}[kind]
    tokenizer.save(tmp_path / "run" / "tokenizer")
    again = load_tokenizer(str(tmp_path / "run" / "tokenizer"), extra_ids=55)  # what was saved wins
    assert type(again) is type(tokenizer)
    for name in (
        "vocab_size",
        "sentinels",
        "pad_id",
        "eos_id",
        "unk_id",
        "bos_id",
        "mask_id",
        "prefix_ids",
        "suffix_ids",
    ):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    if kind == "added":
        assert (tmp_path / "run" / "tokenizer" / "spiece.model").read_bytes() == plain_model.read_bytes()


def test_what_models_expect_around_a_text(trained, plain_model):
    for tokenizer, eos in ((trained, 1), (SentencePieceTokenizer(plain_model), 2), (ByteTokenizer(), 1)):
        assert (tokenizer.prefix_ids, tokenizer.suffix_ids, tokenizer.mask_id) == ((), (eos,), None)


def test_transformers_is_told_of_the_vocabularies_that_its_classes_read_alike(tmp_path, corpus, trained, plain_model):
    bpe = train_sentencepiece(corpus, tmp_path / "bpe.model", 500, "bpe", extra_ids=10)
    spelled = train_sentencepiece(corpus, tmp_path / "spelled.model", 600, extra_ids=10, byte_fallback=True)
    for tokenizer, expected in (
        (trained, "T5Tokenizer"),
        (ByteTokenizer(), "ByT5Tokenizer"),
        # transformers' T5 has no other algorithm, no bytes, and no other ids of pad, EOS and unknown.
        (bpe, None),
        (spelled, None),
        (SentencePieceTokenizer(plain_model), None),
    ):
        tokenizer.save(tmp_path / "saved")
        settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
        assert settings.get("tokenizer_class") == expected
        # Its sentinels come on top of the model's pieces: ours are pieces.
        assert settings["extra_ids"] == (100 if tokenizer.bos_id == 1 else 0)


@pytest.mark.parametrize(
    "settings", [{"t5x_lite_tokenizer": "sentencepiece", "extra_ids": 0}, {"t5x_lite_tokenizer": "bytes"}]
)
def test_a_directory_of_an_earlier_version_stays_as_it_was(tmp_path, trained, settings):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if settings["t5x_lite_tokenizer"] == "sentencepiece":
        trained.save(tmp_path / "model")
        (tmp_path / "old" / "spiece.model").write_bytes((tmp_path / "model" / "spiece.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path / "old")
    assert tokenizer.encode("hello") == (trained if "extra_ids" in settings else ByteTokenizer()).encode("hello")
    tokenizer.save(tmp_path / "new")
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("old", "new")]
    assert contents[0] == contents[1]


def test_load_from_a_foreign_directory(tmp_path, plain_model):
    (tmp_path / "only.model").write_bytes(plain_model.read_bytes())
    assert load_tokenizer(tmp_path, extra_ids=5).vocab_size == 305
    # Hugging Face writes a file of the same name; T5's has the number of extra ids in it.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 9}))
    assert load_tokenizer(tmp_path).vocab_size == 309
    (tmp_path / "other.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"it holds: only\.model, other\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(plain_model.read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == 309
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        load_tokenizer(tmp_path)
    for content, message in {
        "[]": "is not a JSON object",
        '{"extra_ids": "x"}': "extra_ids 'x' in .*an integer",
    }.items():
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)


def test_load_errors(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for spec, message in {
        "byte": "no tokenizer at 'byte'; allowed: 'bytes'.*did you mean 'bytes'",
        str(tmp_path / "missing.model"): "no tokenizer at '.*missing.model'",
        str(tmp_path / "bad.model"): "bad.model' is not a readable SentencePiece model",
        str(tmp_path / "empty.model"): "empty.model' is not a readable SentencePiece model",
        str(tmp_path / "empty"): r"must hold spiece\.model.*it holds: none",
    }.items():
        with pytest.raises(InputError, match=message):
            load_tokenizer(spec)


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == 259
    assert tokenizer.sentinels == (258, 257, 256, 255, 254, 253, 252, 251, 250, 249, 248)
    assert tokenizer.encode("aé") == [100, 198, 172]
    assert tokenizer.encode("a<extra_id_0>b<extra_id_10>") == [100, 258, 101, 248]
    assert len(tokenizer.encode("<extra_id_11>")) == 13
    for text in (*TEXTS, "a <extra_id_0>b\n", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(["a", ""]) == [[100], []]
    assert tokenizer.decode([0, 100, 2, 0, 198, 101, 300, -1, 1, 100]) == "ab"  # half a character is left out
    assert not any(token in tokenizer.sentinels for token in tokenizer.encode("".join(map(chr, range(0xD800)))))


def test_report(trained):
    exact = check_tokenizer(ByteTokenizer(), TEXTS)
    assert (exact.lines, exact.unknown_rate, exact.round_trip_failures, exact.bytes_per_token) == (5, 0, 0, 1)
    report = check_tokenizer(trained, ["plain words", " two  spaces ", "日本語", ""])
    assert (report.lines, report.round_trip_failures, report.lost_whitespace) == (4, 0.5, 0.25)
    assert 0 < report.unknown_rate < 0.5
    assert report.tokens_per_word > 1
    with pytest.raises(InputError, match="no text"):
        check_tokenizer(trained, [])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published vocabularies are not at hand")
def test_published_vocabularies():
    t5 = load_tokenizer(SHARED / "t5-sentencepiece-32k")
    assert (t5.vocab_size, t5.sentinels[0], t5.sentinels[99], len(t5.sentinels)) == (32100, 32099, 32000, 100)
    assert (t5.pad_id, t5.eos_id, t5.unk_id, t5.bos_id) == (0, 1, 2, None)
    # As Hugging Face's T5 tokenizer encodes the example of its documentation.
    assert t5.encode("The <extra_id_0> walks in <extra_id_1> park") == [37, 32099, 10681, 16, 32098, 2447]
    own = load_tokenizer(SHARED / "t5-sentencepiece-cc_all-32100")
    assert (own.vocab_size, own.sentinels[0], own.sentinels[99], len(own.sentinels)) == (32101, 32100, 32001, 100)
    for tokenizer in (t5, own):
        text = "Thank you <extra_id_0> me to your party <extra_id_1> week."
        assert tokenizer.decode(tokenizer.encode(text)) == text
    bare = load_tokenizer(SHARED / "t5-sentencepiece-32k", extra_ids=0)
    assert (bare.vocab_size, bare.sentinels, bare.id_of("<extra_id_0>")) == (32000, (), None)
    # The models' tables have more rows than there are ids, and the sentinels stay where the vocabulary ends.
    assert {PRESETS[name].vocab_size for name in ("t5-small", "t5-11b", "t5-v1.1-base", "flan-t5-xl")} == {32128}
    assert [t5.id_of(token) for token in ("<pad>", "</s>", "<unk>", "▁the", "<extra_id_3>", "<extra_id_100>")] == [
        *(0, 1, 2, 8, 32096, None),
    ]
    assert own.id_of("<extra_id_3>") == own.sentinels[3] == 32097


def sentencepiece_ids(file):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / file))
    return lambda texts: processor.encode(texts)


def byte_level_ids(vocabulary, merges):
    reference = tokenizers.ByteLevelBPETokenizer(str(SHARED / vocabulary), str(SHARED / merges))
    return lambda texts: [encoding.ids for encoding in reference.encode_batch(texts)]


def word_piece_ids(file, lowercase):
    reference = tokenizers.BertWordPieceTokenizer(str(SHARED / file), lowercase=lowercase)
    return lambda texts: [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]


LLAMA = "../weights/llama2c-stories260K/tok512_rebuilt.model"
PUBLISHED = {  # what is loaded (files by the name that they get), with which settings, and the libraries themselves
    "t5": ({"spiece.model": "t5-sentencepiece-32k/spiece.model"}, {}, sentencepiece_ids),
    "cc_all": ({"spiece.model": "t5-sentencepiece-cc_all-32100/sentencepiece.model"}, {}, sentencepiece_ids),
    "botchan": ({"spiece.model": "sp-test-models/test_model.model"}, {}, sentencepiece_ids),
    "japanese": ({"spiece.model": "sp-test-models/test_ja_model.model"}, {}, sentencepiece_ids),
    "llama": ({"tokenizer.model": LLAMA}, {"tokenizer_class": "LlamaTokenizer"}, sentencepiece_ids),
    "gpt2": ({"encoder.json": "gpt2-bpe/encoder.json", "vocab.bpe": "gpt2-bpe/vocab.bpe"}, {}, byte_level_ids),
    "roberta": (
        {"vocab.json": "roberta-bart-bpe/vocab.json", "merges.txt": "roberta-bart-bpe/merges.txt"},
        {},
        byte_level_ids,
    ),
    "bert_cased": (
        {"vocab.txt": "bert-wordpiece/vocab_cased.txt"},
        {"do_lower_case": False},
        functools.partial(word_piece_ids, lowercase=False),
    ),
    "bert_uncased": (
        {"vocab.txt": "bert-wordpiece/vocab_uncased.txt"},
        {},
        functools.partial(word_piece_ids, lowercase=True),
    ),
}


@pytest.fixture(scope="module")
def ten_thousand_lines():
    lines: list[str] = []
    for path in sorted((SHARED.parent / "corpora").rglob("*.txt")):
        lines += path.read_text(encoding="utf-8").split("\n")
    # What stands for a special token is text to the libraries' own builders.
    lines = [line for line in lines if line.strip() and "<unk>" not in line and "[" not in line]
    assert len(lines) > 50_000
    return [lines[n * len(lines) // 10_000] for n in range(10_000)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published vocabularies are not at hand")
@pytest.mark.parametrize("name", PUBLISHED)
def test_ten_thousand_lines_equal_the_libraries(name, ten_thousand_lines, tmp_path):
    files, settings, reference = PUBLISHED[name]
    for target, source in files.items():
        shutil.copyfile(SHARED / source, tmp_path / target)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_tokenizer(tmp_path).encode_batch(ten_thousand_lines)
    assert found == reference(*files.values())(ten_thousand_lines)
    assert sum(map(len, found)) > 100_000
