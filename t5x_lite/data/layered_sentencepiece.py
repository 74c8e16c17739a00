"""SentencePiece models whose ids are not those of the model alone: Llama's, mBART's and XLM-R's."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from t5x_lite.data.tokenizer_files import (
    KIND,
    ModelDirectory,
    family_around,
    flagged,
    native_threads,
    role_ids,
    until,
    valid_text,
    valid_texts,
    write_config,
)
from t5x_lite.errors import InputError

FAIRSEQ_MODEL = "sentencepiece.bpe.model"
LAYERED_CLASSES = ("LlamaTokenizer", "MBartTokenizer", "MBart50Tokenizer", "XLMRobertaTokenizer")

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
        self._start = sentencepiece_processor(self._model, model)
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
        number = piece_id(self._start, piece)
        return None if number is None else number + self._fairseq

    def _set_roles(self, directory: ModelDirectory) -> None:
        ids = role_ids(directory, lambda token: self._added.get(token, {}).get("id"), self.vocab_size, None)
        if not self._fairseq:  # what the model itself says, where no file does
            for role in ("bos", "eos", "unk", "pad"):
                own = getattr(self._start, f"{role}_id")()
                ids[role] = ids[role] if ids[role] is not None or own < 0 else own
        if ids["eos"] is None:
            raise InputError(f"'{self._file}' has no end-of-sequence piece")
        self.bos_id, self.unk_id, self.mask_id = ids["bos"], ids["unk"], ids["mask"]
        self.eos_id: int | None = ids["eos"]
        self.pad_id: int = ids["pad"] if ids["pad"] is not None else self.eos_id
        source = target = family_around(directory, ids)
        if self._languages:
            settings = directory.settings
            source = self._language_affixes("src_lang", settings.get("src_lang") or "en_XX")
            target = self._language_affixes("tgt_lang", settings["tgt_lang"]) if settings.get("tgt_lang") else source
        self.prefix_ids, self.suffix_ids = flagged(directory, ids, *source)
        self.target_affixes = flagged(directory, ids, *target)

    def _language_affixes(self, setting: str, language: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if language not in self._languages:
            raise InputError(f"{setting} '{language}': allowed are {', '.join(self._languages)}")
        code, eos = self._added[language]["id"], cast(int, self.eos_id)
        return ((), (eos, code)) if len(self._languages) == 25 else ((code,), (eos,))

    def _saved_config(self, directory: ModelDirectory) -> dict[str, object]:
        keep = ("legacy", "src_lang", "tgt_lang", "add_bos_token", "add_eos_token")
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

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer.id_of`."""
        return self._added[token]["id"] if token in self._added else self._piece_id(token)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = []
        for index, part in enumerate(self._pattern.split(valid_text(text))):
            if index % 2:
                ids.append(self._added[part.strip() if part not in self._added else part]["id"])
            elif part:
                ids += self._shift((self._start if index == 0 else self._inner).encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        batch = self._start.encode(valid_texts(texts), num_threads=native_threads())
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
        left_out = self._left_out()
        kept = [token for token in until(self.eos_id, ids) if 0 <= token < self.vocab_size and token not in left_out]
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

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`."""
        out = [b""] * self._fairseq + piece_bytes(self._start)
        out += [b""] * (self.vocab_size - len(out))
        for number, token in self._by_id.items():
            out[number] = token["content"].encode()
        for number in self._left_out() | {cast(int, self.eos_id)}:
            out[number] = b""
        return out

    def _left_out(self) -> set[int]:
        special = {number for number, token in self._by_id.items() if token.get("special")}
        return special | {number for number in (self.unk_id, self.pad_id) if number is not None}

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`; the model is written byte for byte, under the name that its class has for it."""
        write_config(directory, self._config)
        (Path(directory) / (FAIRSEQ_MODEL if self._fairseq else "tokenizer.model")).write_bytes(self._model)


def sentencepiece_processor(model: bytes, path: str | Path) -> Any:
    """Returns the processor of a SentencePiece model; raises InputError, which names the path, if it is not one."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise InputError(f"'{path}' is not a readable SentencePiece model") from error
    return processor


def piece_bytes(processor: Any) -> list[bytes]:
    """Returns what each piece of a SentencePiece model adds to a text, as in `Tokenizer.token_bytes`."""

    def text(piece: int) -> bytes:
        name: str = processor.id_to_piece(piece)
        if processor.is_control(piece):
            return b""
        if processor.is_byte(piece):  # <0x0A>
            return bytes.fromhex(name[3:5])
        return processor.decode([piece]).encode() if processor.is_unknown(piece) else name.replace("▁", " ").encode()

    return [text(piece) for piece in range(processor.get_piece_size())]


def piece_id(processor: Any, piece: str) -> int | None:
    """Returns the id of a piece of a SentencePiece model; None if it has no such piece."""
    number: int = processor.piece_to_id(piece)  # the unknown one's where there is none
    return number if processor.id_to_piece(number) == piece else None


def sentencepiece_proto(model: bytes) -> Any:
    """Returns the `ModelProto` of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]


def _without_dummy_prefix(model: bytes) -> Any:
    proto = sentencepiece_proto(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece_processor(proto.SerializeToString(), Path())


def _pattern(tokens: Iterable[Mapping[str, Any]]) -> re.Pattern[str]:
    # Longest first, as one token may begin with another.
    ordered = sorted(tokens, key=lambda token: -len(token["content"]))
    parts = [
        r"\s*" * bool(token.get("lstrip")) + re.escape(token["content"]) + r"\s*" * bool(token.get("rstrip"))
        for token in ordered
    ]
    return re.compile(f"({'|'.join(parts)})")
