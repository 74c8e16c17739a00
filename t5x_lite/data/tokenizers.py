"""Tokenizers: SentencePiece vocabularies, raw bytes, and the training of new vocabularies."""

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from t5x_lite.data.huggingface_tokenizers import (
    VOCABULARY_FILES,
    load_tokenizer_json,
    load_vocabulary_files,
    vocabulary_files,
)
from t5x_lite.data.layered_sentencepiece import (
    FAIRSEQ_MODEL,
    LAYERED_CLASSES,
    LayeredSentencePieceTokenizer,
    piece_bytes,
    piece_id,
    sentencepiece_processor,
    sentencepiece_proto,
)
from t5x_lite.data.tokenizer_files import (
    CONFIG,
    KIND,
    ModelDirectory,
    OneLanguage,
    decode_runs,
    native_threads,
    sentinel_names,
    until,
    valid_text,
    valid_texts,
    write_config,
)
from t5x_lite.errors import InputError, nearest

_MODEL_NAMES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
# "" for a directory that does not say: sentencepiece alone, as Google's own directories are.
_SENTENCEPIECE_CLASSES = ("", "T5Tokenizer", *LAYERED_CLASSES)
_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]{0,4})>")
# 1000 characters stay under SentencePiece's limit of 4192 bytes a sentence, above which it drops the sentence.
_SENTENCE = re.compile(r".{1,1000}(?=\s|\Z)|.{1,1000}", re.DOTALL)


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: every id is below it; it counts the sentinels.
        pad_id: EOS, where the vocabulary has no pad token.
        eos_id: None where the vocabulary has none, as GPT-1's; see `require_eos`.
        unk_id: None where the vocabulary has none.
        bos_id: likewise.
        mask_id: likewise; the mask of a masked language model.
        sentinels: the ids of `<extra_id_0>`, `<extra_id_1>`, ... in this order; empty where there are none.
        prefix_ids: what models with this tokenizer expect before a text: BART's and Llama's BOS, BERT's `[CLS]`.
        suffix_ids: what they expect after it: the EOS of T5 and BART, BERT's `[SEP]`, mBART's EOS and language.
    """

    vocab_size: int
    pad_id: int
    eos_id: int | None
    unk_id: int | None
    bos_id: int | None
    mask_id: int | None
    sentinels: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    @property
    def target_affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prefix and suffix of a target: those of any text, but for mBART, which has the code of `tgt_lang` there."""
        ...

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token as the vocabulary spells it (`</s>`, `[MASK]`, a piece), or of `<extra_id_N>`.

        None where there is no such token.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without prefix and suffix; a literal `<extra_id_N>` becomes its sentinel."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of every text, faster than one by one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first EOS, sentinels as `<extra_id_N>`; padding and unknown ids are left out."""
        ...

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each id adds to a text that has begun, `vocab_size` of them.

        Those of a text's ids in a row are the UTF-8 of what `decode` returns, up to spaces at its ends, around a
        sentinel and, where they are cleaned up, around punctuation. They are empty for ids that are left out.

        Raises:
            InputError: a `tokenizer.json` with a decoder whose tokens cannot be told apart.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the files from which `load_tokenizer(directory)` rebuilds this tokenizer exactly.

        transformers' AutoTokenizer reads them too, where it has such a tokenizer.
        """
        ...


class SentencePieceTokenizer(OneLanguage):
    """A SentencePiece model with T5's sentinels.

    If the model itself has the pieces `<extra_id_0>`, ... these are the sentinels, and `extra_ids` is not used;
    otherwise `extra_ids` ids are added on top, descending: with T5's 32,000 pieces `<extra_id_0>` is 32,099. The text
    between sentinels is encoded stretch by stretch, and decoded with one space on either side of a sentinel.
    A model without a pad piece pads with EOS. A literal control piece such as `</s>` stays text, as with sentencepiece
    itself; transformers makes it the EOS.

    Raises:
        InputError: if the file is missing, is no SentencePiece model, or has no EOS piece.
    """

    mask_id: int | None = None
    prefix_ids: tuple[int, ...] = ()

    def __init__(self, model_path: str | Path, extra_ids: int = 100) -> None:
        if extra_ids < 0:
            raise InputError(f"extra_ids {extra_ids}: must be 0 or more")
        try:
            self._model = Path(model_path).read_bytes()
        except OSError as error:
            raise InputError(f"'{model_path}' is not a readable SentencePiece model") from error
        self._processor = sentencepiece_processor(self._model, model_path)
        self._pieces = self._processor.get_piece_size()
        self.sentinels = self._own_sentinels()
        if not self.sentinels:
            self.sentinels = tuple(range(self._pieces + extra_ids - 1, self._pieces - 1, -1))
        self.vocab_size = max(self._pieces, *(sentinel + 1 for sentinel in self.sentinels), 0)
        self.unk_id: int | None = self._processor.unk_id()
        eos_id: int = self._processor.eos_id()
        if eos_id < 0:
            raise InputError(f"'{model_path}' has no end-of-sequence piece; train the vocabulary with one")
        self.eos_id: int | None = eos_id
        self.suffix_ids = (eos_id,)
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else eos_id
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self._config = self._new_config()

    def _own_sentinels(self) -> tuple[int, ...]:
        # Google's cc_all vocabularies with extra ids spell them with the word-start mark.
        for prefix in ("", "▁"):
            ids = (self._processor.piece_to_id(f"{prefix}<extra_id_{n}>") for n in itertools.count())
            found = tuple(itertools.takewhile(lambda piece: piece != self._processor.unk_id(), ids))
            if found:
                return found
        return ()

    def _new_config(self) -> dict[str, object]:
        # Sentinels of the model's own are found again in the model.
        config: dict[str, object] = {KIND: "sentencepiece", "extra_ids": self.vocab_size - self._pieces}
        proto = sentencepiece_proto(self._model)
        is_unigram = (
            proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM and not proto.trainer_spec.byte_fallback
        )
        if is_unigram and (self.pad_id, self.eos_id, self.unk_id) == (0, 1, 2):
            special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
            config |= {"tokenizer_class": "T5Tokenizer", **special}
        return config

    def keep_config(self, config: dict[str, Any]) -> None:
        """Makes `save` write this `tokenizer_config.json`, so that a directory saved again stays as it was."""
        self._config = dict(config)

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer.id_of`."""
        sentinel = _sentinel(token, self.sentinels)
        return piece_id(self._processor, token) if sentinel is None else sentinel

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = []
        for segment in _segments(valid_text(text), self.sentinels):
            ids += [segment] if isinstance(segment, int) else self._processor.encode(segment)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        batch = self._processor.encode(valid_texts(texts), num_threads=native_threads())
        return [self.encode(text) if "<extra_id_" in text else ids for text, ids in zip(texts, batch, strict=True)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode_batch` as int32 arrays, a sixth faster for long texts: no object is made of every id."""
        valid = valid_texts(texts)
        try:
            batch = self._processor.encode(valid, num_threads=native_threads(), return_type="numpy")
        except (TypeError, ValueError):  # sentencepiece before 0.2.2
            return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]
        for number, text in enumerate(texts):
            if "<extra_id_" in text:
                batch[number] = np.array(self.encode(text), np.int32)
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return decode_runs(ids, self.eos_id, self.sentinels, self._decode_run)

    def _decode_run(self, ids: list[int]) -> str:
        return self._processor.decode([token for token in ids if 0 <= token < self._pieces])

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`."""
        out = [*piece_bytes(self._processor), *[b""] * (self.vocab_size - self._pieces)]
        for token, name in sentinel_names(self.sentinels).items():
            out[token] = name.encode()
        return out

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`; the model is written byte for byte as `spiece.model`.

        transformers reads unigram models with T5's ids, which are the only ones that its T5Tokenizer encodes alike.
        """
        write_config(directory, self._config)
        (Path(directory) / _MODEL_NAMES[0]).write_bytes(self._model)


class ByteTokenizer(OneLanguage):
    """ByT5's vocabulary (Xue et al. 2022): pad 0, EOS 1, unknown 2, byte b at b + 3; no file, no unknown text.

    The sentinels count down from 258. They are the ids of the bytes 0xFF to 0xF5, which UTF-8 never uses.
    """

    vocab_size = 259
    pad_id = 0
    eos_id: int | None = 1
    unk_id: int | None = 2
    bos_id: int | None = None
    mask_id: int | None = None
    sentinels: tuple[int, ...] = tuple(range(258, 247, -1))
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = (1,)

    def __init__(self) -> None:
        # transformers has its sentinels above the bytes, where this vocabulary ends.
        self._config: dict[str, object] = {KIND: "bytes", "tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}

    def keep_config(self, config: dict[str, Any]) -> None:
        """See `SentencePieceTokenizer.keep_config`."""
        self._config = dict(config)

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer.id_of`; `<pad>`, `</s>` and `<unk>` as ByT5 has them, and characters of one byte."""
        sentinel = _sentinel(token, self.sentinels)
        if sentinel is not None or len(token) != 1:
            return {"<pad>": 0, "</s>": 1, "<unk>": 2}.get(token, sentinel)
        return ord(token) + 3 if token.isascii() else None

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`; a lone surrogate, which has no UTF-8, becomes `?`."""
        ids: list[int] = []
        for segment in _segments(text, self.sentinels):
            ids += [segment] if isinstance(segment, int) else [byte + 3 for byte in segment.encode(errors="replace")]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; bytes that are not UTF-8 are left out."""
        pieces = self.token_bytes()
        kept = (token for token in until(self.eos_id, ids) if 0 <= token < self.vocab_size)
        return b"".join(pieces[token] for token in kept).decode(errors="ignore")

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`."""
        names = sentinel_names(self.sentinels)
        return [b"", b"", b"", *(names[n + 3].encode() if n + 3 in names else bytes([n]) for n in range(256))]

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        write_config(directory, self._config)


class NoTokenizer(InputError):
    """A directory without any of the files that tokenizers are kept in."""


def load_tokenizer(spec: str | Path, extra_ids: int = 100) -> Tokenizer:
    """Loads a tokenizer.

    Of a directory with several forms of one tokenizer the SentencePiece model is used, then `tokenizer.json`, then the
    vocabulary files: the first is the original, of which `tokenizer.json` is a conversion that differs from it in
    whitespace and rare characters, and the files leave the most to be assumed. Only where the directory names a class
    that is none of the SentencePiece ones here does `tokenizer.json` come first, because such a class may have other
    ids than the SentencePiece model.

    Args:
        spec: `bytes`; a SentencePiece `.model` file; a `tokenizer.json`, or one of the files of a vocabulary with those
            that it needs beside it; or a directory that `save` wrote, or that holds what Hugging Face model directories
            do: `spiece.model`, `sentencepiece.model`, `tokenizer.model`, `sentencepiece.bpe.model` or a single other
            `.model` file; `tokenizer.json`; `vocab.json` and `merges.txt` (or `encoder.json` and `vocab.bpe`);
            `vocab.txt`; or only a `tokenizer_config.json` with ByT5's class.
        extra_ids: how many sentinels to add to a SentencePiece model that has none; a directory's
            `tokenizer_config.json` takes precedence. Llama and mBART get none.

    Raises:
        InputError: if there is no tokenizer at `spec`, or it cannot be read.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_file():
        return _load_file(path, extra_ids)
    if not path.is_dir():
        hint = nearest(str(spec), ["bytes"])
        raise InputError(
            f"no tokenizer at '{spec}'; allowed: 'bytes', a SentencePiece .model file, a tokenizer.json, a vocab.txt,"
            f" a directory{hint}"
        )
    directory = ModelDirectory(path)
    if directory.settings.get(KIND) == "bytes" or directory.tokenizer_class == "ByT5Tokenizer":
        return _keeping(ByteTokenizer(), directory)
    model = _sentencepiece_model(path)
    has_json = (path / "tokenizer.json").is_file()
    # What was saved here as tokenizer.json, perhaps over something else.
    prefers_json = directory.settings.get(KIND) == "huggingface"
    if model and model.name == FAIRSEQ_MODEL:  # of many classes, with ids of their own
        prefers_json |= directory.tokenizer_class not in LAYERED_CLASSES
    if model and not (has_json and (prefers_json or directory.tokenizer_class not in _SENTENCEPIECE_CLASSES)):
        return _load_sentencepiece(model, directory, extra_ids)
    if has_json:
        return load_tokenizer_json(directory)
    if vocabulary_files(path):
        return load_vocabulary_files(directory)
    names = ", ".join((*_MODEL_NAMES, FAIRSEQ_MODEL))
    found = ", ".join(file.name for file in sorted(path.glob("*.model"))) or "none"
    raise NoTokenizer(
        f"'{spec}' must hold {names} or one other .model file (it holds: {found}), "
        "or tokenizer.json, vocab.json and merges.txt, or vocab.txt"
    )


def _load_file(path: Path, extra_ids: int) -> Tokenizer:
    for names in VOCABULARY_FILES:
        if path.name in names:
            if not vocabulary_files(path.parent, path.name):
                raise InputError(
                    f"'{path}' is not a tokenizer by itself: {' and '.join(names)} belong in one directory"
                )
            return load_vocabulary_files(ModelDirectory(path.parent), path.name)
    if path.suffix == ".json":
        return load_tokenizer_json(ModelDirectory(path.parent), path.name)
    return SentencePieceTokenizer(path, extra_ids)


def find_tokenizer(directory: str | Path) -> Tokenizer | None:
    """Loads the tokenizer of a directory; None if it holds none. One that cannot be read is an InputError all the same.

    Args:
        directory: as for `load_tokenizer`; need not exist.
    """
    if not Path(directory).expanduser().is_dir():
        return None
    try:
        return load_tokenizer(directory)
    except NoTokenizer:
        return None


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the special ids that a tokenizer has, by name: `pad`, `eos`, `unk`, `bos`, `mask`, `<extra_id_0>`, ..."""
    roles = {role: getattr(tokenizer, f"{role}_id") for role in ("pad", "eos", "unk", "bos", "mask")}
    found = {role: number for role, number in roles.items() if number is not None}
    return found | {name: number for number, name in sentinel_names(tokenizer.sentinels).items()}


def require_eos(tokenizer: Tokenizer) -> int:
    """Returns the id of EOS; raises InputError if the vocabulary has none."""
    if tokenizer.eos_id is None:
        raise InputError("this tokenizer has no end-of-sequence token; name one as eos_token in tokenizer_config.json")
    return tokenizer.eos_id


def _sentencepiece_model(path: Path) -> Path | None:
    models = [path / name for name in (*_MODEL_NAMES, FAIRSEQ_MODEL) if (path / name).is_file()]
    models = models or sorted(path.glob("*.model"))
    return models[0] if models and (len(models) == 1 or models[0].name in (*_MODEL_NAMES, FAIRSEQ_MODEL)) else None


def _load_sentencepiece(model: Path, directory: ModelDirectory, extra_ids: int) -> Tokenizer:
    if directory.tokenizer_class in LAYERED_CLASSES:
        return LayeredSentencePieceTokenizer(model, directory)
    if model.name == FAIRSEQ_MODEL:
        raise InputError(
            f"'{model}' needs a {CONFIG} whose tokenizer_class is MBartTokenizer, MBart50Tokenizer or "
            f"XLMRobertaTokenizer, not '{directory.tokenizer_class}': the file does not say what its ids are"
        )
    extra_ids = directory.settings.get("extra_ids", extra_ids)
    if not isinstance(extra_ids, int):
        raise InputError(f"extra_ids {extra_ids!r} in '{directory.path / CONFIG}': must be an integer")
    return _keeping(SentencePieceTokenizer(model, extra_ids), directory)


def _keeping(tokenizer: SentencePieceTokenizer | ByteTokenizer, directory: ModelDirectory) -> Tokenizer:
    if KIND in directory.settings:
        tokenizer.keep_config(directory.settings)
    return tokenizer


def train_sentencepiece(
    texts: Iterable[str],
    output: str | Path,
    vocab_size: int,
    model_type: Literal["unigram", "bpe", "char", "word"] = "unigram",
    extra_ids: int = 100,
    byte_fallback: bool = False,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Trains a vocabulary laid out as T5's: pad 0, EOS 1, unknown 2, no BOS, and the sentinels on top.

    The same texts give the same bytes. All texts are held in memory; lines longer than 1000 characters are divided.

    Args:
        texts: the corpus.
        output: the `.model` file to write; it holds the sentinels too and needs no other file.
        vocab_size: the final size, sentinels included. A corpus with fewer different pieces gives a smaller vocabulary.
        model_type: SentencePiece's algorithm.
        extra_ids: the number of sentinels; `<extra_id_0>` gets the last id.
        byte_fallback: whether characters outside the vocabulary are spelled in bytes (256 pieces) rather than unknown.
        character_coverage: the fraction of the corpus's characters that the vocabulary must cover, in [0.98, 1].

    Raises:
        InputError: for an empty corpus, or a value that SentencePiece refuses (such as a vocabulary too small for the
            characters of the corpus).
    """
    import sentencepiece

    _check_training(vocab_size, model_type, extra_ids, byte_fallback, character_coverage)
    # A list, because SentencePiece swallows an exception raised by its iterator.
    lines = (line for text in texts for line in text.splitlines())
    sentences = [part for line in lines for part in _SENTENCE.findall(line) if part.strip()]
    if not sentences:
        raise InputError("no text to train a vocabulary on: every line is blank")
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=trained,
            vocab_size=vocab_size - extra_ids,
            model_type=model_type,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            num_threads=4,  # a constant: the order of its sums, and so the result, follows the number of threads
            minloglevel=3,
        )
    except (OSError, RuntimeError) as error:
        reason = " ".join((str(error).rsplit("] ", 1)[-1] or str(error)).split())
        raise InputError(f"cannot train vocab_size {vocab_size} ({extra_ids} of them sentinels): {reason}") from error
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_bytes(_with_sentinels(trained.getvalue(), extra_ids))
    return SentencePieceTokenizer(output, extra_ids)


def _check_training(
    vocab_size: int, model_type: str, extra_ids: int, byte_fallback: bool, character_coverage: float
) -> None:
    if model_type not in ("unigram", "bpe", "char", "word"):
        raise InputError(f"model_type '{model_type}': allowed are unigram, bpe, char, word")
    if byte_fallback and model_type == "word":
        raise InputError("byte_fallback with model_type 'word': SentencePiece cannot decode such words; use 'unigram'")
    if not 0.98 <= character_coverage <= 1:
        raise InputError(f"character_coverage {character_coverage}: must be from 0.98 to 1")
    smallest = 4 + extra_ids + 256 * byte_fallback
    if extra_ids < 0 or vocab_size < smallest:
        raise InputError(f"vocab_size {vocab_size} with extra_ids {extra_ids}: needs at least {smallest} pieces")


def _with_sentinels(model: bytes, extra_ids: int) -> bytes:
    proto = sentencepiece_proto(model)
    # Added afterwards, because SentencePiece itself puts user-defined pieces at the bottom of the vocabulary.
    for n in reversed(range(extra_ids)):
        proto.pieces.add(piece=f"<extra_id_{n}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def _sentinel(token: str, sentinels: tuple[int, ...]) -> int | None:
    match = _SENTINEL.fullmatch(token)
    return sentinels[int(match[1])] if match and int(match[1]) < len(sentinels) else None


def _segments(text: str, sentinels: tuple[int, ...]) -> Iterator[str | int]:
    """Yields the text between sentinels as it stands, and the id of each `<extra_id_N>` that the vocabulary has."""
    done = 0
    for match in _SENTINEL.finditer(text):
        if int(match[1]) < len(sentinels):
            yield text[done : match.start()]
            yield sentinels[int(match[1])]
            done = match.end()
    yield text[done:]
