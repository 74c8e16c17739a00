"""Tokenizers as Hugging Face model directories hold them.

Three forms: `tokenizer.json`; the vocabulary files of GPT-2, RoBERTa/BART, GPT-1 and BERT, from which the pipelines of
these models are built; and the SentencePiece models of Llama, mBART and XLM-R, whose ids are not those of the model
alone. The ids and texts are those of transformers 5, except where a docstring says otherwise.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.errors import InputError

CONFIG = "tokenizer_config.json"
KIND = "t5x_lite_tokenizer"  # a key that Hugging Face's file of the same name does not have
FAIRSEQ_MODEL = "sentencepiece.bpe.model"

_ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
_BYTE_LEVEL_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# The order is that of the ids: facebook/mbart-large-cc25 has the first 25, facebook/mbart-large-50 all 52.
# fmt: off
_LANGUAGES = [
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN", "it_IT", "ja_XX",
    "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN",
    "zh_CN", "af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK", "ml_IN",
    "mn_MN", "mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN", "th_TH", "tl_XX", "uk_UA",
    "ur_PK", "xh_ZA", "gl_ES", "sl_SI",
]
# fmt: on


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a tokenizer class takes for granted.

    Attributes:
        tokens: the token of each role.
        prefix: the roles put before a text.
        suffix: the roles put after it.
        without: roles that the class does not have, whatever a model's configuration says (T5's may have bos_token_id
            0, which is the pad).
    """

    tokens: Mapping[str, str]
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_BERT = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_ROBERTA = _LLAMA | {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_FAMILIES = {
    "T5Tokenizer": _Family(_T5, (), ("eos",), without=("bos",)),
    "BertTokenizer": _Family(_BERT, ("cls",), ("sep",), without=("bos", "eos")),
    "RobertaTokenizer": _Family(_ROBERTA, ("cls",), ("sep",)),
    "GPT2Tokenizer": _Family(_GPT2),
    "OpenAIGPTTokenizer": _Family({"unk": "<unk>"}),
    "LlamaTokenizer": _Family(_LLAMA, ("bos",), ()),
    "MBartTokenizer": _Family(_ROBERTA),  # the language's code is put in by the class below
    "MBart50Tokenizer": _Family(_ROBERTA),
    "XLMRobertaTokenizer": _Family(_ROBERTA, ("cls",), ("sep",)),
}
_SAME_CLASS = {
    "MT5Tokenizer": "T5Tokenizer",
    "BartTokenizer": "RobertaTokenizer",
    "DistilBertTokenizer": "BertTokenizer",
    "ElectraTokenizer": "BertTokenizer",
    "CodeLlamaTokenizer": "LlamaTokenizer",
}
_MODEL_TYPES = {
    **dict.fromkeys(("t5", "mt5", "umt5"), "T5Tokenizer"),
    **dict.fromkeys(("bert", "distilbert", "electra"), "BertTokenizer"),
    **dict.fromkeys(("roberta", "bart"), "RobertaTokenizer"),
    **dict.fromkeys(("llama", "mistral"), "LlamaTokenizer"),
    "gpt2": "GPT2Tokenizer",
    "openai-gpt": "OpenAIGPTTokenizer",
    "mbart": "MBartTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
_ANY_CLASS = ("", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend")


class ModelDirectory:
    """The small JSON files of a directory that say how its vocabulary is used.

    A tokenizer that was saved by this package is described by its `tokenizer_config.json` alone, so that it does not
    change when it is put next to a model.

    Attributes:
        path: the directory.
        settings: its `tokenizer_config.json`.
        tokenizer_class: as given there, or in `config.json`, or by the model's type; `""` if it is not said.

    Raises:
        InputError: a file that is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = read_json(path / CONFIG)
        names = ("special_tokens_map.json", "added_tokens.json", "config.json", "generation_config.json")
        others = [{} if KIND in self.settings else read_json(path / name) for name in names]
        self._names, self._added, *self._models = others
        self.tokenizer_class = self._class()

    def _class(self) -> str:
        for settings in (self.settings, self._models[0]):
            name = (settings.get("tokenizer_class") or "").removesuffix("Fast")
            if name not in _ANY_CLASS:
                return _SAME_CLASS.get(name, name)
        name = _MODEL_TYPES.get(self._models[0].get("model_type") or "", "")
        is_mbart_50 = name == "MBartTokenizer" and self._models[0].get("vocab_size") == 250054  # and the 25: 250027
        return "MBart50Tokenizer" if is_mbart_50 else name

    @property
    def family(self) -> _Family | None:
        """What the class takes for granted; None for an unknown one."""
        return _FAMILIES.get(self.tokenizer_class)

    @property
    def is_generic(self) -> bool:
        """Whether its class is one that takes `tokenizer.json` as it stands, whatever the model."""
        return (self.settings.get("tokenizer_class") or "") in _ANY_CLASS[1:]

    def token(self, role: str) -> str | dict[str, Any] | None:
        """Returns the token that the files name for `bos`, `eos`, ...: a string, or an object with `content`."""
        found = [names[f"{role}_token"] for names in (self.settings, self._names) if names.get(f"{role}_token")]
        for token in found:  # the object knows more: whether the token takes in the space before it
            if isinstance(token, dict) and _content(token) == _content(found[0]):
                return token
        return found[0] if found else None

    def model_id(self, role: str) -> int | None:
        """Returns the id that `config.json` or `generation_config.json` has for a role; the first of a list."""
        for settings in ({f"{role}_token_id": self.settings.get(f"{KIND}_{role}_id")}, *self._models):
            number = settings.get(f"{role}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int):
                return number
        return None

    def added_tokens(self) -> list[tuple[int | None, dict[str, Any]]]:
        """Returns the tokens that the files add to the vocabulary or call special, with their ids where stated."""
        decoder = self.settings.get("added_tokens_decoder") or {}
        stated = {int(number): token for number, token in decoder.items()}
        known = {_content(token) for token in stated.values()}
        named = [token for role in _ROLES if (token := self.token(role))]
        for settings in (self.settings, self._names):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = settings.get(key) or []
                named += more.values() if isinstance(more, dict) else more
        special = {_content(token) for token in named}
        for content, number in self._added.items():
            if content not in known:
                stated[number] = {"content": content, "special": content in special}
        out: list[tuple[int | None, dict[str, Any]]] = [
            (number, _as_object(stated[number])) for number in sorted(stated)
        ]
        known |= set(self._added)
        for token in named:
            if _content(token) not in known:
                known.add(_content(token))
                out.append((None, {**_as_object(token), "special": True}))
        return out


class HuggingFaceTokenizer:
    """A pipeline of the `tokenizers` library, from `tokenizer.json` or from vocabulary files.

    A literal special token in the text, such as `</s>`, `<|endoftext|>` or `[MASK]`, becomes its id. Decoding leaves
    out special tokens, but writes sentinels as `<extra_id_N>` with one space on either side. Spaces before punctuation
    are cleaned up where `clean_up_tokenization_spaces` of `tokenizer_config.json` says so and the model is not BPE (by
    default they are not; the decoder of WordPiece does it by itself).

    Attributes are those of `t5x_lite.data.tokenizers.Tokenizer`. `eos_id` is None where there is no EOS (GPT-1). BERT
    has `[CLS]` as BOS and `[SEP]` as EOS. Without a pad token `pad_id` is EOS, else the unknown token, else 0.
    """

    def __init__(self, backend: Any, directory: ModelDirectory) -> None:
        """Takes the `tokenizers.Tokenizer` and changes it: it gets the tokens that the directory's files add."""
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        _add_tokens(backend, directory)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        ids = _role_ids(directory, vocabulary.get, self.vocab_size, _model_unknown(backend))
        self.bos_id = ids["bos"] if ids["bos"] is not None else ids["cls"]
        self.eos_id = ids["eos"] if ids["eos"] is not None else ids["sep"]
        self.unk_id = ids["unk"]
        self.mask_id = ids["mask"]
        self.pad_id = _first(ids["pad"], self.eos_id, self.unk_id, 0)
        self.sentinels = _sentinels(vocabulary)
        self._names = {sentinel: f"<extra_id_{n}>" for n, sentinel in enumerate(self.sentinels)}
        self.prefix_ids, self.suffix_ids = _put_around(backend, directory, ids)
        even_bpe = directory.settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        is_bpe = type(backend.model).__name__ == "BPE"
        self._clean = bool(directory.settings.get("clean_up_tokenization_spaces")) and (bool(even_bpe) or not is_bpe)
        self._config = _saved_config(directory, backend, ids)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`; a lone surrogate, which has no UTF-8, becomes `?`.

        Raises:
            InputError: the vocabulary has no unknown token and cannot spell the text.
        """
        return self._encode(lambda: [self._backend.encode(_valid(text), add_special_tokens=False)])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        valid = [_valid(text) for text in texts]
        return self._encode(lambda: self._backend.encode_batch_fast(valid, add_special_tokens=False))

    def _encode(self, encode: Callable[[], list[Any]]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in encode()]
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"this vocabulary cannot tokenise the text: {_line(error)}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        parts = []
        for is_sentinel, run in itertools.groupby(until(self.eos_id, ids), key=self._names.__contains__):
            if is_sentinel:
                parts += [self._names[token] for token in run]
            else:
                known = [token for token in run if 0 <= token < self.vocab_size]
                text = self._backend.decode(known, skip_special_tokens=True)
                parts.append(_clean_up(text) if self._clean else text)
        return " ".join(part for part in parts if part) if len(parts) > 1 else "".join(parts)

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`; `tokenizer.json` and a `tokenizer_config.json` that transformers reads too.

        The class is `PreTrainedTokenizerFast`, with which transformers uses `tokenizer.json` as it stands; the classes
        of the models build a pipeline of their own.
        """
        write_config(directory, self._config)
        (Path(directory) / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")


def load_tokenizer_json(directory: ModelDirectory) -> HuggingFaceTokenizer:
    """Returns the tokenizer of a directory with a `tokenizer.json`; raises InputError if it cannot be read."""
    import tokenizers

    path = directory.path / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"'{path}' is not a tokenizer of the tokenizers library: {_line(error)}") from error
    return HuggingFaceTokenizer(backend, directory)


def vocabulary_files(path: Path) -> tuple[Path, ...]:
    """Returns the vocabulary files of a directory: vocabulary and merges, or `vocab.txt`, or none."""
    for names in (*_BYTE_LEVEL_FILES, ("vocab.txt",)):
        if all((path / name).is_file() for name in names):
            return tuple(path / name for name in names)
    return ()


def load_vocabulary_files(directory: ModelDirectory) -> HuggingFaceTokenizer:
    """Returns the tokenizer of a directory with `vocab.json` and `merges.txt`, or with `vocab.txt`.

    Without a class or a model's type, special tokens tell the models of the former apart: `<mask>` is RoBERTa's and
    BART's, otherwise `<|endoftext|>` is GPT-2's, and pieces that end in `</w>` are GPT-1's. RoBERTa's `<mask>` takes in
    the space before it, as in the published `tokenizer.json` and in fairseq, unless the files say otherwise;
    transformers 5 builds one that does not.

    Raises:
        InputError: a file that cannot be read, or a class whose pipeline is not known.
    """
    files = vocabulary_files(directory.path)
    try:
        if len(files) == 1:
            return HuggingFaceTokenizer(_word_piece(directory, files[0]), directory)
        vocabulary = read_json(files[0])
        directory.tokenizer_class = directory.tokenizer_class or _guess_class(vocabulary, files[0])
        backend = _byte_pair(directory, vocabulary, files)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"'{files[0]}' is not a readable vocabulary: {_line(error)}") from error
    return HuggingFaceTokenizer(backend, directory)


def _word_piece(directory: ModelDirectory, path: Path) -> Any:
    """BERT's pipeline."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    directory.tokenizer_class = directory.tokenizer_class or "BertTokenizer"
    if directory.tokenizer_class != "BertTokenizer":
        raise InputError(f"tokenizer_class '{directory.tokenizer_class}' with '{path.name}': allowed is BertTokenizer")
    with path.open(encoding="utf-8") as lines:
        vocabulary = {line.rstrip("\n"): number for number, line in enumerate(lines)}
    unknown = directory.token("unk") or _BERT["unk"]
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=_content(unknown)))
    settings = directory.settings
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _guess_class(vocabulary: Mapping[str, int], path: Path) -> str:
    if "<mask>" in vocabulary:  # first, because RoBERTa's has GPT-2's token too
        return "RobertaTokenizer"
    if "<|endoftext|>" in vocabulary:
        return "GPT2Tokenizer"
    if any(piece.endswith("</w>") for piece in vocabulary):
        return "OpenAIGPTTokenizer"
    raise InputError(f"'{path}': cannot tell the model; {CONFIG} must give tokenizer_class")


def _byte_pair(directory: ModelDirectory, vocabulary: dict[str, int], files: tuple[Path, ...]) -> Any:
    """The pipelines of GPT-2, RoBERTa/BART and GPT-1."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = directory.tokenizer_class
    if name not in ("GPT2Tokenizer", "RobertaTokenizer", "OpenAIGPTTokenizer"):
        allowed = "GPT2Tokenizer, RobertaTokenizer, BartTokenizer, OpenAIGPTTokenizer (or a tokenizer.json)"
        raise InputError(f"tokenizer_class '{name}' with '{files[0].name}': allowed are {allowed}")
    _, merges = models.BPE.read_file(*map(str, files))
    if name == "OpenAIGPTTokenizer":
        unknown = _content(directory.token("unk") or "<unk>")
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
        return backend
    backend = Tokenizer(models.BPE(vocabulary, merges))
    prefix_space = bool(directory.settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


class LayeredSentencePieceTokenizer:
    """A SentencePiece model with the additional tokens of Llama, mBART or XLM-R.

    Llama keeps the model's ids. mBART and XLM-R have fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the
    pieces, each shifted by one; mBART's 25 (or 52) languages; `<mask>` last. Tokens that the directory's files add
    follow. A literal special token in the text becomes its id; the text between them is encoded stretch by stretch,
    and with Llama only the beginning of a text gets the space that SentencePiece puts before a word, unless `legacy`
    is true. Decoding leaves out special tokens and the unknown token.

    The text itself is encoded exactly as the sentencepiece library does it. transformers 5 does not: it does not
    normalise for mBART-25, and with Llama it does not put a space before a text that already begins with one.

    Attributes are those of `t5x_lite.data.tokenizers.Tokenizer`.

    Raises:
        InputError: no SentencePiece model, no EOS, or an unknown `src_lang`.
    """

    def __init__(self, model: Path, directory: ModelDirectory) -> None:
        self._model = model.read_bytes()
        self._file = model.name
        self._class = directory.tokenizer_class
        self._start = _processor(self._model, model)
        self._fairseq = self._class != "LlamaTokenizer"
        legacy = bool(directory.settings.get("legacy"))
        self._inner = self._start if self._fairseq or legacy else _without_dummy_prefix(self._model)
        self._pieces: int = self._start.get_piece_size() + self._fairseq
        self._languages = {"MBartTokenizer": _LANGUAGES[:25], "MBart50Tokenizer": _LANGUAGES}.get(self._class, [])
        self._added: dict[str, dict[str, Any]] = {}  # by content, with "id"
        self._collect(directory)
        self._by_id = {token["id"]: token for token in self._added.values()}
        self.vocab_size: int = max(self._pieces, *(number + 1 for number in self._by_id))
        self._set_roles(directory)
        self._pattern = _pattern(self._added.values())
        self.sentinels: tuple[int, ...] = ()
        self._config = self._saved_config(directory)

    def _collect(self, directory: ModelDirectory) -> None:
        family = directory.family
        assert family is not None
        if self._fairseq:
            fixed = ["<s>", "<pad>", "</s>", "<unk>"]
            top = [*self._languages, "<mask>"]
            numbers = [*range(4), *range(self._pieces, self._pieces + len(top))]
            for content, number in zip([*fixed, *top], numbers, strict=True):
                # The mask takes in the space before it.
                self._added[content] = {
                    "content": content,
                    "id": number,
                    "special": True,
                    "lstrip": content == "<mask>",
                }
        for token in family.tokens.values():
            self._add(None, {"content": token, "special": True}, append=False)
        for number, token in directory.added_tokens():
            self._add(number, token)

    def _add(self, number: int | None, token: dict[str, Any], append: bool = True) -> None:
        content = token["content"]
        found = self._piece_id(content)
        if found is None:
            found = self._added.get(content, {}).get("id", number)
        if found is None:
            if not append:
                return
            found = max([self._pieces - 1, *(other["id"] for other in self._added.values())]) + 1
        if number is not None and found != number:
            raise InputError(f"added token '{content}' has id {number}, but it is {found} in '{self._file}'")
        self._added[content] = {**self._added.get(content, {}), **token, "id": found}

    def _piece_id(self, piece: str) -> int | None:
        if piece in ("<s>", "<pad>", "</s>", "<unk>") and self._fairseq:
            return self._added[piece]["id"]
        number = self._start.piece_to_id(piece)
        return None if self._start.id_to_piece(number) != piece else number + self._fairseq

    def _set_roles(self, directory: ModelDirectory) -> None:
        ids = _role_ids(directory, lambda token: self._added.get(token, {}).get("id"), self.vocab_size, None)
        if not self._fairseq:  # what the model itself says, where no file does
            for role in ("bos", "eos", "unk", "pad"):
                own = getattr(self._start, f"{role}_id")()
                ids[role] = ids[role] if ids[role] is not None or own < 0 else own
        if ids["eos"] is None:
            raise InputError(f"'{self._file}' has no end-of-sequence piece")
        self.bos_id, self.unk_id, self.mask_id = ids["bos"], ids["unk"], ids["mask"]
        self.eos_id: int | None = ids["eos"]
        self.pad_id: int = _first(ids["pad"], self.eos_id)
        prefix, suffix = _family_around(directory, ids)
        if self._languages:
            self._source = directory.settings.get("src_lang") or "en_XX"
            if self._source not in self._languages:
                raise InputError(f"src_lang '{self._source}': allowed are {', '.join(self._languages)}")
            code = self._added[self._source]["id"]
            prefix, suffix = ((), (self.eos_id, code)) if len(self._languages) == 25 else ((code,), (self.eos_id,))
        self.prefix_ids, self.suffix_ids = _flagged(directory, ids, prefix, suffix)

    def _saved_config(self, directory: ModelDirectory) -> dict[str, object]:
        keep = ("legacy", "src_lang", "add_bos_token", "add_eos_token")
        config: dict[str, object] = {KIND: "layered sentencepiece", "tokenizer_class": self._class}
        config |= {key: directory.settings[key] for key in keep if directory.settings.get(key) is not None}
        contents = {number: token["content"] for number, token in self._by_id.items()}
        for role in ("bos", "eos", "unk", "mask", "pad"):
            number = getattr(self, f"{role}_id")
            if number in contents and (role, number) != ("pad", self.eos_id):
                config[f"{role}_token"] = contents[number]
            elif number is not None and number not in contents:
                config[f"{KIND}_{role}_id"] = number
        above = {n: t for n, t in self._by_id.items() if not self._fairseq or n > self._added["<mask>"]["id"]}
        if above:
            # transformers takes the keys of Hugging Face's AddedToken and no others.
            fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            config["added_tokens_decoder"] = {
                str(n): {field: t.get(field, False) for field in fields} | {"content": t["content"]}
                for n, t in sorted(above.items())
            }
        return config

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = []
        for index, part in enumerate(self._pattern.split(text)):
            if index % 2:
                ids.append(self._added[part.strip() if part not in self._added else part]["id"])
            elif part:
                ids += self._shift((self._start if index == 0 else self._inner).encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        batch = self._start.encode(list(texts))
        return [
            self.encode(text) if self._pattern.search(text) else self._shift(ids)
            for text, ids in zip(texts, batch, strict=True)
        ]

    def _shift(self, ids: list[int]) -> list[int]:
        if not self._fairseq:
            return ids
        unknown = self._start.unk_id()
        return [3 if piece == unknown else piece + 1 for piece in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        special = {number for number, token in self._by_id.items() if token.get("special")} | {self.unk_id, self.pad_id}
        kept = [token for token in until(self.eos_id, ids) if 0 <= token < self.vocab_size and token not in special]
        text = ""
        for is_added, run in itertools.groupby(kept, key=self._by_id.__contains__):
            if is_added:
                text += "".join(self._by_id[token]["content"] for token in run)
            else:
                text += self._decode_pieces([token - self._fairseq for token in run], first=not text)
        return text

    def _decode_pieces(self, pieces: list[int], first: bool) -> str:
        if not self._fairseq:
            return (self._start if first else self._inner).decode(pieces)
        # sentencepiece would drop every space up to the first character, and here only one was put there.
        text = "".join(map(self._start.id_to_piece, pieces)).replace("▁", " ")
        return text.removeprefix(" ") if first else text

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`; the model is written byte for byte, under the name that its class has for it."""
        write_config(directory, self._config)
        (Path(directory) / (FAIRSEQ_MODEL if self._fairseq else "tokenizer.model")).write_bytes(self._model)


def is_layered(directory: ModelDirectory) -> bool:
    """Whether the SentencePiece model of a directory is used as Llama, mBART or XLM-R do."""
    return directory.tokenizer_class in ("LlamaTokenizer", "MBartTokenizer", "MBart50Tokenizer", "XLMRobertaTokenizer")


def until(eos_id: int | None, ids: Iterable[int]) -> Iterator[int]:
    """Yields the ids before the first EOS."""
    return itertools.takewhile(lambda token: token != eos_id, map(int, ids))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, an empty one if there is no file; raises InputError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON") from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is not a JSON object")
    return content


def write_config(directory: str | Path, config: Mapping[str, object]) -> None:
    """Writes `tokenizer_config.json`, and makes the directory."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _processor(model: bytes, path: Path) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise InputError(f"'{path}' is not a readable SentencePiece model") from error
    return processor


def _without_dummy_prefix(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    proto.normalizer_spec.add_dummy_prefix = False
    return _processor(proto.SerializeToString(), Path())


def _pattern(tokens: Iterable[Mapping[str, Any]]) -> re.Pattern[str]:
    # Longest first, as one token may begin with another.
    ordered = sorted(tokens, key=lambda token: -len(token["content"]))
    parts = [
        r"\s*" * bool(token.get("lstrip")) + re.escape(token["content"]) + r"\s*" * bool(token.get("rstrip"))
        for token in ordered
    ]
    return re.compile(f"({'|'.join(parts)})")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _clean_up(text: str) -> str:
    """As `clean_up_tokenization` of transformers."""
    for found in (" .", " ?", " !", " ,"):
        text = text.replace(found, found[1:])
    text = text.replace(" ' ", "'")
    for found in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(found, found[1:])
    return text


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InputError(f"special token {token!r}: must be a string, or an object with a string 'content'")
    return content


def _as_object(token: Any) -> dict[str, Any]:
    return {"special": True, **token} if isinstance(token, dict) else {"content": _content(token), "special": True}


def _first(*candidates: int | None) -> int:
    return next(candidate for candidate in candidates if candidate is not None)


def _sentinels(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    ids = (vocabulary.get(f"<extra_id_{n}>") for n in itertools.count())
    return tuple(token for token in itertools.takewhile(lambda token: token is not None, ids) if token is not None)


def _add_tokens(backend: Any, directory: ModelDirectory) -> None:
    """Makes the tokens of the files, and the special tokens of the class, known as such to the pipeline."""
    from tokenizers import AddedToken

    wanted = directory.added_tokens()
    named = {token["content"] for _, token in wanted}
    for content in dict.fromkeys(directory.family.tokens.values() if directory.family else ()):
        if content not in named and backend.token_to_id(content) is not None:
            lstrip = content == "<mask>"
            wanted.append((None, {"content": content, "special": True, "lstrip": lstrip}))
    # A name alone would reset what the pipeline's own file says about the token, such as that it takes in a space.
    there = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    fields = ("single_word", "lstrip", "rstrip", "normalized")
    news = (token for _, token in wanted if token["content"] not in there or not token.keys().isdisjoint(fields))
    for special, group in itertools.groupby(news, key=lambda token: token["special"]):
        added = [
            AddedToken(
                token["content"],
                special=special,
                **({"normalized": not special} | {field: token[field] for field in fields if field in token}),
            )
            for token in group
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    for number, token in wanted:
        found = backend.token_to_id(token["content"])
        if number is not None and found != number:
            raise InputError(f"added token '{token['content']}' has id {number}, but in the vocabulary it is {found}")


def _model_unknown(backend: Any) -> str | None:
    return getattr(backend.model, "unk_token", None)


def _role_ids(
    directory: ModelDirectory, id_of: Callable[[str], int | None], vocab_size: int, unknown: str | None
) -> dict[str, int | None]:
    """The id of each role: named by a file, else given by the model's configuration, else by the tokenizer's class."""
    family = directory.family
    ids: dict[str, int | None] = dict.fromkeys(_ROLES)
    for role in _ROLES:
        token = directory.token(role)
        if token is not None:
            ids[role] = id_of(_content(token))
            continue
        if family is None or role not in family.without:
            number = directory.model_id(role)
            ids[role] = number if number is not None and 0 <= number < vocab_size else None
        if ids[role] is None and family is not None and role in family.tokens:
            ids[role] = id_of(family.tokens[role])
    if ids["unk"] is None and unknown is not None:
        ids["unk"] = id_of(unknown)
    return ids


def _family_around(directory: ModelDirectory, ids: Mapping[str, int | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    family = directory.family or _Family({})
    prefix, suffix = (
        tuple(number for role in roles if (number := ids[role]) is not None) for roles in (family.prefix, family.suffix)
    )
    return prefix, suffix


def _flagged(
    directory: ModelDirectory, ids: Mapping[str, int | None], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is put around a text after `add_bos_token` and `add_eos_token`, each of which decides about its side."""
    for flag in ("add_bos_token", "add_eos_token"):
        wanted = directory.settings.get(flag)
        number = ids[flag[4:7]]
        if isinstance(wanted, bool) and number is not None:
            side = (number,) if wanted else ()
            prefix, suffix = (side, suffix) if flag == "add_bos_token" else (prefix, side)
    return prefix, suffix


def _put_around(
    backend: Any, directory: ModelDirectory, ids: Mapping[str, int | None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns prefix and suffix, and gives the pipeline a post-processor that says the same."""
    processor = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else None
    stated = ((), ()) if directory.is_generic else _family_around(directory, ids)
    stated = _processor_around(processor) if processor else stated
    around = _flagged(directory, ids, *stated)
    if processor is None or around != stated:
        backend.post_processor = _template(backend, *around)
    return around


def _processor_around(processor: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reads the JSON of a post-processor."""
    kind = processor["type"]
    if kind == "Sequence":  # each works on the result of the one before
        both = [_processor_around(inner) for inner in processor["processors"]]
        return (
            tuple(itertools.chain.from_iterable(prefix for prefix, _ in reversed(both))),
            tuple(itertools.chain.from_iterable(suffix for _, suffix in both)),
        )
    if kind in ("RobertaProcessing", "BertProcessing"):
        return (processor["cls"][1],), (processor["sep"][1],)
    if kind != "TemplateProcessing":  # ByteLevel, which is about offsets
        return (), ()
    sides: tuple[list[int], list[int]] = ([], [])
    passed = 0
    for item in processor["single"]:
        if "Sequence" in item:
            passed = 1
        else:
            sides[passed].extend(processor["special_tokens"][item["SpecialToken"]["id"]]["ids"])
    return tuple(sides[0]), tuple(sides[1])


def _template(backend: Any, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Any:
    from tokenizers import processors

    names = functools.partial(map, backend.id_to_token)
    before, after = list(names(prefix)), list(names(suffix))
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=sorted({*zip(before, prefix, strict=True), *zip(after, suffix, strict=True)}),
    )


def _token_object(token: Any) -> object:
    """A token as transformers writes it: its content alone would mean that it takes in no spaces."""
    fields = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    if not any(fields.values()):
        return token.content
    return {"__type": "AddedToken", "content": token.content, **fields, "special": True}


def _saved_config(directory: ModelDirectory, backend: Any, ids: Mapping[str, int | None]) -> dict[str, object]:
    settings = directory.settings
    config: dict[str, object] = {KIND: "huggingface", "tokenizer_class": "PreTrainedTokenizerFast"}
    for key in (
        "clean_up_tokenization_spaces",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        "model_max_length",
        "model_input_names",
        "padding_side",
    ):
        if settings.get(key) is not None:
            config[key] = settings[key]
    if directory.tokenizer_class == "BertTokenizer":
        config.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    special = {number: token for number, token in backend.get_added_tokens_decoder().items() if token.special}
    for role, number in ids.items():
        if number in special:
            config[f"{role}_token"] = _token_object(special[number])
        elif number is not None and role != "unk":
            # Naming it would make it special, which it is not.
            config[f"{KIND}_{role}_id"] = number
    return config
