import dataclasses
import enum
import functools
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5x_lite.data.encoders import ChatEncoder, ChatTemplate, PairEncoder, TextEncoder
from t5x_lite.data.identity import identity_of
from t5x_lite.data.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece
from t5x_lite.data.tokens import tokenizer_identity
from t5x_lite.errors import InputError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
CORPUS = ["The keeper waited for ships, and the fog came in.\n2 ships, 30 miles: 'tis so!"] * 20
TOKENIZER = ByteTokenizer()


@pytest.fixture(
    scope="module",
    params=[*sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()), "bytes", "unigram", "byte fallback"],
)
def tokenizer(request, tmp_path_factory):
    """One of every kind."""
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param in ("unigram", "byte fallback"):
        fallback = request.param == "byte fallback"
        path = tmp_path_factory.mktemp("model") / "spiece.model"
        return train_sentencepiece(CORPUS, path, 60 + 256 * fallback, extra_ids=5, byte_fallback=fallback)
    return load_tokenizer(FIXTURES / request.param)


def encode(encoder, *records):
    return list(encoder([(f"f:{n}", record) for n, record in enumerate(records, 1)]))


def decoded(encoder, *records):
    return [tuple(TOKENIZER.decode(ids) for ids in encoded.features) for encoded in encode(encoder, *records)]


def test_every_tokenizer_can_be_sent_to_another_process(tokenizer, tmp_path):
    again = pickle.loads(pickle.dumps(tokenizer))
    for name in (
        "vocab_size",
        "pad_id",
        "eos_id",
        "unk_id",
        "bos_id",
        "mask_id",
        "sentinels",
        "prefix_ids",
        "suffix_ids",
    ):
        assert getattr(again, name) == getattr(tokenizer, name)
    texts = ["The keeper waited.", " two  spaces ", "", "é 日本 🎉 <extra_id_0>"]
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert [again.decode(again.encode(text)) for text in texts] == [
        tokenizer.decode(tokenizer.encode(text)) for text in texts
    ]
    assert tokenizer_identity(again) == tokenizer_identity(tokenizer)
    # A run loads the tokenizer that it has saved, and that is still the one of its cache.
    tokenizer.save(tmp_path)
    assert tokenizer_identity(load_tokenizer(tmp_path)) == tokenizer_identity(tokenizer)


def test_tokenizers_are_told_apart():
    names = [path.name for path in FIXTURES.iterdir() if path.is_dir()]
    identities = {tokenizer_identity(load_tokenizer(FIXTURES / name)) for name in names} | {
        tokenizer_identity(TOKENIZER)
    }
    assert len(identities) == len(names) + 1
    assert tokenizer_identity(TOKENIZER).startswith("ByteTokenizer of 259 ids, ")


def test_running_text(tokenizer):
    encoder = TextEncoder(tokenizer, "body")
    texts = ["The keeper waited.", "", " for  ships "]
    found = encode(encoder, *({"body": text, "other": 1} for text in texts))
    assert [list(each.features[0]) for each in found] == [tokenizer.encode(text) for text in texts]
    assert [(each.key, each.size) for each in found] == [(text, len(text)) for text in texts]
    assert (encoder.features, encoder.types) == (("tokens",), ("uint16",))


def test_long_texts_become_arrays_where_the_tokenizer_gives_them(tmp_path):
    tokenizer = train_sentencepiece(CORPUS, tmp_path / "m.model", 60, extra_ids=5)
    texts = [text * 9 for text in ("ships, and <extra_id_1> the fog", "", "\ud800 keeper", "2 ships ")]
    arrays = tokenizer.encode_arrays(texts)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    assert [array.tolist() for array in arrays] == tokenizer.encode_batch(texts)
    for encoder, records in (
        (TextEncoder(tokenizer), [{"text": text * 9} for text in texts]),
        (PairEncoder(tokenizer), [{"inputs": text * 9, "targets": text * 9} for text in texts]),
    ):
        long, short = encode(encoder, *records), encode(encoder, *records, *({**records[1]} for _ in range(100)))
        assert type(long[0].features[0]) is np.ndarray
        assert type(short[0].features[0]) is list
        assert [[list(ids) for ids in each.features] for each in long] == [list(each.features) for each in short[:4]]


def test_a_large_vocabulary_takes_four_bytes():
    class Large(ByteTokenizer):
        vocab_size = 2**16 + 1

    assert TextEncoder(Large()).types == ("int32",)
    assert PairEncoder(Large()).types == ("int32", "int32")
    assert ChatEncoder(Large()).types == ("int32", "uint8")


def drop_short(record):
    return record if len(record["q"]) > 1 else None


def twice(record):
    return ({"q": record["q"] + end, "a": record["a"]} for end in "?!")


def test_pairs_by_way_of_preprocessors():
    encoder = PairEncoder(TOKENIZER, (drop_short, twice), "q", "a", prefix="ask: ")
    records = [{"q": "x", "a": "1"}, {"q": "xy", "a": 2.5}]
    assert decoded(encoder, *records) == [("ask: xy?", "2.5"), ("ask: xy!", "2.5")]
    assert [(each.key, each.size) for each in encode(encoder, *records)] == [("ask: xy?", 11), ("ask: xy!", 11)]
    assert (encoder.features, encoder.types) == (("inputs", "targets"), ("uint16", "uint16"))
    assert records == [{"q": "x", "a": "1"}, {"q": "xy", "a": 2.5}]
    assert encode(encoder) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"inputs": "a", "target": "b"},
            r"column 'targets' is not in f:1; its columns are: inputs, target; did you mean",
        ),
        ({"inputs": None, "targets": "b"}, r"f:1: column 'inputs' is null"),
        ({"inputs": ["a"], "targets": "b"}, r"f:1: column 'inputs' is a list, not a text"),
        ({"inputs": b"\xff", "targets": "b"}, r"f:1: column 'inputs' is not valid UTF-8 at byte 1"),
    ],
)
def test_a_record_without_a_text(record, message):
    with pytest.raises(InputError, match=message):
        encode(PairEncoder(TOKENIZER), record)


def test_a_preprocessor_that_fails():
    def divide(record):
        return {"inputs": str(1 / record["n"]), "targets": ""}

    def refuse(record):
        raise InputError("no good")

    def unplugged(record):
        raise OSError(5, "Input/output error")

    assert decoded(PairEncoder(TOKENIZER, (divide,)), {"n": 2}) == [("0.5", "")]
    with pytest.raises(InputError, match=r"^f:2: preprocessor divide failed: ZeroDivisionError: division by zero$"):
        encode(PairEncoder(TOKENIZER, (divide,)), {"n": 2}, {"n": 0})
    with pytest.raises(InputError, match=r"^f:1: no good$"):
        encode(PairEncoder(TOKENIZER, (refuse,)), {})
    with pytest.raises(InputError, match=r"^f:1: preprocessor twice failed: KeyError: 'q'$"):
        encode(PairEncoder(TOKENIZER, (twice,)), {})
    with pytest.raises(OSError, match="Input/output"):  # not the record's fault
        encode(PairEncoder(TOKENIZER, (unplugged,)), {})


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]


def spelled(encoded):
    """The text with EOS as a dollar, and below it a 1 under every answer."""
    tokens, answer = encoded.features
    text = "".join("$" if token == 1 else bytes([token - 3]).decode() for token in tokens)
    return text, "".join(map(str, answer))


def test_a_conversation():
    encoder = ChatEncoder(TOKENIZER)
    (found,) = encode(encoder, {"messages": [*CHAT, {"role": "user", "content": "thanks"}]})
    text, answer = spelled(found)
    assert text == "System:\nBe brief.\nUser:\nHi\nAssistant:\nYes?$User:\n2+2\nAssistant:\n4$"
    asked = [match.span() for match in re.finditer("1+", answer)]
    assert [text[start:end] for start, end in asked] == ["Yes?$", "4$"]
    assert found.key == "System:\nBe brief.\nUser:\nHi\nAssistant:\n"
    assert (encoder.features, encoder.types) == (("tokens", "answer"), ("uint16", "uint8"))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "Hi", "response": "Yes?"}, "User:\nHi\nAssistant:\nYes?$"),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, "User:\nAdd\n\n2 2\nAssistant:\n4$"),
        ({"instruction": "Add", "input": None, "output": "4"}, "User:\nAdd\nAssistant:\n4$"),
        ({"instruction": "Add", "output": ""}, "User:\nAdd\nAssistant:\n$"),
    ],
)
def test_other_columns_of_a_conversation(record, text):
    (found,) = encode(ChatEncoder(TOKENIZER), record)
    assert spelled(found) == (text, "0" * (text.index("t:\n") + 3) + "1" * (len(text) - text.index("t:\n") - 3))


def test_a_template_of_ones_own():
    template = ChatTemplate(system="", user="[INST] ", assistant=" [/INST] ", end="")
    (found,) = encode(ChatEncoder(TOKENIZER, template), {"messages": CHAT[1:]})
    assert spelled(found)[0] == "[INST] Hi [/INST] Yes?$[INST] 2+2 [/INST] 4$"
    assert ChatEncoder(TOKENIZER, template).identity != ChatEncoder(TOKENIZER).identity


def test_a_model_is_prompted_as_it_was_trained(tokenizer):
    if tokenizer.eos_id is None:
        with pytest.raises(InputError, match="no end-of-sequence token"):
            ChatEncoder(tokenizer)
        return
    encoder = ChatEncoder(tokenizer)
    (found,) = encode(encoder, {"messages": CHAT})
    tokens, answer = found.features
    assert len(tokens) == len(answer)
    last = len(answer) - answer[::-1].index(0)
    assert [*tokenizer.prefix_ids, *tokens[:last]] == encoder.prompt(CHAT[:-1])
    first = answer.index(1)
    assert [*tokenizer.prefix_ids, *tokens[:first]] == encoder.prompt(CHAT[:2])
    assert list(tokens[last:]) == [*tokenizer.encode("4"), tokenizer.eos_id]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": CHAT[:2]}, r"f:1: the conversation has no message of the assistant"),
        ({"messages": "Hi"}, r"f:1: messages must be a list of objects with role and content"),
        ({"messages": [{"role": "user"}]}, r"f:1: message 1 must be an object with role and content, a text"),
        (
            {"messages": [CHAT[0], {"role": "assistent", "content": "x"}]},
            r"f:1: message 2 has role 'assistent'; allowed: system, user, assistant; did you mean 'assistant'\?",
        ),
        (
            {"messages": [{"role": "end", "content": "x"}]},
            r"f:1: message 1 has role 'end'; allowed: system, user, assi",
        ),
        ({"text": "x"}, r"f:1: a conversation needs the column messages, or prompt and response, or instruction and"),
    ],
)
def test_what_is_no_conversation(record, message):
    with pytest.raises(InputError, match=message):
        encode(ChatEncoder(TOKENIZER), record)


@dataclasses.dataclass(frozen=True)
class Cut:
    length: int

    def __call__(self, record):
        return {"text": record["text"][: self.length]}


class Plain:
    def __init__(self, n):
        self.n = n

    def method(self, record):
        return record


class Colour(enum.Enum):
    RED = 1


def closed_over(n):
    def inner(record):
        return inner if n else record  # by its closure it holds itself too

    return inner


def with_default(n):
    def inner(record, k=n):
        return record

    return inner


def test_the_identity_changes_with_every_setting():
    def text(**settings):
        return TextEncoder(TOKENIZER, **settings).identity

    identities = [
        text(),
        text(column="body"),
        text(preprocessors=(Cut(3),)),
        text(preprocessors=(Cut(4),)),
        text(preprocessors=(drop_short,)),
        text(preprocessors=(drop_short, twice)),
        text(preprocessors=(twice, drop_short)),
        TextEncoder(load_tokenizer(FIXTURES / "gpt2")).identity,
        PairEncoder(TOKENIZER).identity,
        PairEncoder(TOKENIZER, prefix="a").identity,
        PairEncoder(TOKENIZER, inputs="a").identity,
        ChatEncoder(TOKENIZER).identity,
    ]
    assert len(set(identities)) == len(identities)
    assert text(preprocessors=(Cut(3), drop_short)) == text(preprocessors=(Cut(3), drop_short))


def test_what_values_are():
    values = [
        *(None, True, 1, 1.0, "1", b"1", (), (1,), (1, 2), {1}, {"a": 1}, {"a": 2}, Colour.RED, re.compile("a")),
        *(drop_short, twice, Cut, Cut(1), Cut(2), Plain(1), Plain(2), Plain(1).method, Plain(2).method, str.lower, len),
        *(functools.partial(drop_short, 1), functools.partial(drop_short, 2), np.zeros(3), np.ones(3)),
        *(closed_over(0), closed_over(1), with_default(0), with_default(1)),
        # Typed in, where there is no source to look at.
        *(eval(f"lambda x: x + {n}") for n in (1, 2)),
    ]
    found = [identity_of(value) for value in values]
    assert len(set(found)) == len(found)
    assert not any(" at 0x" in each for each in found)
    assert found == [identity_of(value) for value in values]
    assert identity_of({"a": 1, "b": 2}) == identity_of({"b": 2, "a": 1})


def test_the_identity_is_the_same_in_every_process():
    program = (
        "import re\n"
        "from t5x_lite.data.encoders import *\n"
        "from t5x_lite.data.tokenizers import ByteTokenizer\n"
        "print(PairEncoder(ByteTokenizer(), (frozenset('abcdef'), str.lower, ChatTemplate('x'))).identity)"
    )
    environment = [{"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    found = {subprocess.check_output([sys.executable, "-c", program], env=each, text=True) for each in environment}
    assert len(found) == 1
    assert found == {PairEncoder(TOKENIZER, (frozenset("abcdef"), str.lower, ChatTemplate("x"))).identity + "\n"}
