"""Tokenizers of the `tokenizers` library: from `tokenizer.json`, or built from the vocabulary files of GPT-2,
RoBERTa/BART, GPT-1 and BERT.

The ids and texts are those of transformers 5, except where a docstring says otherwise.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.data.tokenizer_files import (
    BERT_TOKENS,
    CONFIG,
    KIND,
    ModelDirectory,
    OneLanguage,
    decode_runs,
    family_around,
    flagged,
    read_json,
    role_ids,
    sentinel_names,
    token_content,
    valid_text,
    valid_texts,
    write_config,
)
from t5x_lite.errors import InputError

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("vocab.txt",))


class HuggingFaceTokenizer(OneLanguage):
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
        ids = role_ids(directory, vocabulary.get, self.vocab_size, _model_unknown(backend))
        self.bos_id = ids["bos"] if ids["bos"] is not None else ids["cls"]
        self.eos_id = ids["eos"] if ids["eos"] is not None else ids["sep"]
        self.unk_id = ids["unk"]
        self.mask_id = ids["mask"]
        self.pad_id = _first(ids["pad"], self.eos_id, self.unk_id, 0)
        self.sentinels = _sentinels(vocabulary)
        self.prefix_ids, self.suffix_ids = _put_around(backend, directory, ids)
        even_bpe = directory.settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        is_bpe = type(backend.model).__name__ == "BPE"
        self._clean = bool(directory.settings.get("clean_up_tokenization_spaces")) and (bool(even_bpe) or not is_bpe)
        self._config = _saved_config(directory, backend, ids)

    def id_of(self, token: str) -> int | None:
        """See `Tokenizer.id_of`."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`; a lone surrogate, which has no UTF-8, becomes `?`.

        Raises:
            InputError: the vocabulary has no unknown token and cannot spell the text.
        """
        return self._encode(lambda: [self._backend.encode(valid_text(text), add_special_tokens=False)])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        valid = valid_texts(texts)
        return self._encode(lambda: self._backend.encode_batch_fast(valid, add_special_tokens=False))

    def _encode(self, encode: Callable[[], list[Any]]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in encode()]
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"this vocabulary cannot tokenise the text: {_line(error)}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return decode_runs(ids, self.eos_id, self.sentinels, self._decode_run)

    def _decode_run(self, ids: list[int]) -> str:
        known = [token for token in ids if 0 <= token < self.vocab_size]
        text = self._backend.decode(known, skip_special_tokens=True)
        return _clean_up(text) if self._clean else text

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`."""
        names = sentinel_names(self.sentinels)
        added = self._backend.get_added_tokens_decoder()
        left_out = {self.eos_id, *(number for number, token in added.items() if token.special)} - names.keys()
        spell = _speller(self._backend.decoder)

        def text(number: int) -> bytes:
            if number in names:
                return names[number].encode()
            token = None if number in left_out else self._backend.id_to_token(number)
            spelled = b"" if token is None else spell(token)
            part = "surrogateescape"  # of a character
            return _clean_up(spelled.decode(errors=part)).encode(errors=part) if self._clean else spelled

        return [text(number) for number in range(self.vocab_size)]

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`; `tokenizer.json` and a `tokenizer_config.json` that transformers reads too.

        The class is `PreTrainedTokenizerFast`, with which transformers uses `tokenizer.json` as it stands; the classes
        of the models build a pipeline of their own.
        """
        write_config(directory, self._config)
        (Path(directory) / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")


def load_tokenizer_json(directory: ModelDirectory, name: str = "tokenizer.json") -> HuggingFaceTokenizer:
    """Returns the tokenizer of a directory with such a file; raises InputError if it cannot be read."""
    import tokenizers

    path = directory.path / name
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"'{path}' is not a tokenizer of the tokenizers library: {_line(error)}") from error
    return HuggingFaceTokenizer(backend, directory)


def vocabulary_files(path: Path, named: str = "") -> tuple[Path, ...]:
    """Returns the vocabulary files of a directory: vocabulary and merges, or `vocab.txt`; only those with `named`."""
    for names in VOCABULARY_FILES:
        if all((path / name).is_file() for name in names) and (not named or named in names):
            return tuple(path / name for name in names)
    return ()


def load_vocabulary_files(directory: ModelDirectory, named: str = "") -> HuggingFaceTokenizer:
    """Returns the tokenizer of a directory with `vocab.json` and `merges.txt`, or with `vocab.txt`; of those `named`.

    Without a class or a model's type, special tokens tell the models of the former apart: `<mask>` is RoBERTa's and
    BART's, otherwise `<|endoftext|>` is GPT-2's, and pieces that end in `</w>` are GPT-1's. RoBERTa's `<mask>` takes in
    the space before it, as in the published `tokenizer.json` and in fairseq, unless the files say otherwise;
    transformers 5 builds one that does not.

    Raises:
        InputError: a file that cannot be read, or a class whose pipeline is not known.
    """
    files = vocabulary_files(directory.path, named)
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
    unknown = directory.token("unk") or BERT_TOKENS["unk"]
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=token_content(unknown)))
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
        unknown = token_content(directory.token("unk") or "<unk>")
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _clean_up(text: str) -> str:
    """As `clean_up_tokenization` of transformers."""
    for found in (" .", " ?", " !", " ,"):
        text = text.replace(found, found[1:])
    text = text.replace(" ' ", "'")
    for found in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(found, found[1:])
    return text


def _speller(decoder: Any) -> Callable[[str], bytes]:
    """Returns a function that gives the bytes a token adds to a text, after the type of the pipeline's decoder."""
    kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
    if kinds - {"ByteLevel", "WordPiece", "BPEDecoder", "Metaspace", "ByteFallback", "Replace", "Fuse", "Strip"}:
        raise InputError(f"what a token adds to a text is not known for the decoder {', '.join(sorted(kinds))}")
    if "ByteLevel" in kinds:
        return _byte_level
    decode: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode
    end = decode(["a", "b"])[1:]

    def spell(token: str) -> bytes:
        if "ByteFallback" in kinds and _BYTE.fullmatch(token):
            return bytes.fromhex(token[3:5])
        # The text between two others, as decoders treat the first and the last token in a way of their own.
        return decode(["a", token, "b"])[1:].removesuffix(end).encode()

    return spell


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    inner = decoder.get("decoders")
    return {decoder["type"]} if inner is None else set().union(*map(_kinds, inner))


def _byte_level(token: str) -> bytes:
    alphabet = _byte_alphabet()
    # A token that was added is spelled as it stands.
    return bytes(map(alphabet.__getitem__, token)) if alphabet.keys() >= set(token) else token.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The character by which GPT-2 writes each byte: itself if it is visible, else the next one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


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


def _put_around(
    backend: Any, directory: ModelDirectory, ids: Mapping[str, int | None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns prefix and suffix, and gives the pipeline a post-processor that says the same."""
    processor = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else None
    stated = ((), ()) if directory.is_generic else family_around(directory, ids)
    stated = _processor_around(processor) if processor else stated
    around = flagged(directory, ids, *stated)
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
