"""What the small JSON files of a model directory, and the tokenizer class that they name, say about its vocabulary.

It also holds the little that every tokenizer does with its ids.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.errors import InputError

CONFIG = "tokenizer_config.json"
KIND = "t5x_lite_tokenizer"  # a key that Hugging Face's file of the same name does not have

_ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")


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
BERT_TOKENS = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_ROBERTA = _LLAMA | {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_FAMILIES = {
    "T5Tokenizer": _Family(_T5, (), ("eos",), without=("bos",)),
    "BertTokenizer": _Family(BERT_TOKENS, ("cls",), ("sep",), without=("bos", "eos")),
    "RobertaTokenizer": _Family(_ROBERTA, ("cls",), ("sep",)),
    "GPT2Tokenizer": _Family(_GPT2),
    "OpenAIGPTTokenizer": _Family({"unk": "<unk>"}),
    "LlamaTokenizer": _Family(_LLAMA, ("bos",), ()),
    "MBartTokenizer": _Family(_ROBERTA),  # the language's code is put in by LayeredSentencePieceTokenizer
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
            if isinstance(token, dict) and token_content(token) == token_content(found[0]):
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
        known = {token_content(token) for token in stated.values()}
        named = [token for role in _ROLES if (token := self.token(role))]
        for settings in (self.settings, self._names):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = settings.get(key) or []
                named += more.values() if isinstance(more, dict) else more
        special = {token_content(token) for token in named}
        for content, number in self._added.items():
            if content not in known:
                stated[number] = {"content": content, "special": content in special}
        out: list[tuple[int | None, dict[str, Any]]] = [
            (number, _as_object(stated[number])) for number in sorted(stated)
        ]
        known |= set(self._added)
        for token in named:
            if token_content(token) not in known:
                known.add(token_content(token))
                out.append((None, {**_as_object(token), "special": True}))
        return out


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


def token_content(token: Any) -> str:
    """Returns the text of a token as `ModelDirectory.token` gives it; raises InputError if it has none."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InputError(f"special token {token!r}: must be a string, or an object with a string 'content'")
    return content


def _as_object(token: Any) -> dict[str, Any]:
    return {"special": True, **token} if isinstance(token, dict) else {"content": token_content(token), "special": True}


def role_ids(
    directory: ModelDirectory, id_of: Callable[[str], int | None], vocab_size: int, unknown: str | None
) -> dict[str, int | None]:
    """The id of each role: named by a file, else given by the model's configuration, else by the tokenizer's class."""
    family = directory.family
    ids: dict[str, int | None] = dict.fromkeys(_ROLES)
    for role in _ROLES:
        token = directory.token(role)
        if token is not None:
            ids[role] = id_of(token_content(token))
            continue
        if family is None or role not in family.without:
            number = directory.model_id(role)
            ids[role] = number if number is not None and 0 <= number < vocab_size else None
        if ids[role] is None and family is not None and role in family.tokens:
            ids[role] = id_of(family.tokens[role])
    if ids["unk"] is None and unknown is not None:
        ids["unk"] = id_of(unknown)
    return ids


def family_around(directory: ModelDirectory, ids: Mapping[str, int | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer's class puts around a text: prefix and suffix, without the roles that have no id."""
    family = directory.family or _Family({})
    prefix, suffix = (
        tuple(number for role in roles if (number := ids[role]) is not None) for roles in (family.prefix, family.suffix)
    )
    return prefix, suffix


def flagged(
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


def until(eos_id: int | None, ids: Iterable[int]) -> Iterator[int]:
    """Yields the ids before the first EOS."""
    return itertools.takewhile(lambda token: token != eos_id, map(int, ids))


def decode_runs(
    ids: Iterable[int], eos_id: int | None, sentinels: Iterable[int], decode: Callable[[list[int]], str]
) -> str:
    """Returns the text before the first EOS: sentinels as `<extra_id_N>`, a space apart from what `decode` returns."""
    names = sentinel_names(sentinels)
    parts = []
    for is_sentinel, run in itertools.groupby(until(eos_id, ids), key=names.__contains__):
        if is_sentinel:
            parts += [names[token] for token in run]
        else:
            parts.append(decode(list(run)))
    return " ".join(part for part in parts if part)


def sentinel_names(sentinels: Iterable[int]) -> dict[int, str]:
    """Returns `<extra_id_N>` by id."""
    return {sentinel: f"<extra_id_{n}>" for n, sentinel in enumerate(sentinels)}


class OneLanguage:
    """A tokenizer whose targets are framed as its inputs are."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    @property
    def target_affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `Tokenizer.target_affixes`."""
        return self.prefix_ids, self.suffix_ids


def valid_text(text: str) -> str:
    """Returns the text with `?` for every lone surrogate, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def valid_texts(texts: Sequence[str]) -> list[str]:
    """Returns `valid_text` of every text."""
    try:
        "".join(texts).encode()  # all at once, of which nearly always all are valid
    except UnicodeEncodeError:
        return [valid_text(text) for text in texts]
    return list(texts)


def native_threads() -> int:
    """Returns how many threads SentencePiece may use for a batch, -1 for as many as there are cores.

    TOKENIZERS_PARALLELISM=false, which the tokenizers library obeys, is for both of them.
    """
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "no", "off", "n", "f") else -1
