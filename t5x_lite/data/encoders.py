"""From records to the token ids that are cached: running text, pairs of texts, and conversations.

No encoder puts a tokenizer's prefix or suffix around anything; the objectives do, each in its way. The EOS of a
conversation's answers is the exception, since only here is it known where they end.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from t5x_lite.data.identity import identity_of
from t5x_lite.data.tokenizers import Tokenizer, require_eos
from t5x_lite.data.tokens import id_type, tokenizer_identity
from t5x_lite.errors import InputError, nearest

Record = Mapping[str, Any]
Preprocessor = Callable[[Any], Any]
"""From a record to a record, to None for none, or to an iterable of records."""

_LONG = 200  # characters, on average; an array costs as much as a list of some fifty ids

# A full stop or the like, perhaps with closing quotes and brackets, and space behind it.
_SENTENCE_END = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]")


class Encoded(NamedTuple):
    """One example of the cache.

    Attributes:
        features: the numbers of each feature.
        key: what decides on which side of a hold-out it is.
        size: of the texts, in characters.
    """

    features: tuple[Sequence[int], ...]
    key: str
    size: int


class Encoder(Protocol):
    """Records to token ids. It is pickled for the processes that build a cache, tokenizer included."""

    @property
    def features(self) -> tuple[str, ...]:
        """Their names; the first is one of token ids."""
        ...

    @property
    def types(self) -> tuple[str, ...]:
        """The name of the NumPy type of each."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of a record that it reads; empty for all."""
        ...

    @property
    def identity(self) -> str:
        """Changes with everything that the ids depend on but the records: tokenizer, settings, preprocessors."""
        ...

    @property
    def tokenizer_identity(self) -> str:
        """That of the tokenizer alone, as `t5x_lite.data.tokens.tokenizer_identity` gives it."""
        ...

    def __call__(self, records: Sequence[tuple[str, Record]]) -> Iterator[Encoded]:
        """Yields the examples of (where, record) pairs, in their order; a record may give none or several.

        Raises:
            InputError: a record that it cannot use; the message begins with `where`.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Encoder:
    tokenizer: Tokenizer

    @functools.cached_property
    def tokenizer_identity(self) -> str:
        """See `Encoder`."""
        return tokenizer_identity(self.tokenizer)

    @functools.cached_property
    def identity(self) -> str:
        """See `Encoder`."""
        fields = (field for field in dataclasses.fields(self) if field.name != "tokenizer")
        settings = ", ".join(f"{field.name}={identity_of(getattr(self, field.name))}" for field in fields)
        return f"{type(self).__name__}({settings}) with {self.tokenizer_identity}"

    @property
    def _ids(self) -> str:
        return id_type(self.tokenizer.vocab_size)

    def _arrays(self, texts: Sequence[str]) -> Sequence[Any]:
        """Returns the ids of texts, as arrays where the tokenizer gives them and the texts are so long that it pays."""
        is_long = sum(map(len, texts)) > _LONG * len(texts)
        encode = getattr(self.tokenizer, "encode_arrays", None) if is_long else None
        return (encode or self.tokenizer.encode_batch)(texts)


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder(_Encoder):
    """Running text: feature `tokens`, without EOS.

    Attributes:
        column: of the text.
        preprocessors: what each record goes through first.
        sentences: also gives the feature `sentences`, how many tokens each sentence of the text has, for next-sentence
            prediction. A sentence is a line of a text that has several, else what ends in `.`, `!` or `?`; each is
            encoded by itself. Their sum is the length of `tokens`.
    """

    column: str = "text"
    preprocessors: tuple[Preprocessor, ...] = ()
    sentences: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return ("tokens", "sentences") if self.sentences else ("tokens",)

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return () if self.preprocessors else (self.column,)

    @property
    def types(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return (self._ids, "uint32") if self.sentences else (self._ids,)

    def texts(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, ...]]:
        """See `Encoder`."""
        return ((text,) for text in _texts(preprocessed(records, self.preprocessors), self.column))

    def __call__(self, records: Sequence[tuple[str, Record]]) -> Iterator[Encoded]:
        """See `Encoder`."""
        texts = _texts(preprocessed(records, self.preprocessors), self.column)
        if not self.sentences:
            yield from map(Encoded, zip(self._arrays(texts), strict=True), texts, map(len, texts))
            return
        divided = [split_sentences(text) for text in texts]
        encoded = iter(self.tokenizer.encode_batch([sentence for parts in divided for sentence in parts]))
        for text, parts in zip(texts, divided, strict=True):
            ids = [next(encoded) for _ in parts]
            counts = [len(sentence) for sentence in ids if sentence]
            yield Encoded(([token for sentence in ids for token in sentence], counts), text, len(text))


@dataclasses.dataclass(frozen=True, eq=False)
class PairEncoder(_Encoder):
    """Pairs of texts: features `inputs` and `targets`. The side of a hold-out follows from the inputs alone.

    Attributes:
        preprocessors: what each record goes through first.
        inputs, targets: the columns of what comes out.
        prefix: put before the inputs.
    """

    preprocessors: tuple[Preprocessor, ...] = ()
    inputs: str = "inputs"
    targets: str = "targets"
    prefix: str = ""

    features = ("inputs", "targets")

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return () if self.preprocessors else (self.inputs, self.targets)

    @property
    def types(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return (self._ids, self._ids)

    def texts(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, ...]]:
        """See `Encoder`."""
        for row in preprocessed(records, self.preprocessors):
            (source,), (target,) = _texts([row], self.inputs), _texts([row], self.targets)
            yield self.prefix + source, target

    def __call__(self, records: Sequence[tuple[str, Record]]) -> Iterator[Encoded]:
        """See `Encoder`."""
        pairs = list(self.texts(records))
        # In one call, so that a tokenizer with threads has all of it to divide among them.
        ids = self._arrays([text for pair in pairs for text in pair])
        for n, (source, target) in enumerate(pairs):
            yield Encoded((ids[2 * n], ids[2 * n + 1]), source, len(source) + len(target))


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    r"""How a conversation is written out: for each message the marker of its role, what it says, and `end`.

    The default gives `"User:\nHi.\nAssistant:\n"` and then the answer, which ends in EOS instead of `end`. Markers end
    in a line break, not a space, because tokenizers disagree on the side that a space belongs to.

    Attributes:
        system, user, assistant: the markers.
        end: of a message that is not an answer.
    """

    system: str = "System:\n"
    user: str = "User:\n"
    assistant: str = "Assistant:\n"
    end: str = "\n"


@dataclasses.dataclass(frozen=True, eq=False)
class ChatEncoder(_Encoder):
    """Conversations: features `tokens` and `answer`, which is 1 on the tokens of an answer and its EOS, else 0.

    A record has `messages`, a list of `{"role": "system" | "user" | "assistant", "content": text}`; or `prompt` and
    `response`; or `instruction`, `output` and perhaps an `input`, which follows the instruction after a blank line.
    Everything between two answers is encoded as one text, up to the marker before the answer, and so is every answer.
    What follows the last answer is left out. The side of a hold-out follows from the text before the first answer.

    Attributes:
        template: how the text is written.
        preprocessors: what each record goes through first.
    """

    template: ChatTemplate = ChatTemplate()
    preprocessors: tuple[Preprocessor, ...] = ()

    features = ("tokens", "answer")
    columns = ()

    def __post_init__(self) -> None:
        require_eos(self.tokenizer)

    @property
    def types(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return (self._ids, "uint8")

    def texts(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, ...]]:
        """See `Encoder`: what is before an answer and the answer, in turns."""
        for where, record in preprocessed(records, self.preprocessors):
            turns, _ = self._turns(where, _messages(where, record))
            if not turns:
                raise InputError(f"{where}: the conversation has no message of the assistant")
            yield tuple(text for turn in turns for text in turn)

    def __call__(self, records: Sequence[tuple[str, Record]]) -> Iterator[Encoded]:
        """See `Encoder`."""
        chats = list(self.texts(records))
        encoded = iter(self.tokenizer.encode_batch([text for texts in chats for text in texts]))
        for texts in chats:
            tokens: list[int] = []
            answers: list[int] = []
            for _ in texts[::2]:
                before, answer = next(encoded), [*next(encoded), require_eos(self.tokenizer)]
                tokens += before + answer
                answers += [0] * len(before) + [1] * len(answer)
            yield Encoded((tokens, answers), texts[0], sum(map(len, texts)))

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the ids after which the model answers: the conversation so far, up to the marker of the answer.

        Raises:
            InputError: a message without a role of the template and a text.
        """
        turns, rest = self._turns("messages", messages)
        ids = self.tokenizer.encode_batch([*(text for turn in turns for text in turn), rest + self.template.assistant])
        for answer in ids[1:-1:2]:
            answer.append(require_eos(self.tokenizer))
        return [token for part in ids for token in part]

    def _turns(self, where: str, messages: Any) -> tuple[list[tuple[str, str]], str]:
        """Returns (text before an answer, answer) pairs, and the text after the last answer."""
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise InputError(f"{where}: messages must be a list of objects with role and content")
        turns: list[tuple[str, str]] = []
        text = ""
        for number, message in enumerate(messages, 1):
            role, content = _message(f"{where}: message {number}", message)
            marker = getattr(self.template, role)
            if role == "assistant":
                turns.append((text + marker, content))
                text = ""
            else:
                text += marker + content + self.template.end
        return turns, text


def _message(where: str, message: Any) -> tuple[str, str]:
    roles = [field.name for field in dataclasses.fields(ChatTemplate) if field.name != "end"]
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise InputError(f"{where} must be an object with role and content, a text")
    role = message.get("role")
    if role not in roles:
        raise InputError(f"{where} has role {role!r}; allowed: {', '.join(roles)}{nearest(str(role), roles)}")
    return role, message["content"]


def _messages(where: str, record: Record) -> Any:
    if "messages" in record:
        return record["messages"]
    if "prompt" in record and "response" in record:
        question, answer = text_of(where, record, "prompt"), text_of(where, record, "response")
    elif "instruction" in record and "output" in record:
        more = record.get("input") or ""  # many records have an empty one
        question = text_of(where, record, "instruction") + (f"\n\n{more}" if more else "")
        answer = text_of(where, record, "output")
    else:
        known = ", ".join(record) or "none"
        raise InputError(
            f"{where}: a conversation needs the column messages, or prompt and response, or instruction and output;"
            f" its columns are: {known}"
        )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text: its lines that are not blank, or the sentences of its only line."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        return lines
    line, start, out = lines[0], 0, []
    for match in _SENTENCE_END.finditer(line):
        out.append(line[start : match.end()].rstrip())
        start = match.end()
    return [sentence for sentence in (*out, line[start:]) if sentence.strip()]


def text_of(where: str, record: Record, column: str) -> str:
    """Returns the text of a column, numbers as they are written; raises InputError, which names `where`, if none."""
    if column not in record:
        known = ", ".join(record)
        raise InputError(f"column '{column}' is not in {where}; its columns are: {known}{nearest(column, record)}")
    value = record[column]
    if value is None:
        raise InputError(f"{where}: column '{column}' is null; every record needs a value")
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: column '{column}' is not valid UTF-8 at byte {error.start + 1}") from None
    if isinstance(value, Mapping | Sequence):
        raise InputError(f"{where}: column '{column}' is a {type(value).__name__}, not a text")
    return str(value)


def _texts(records: Iterable[tuple[str, Record]], column: str) -> list[str]:
    # The usual case without a call: of short lines there are millions.
    return [
        value if type(value := record.get(column)) is str else text_of(where, record, column)
        for where, record in records
    ]


def preprocessed(
    records: Iterable[tuple[str, Record]], preprocessors: Sequence[Preprocessor]
) -> Iterable[tuple[str, Record]]:
    """Returns what the preprocessors, one after the other, make of (where, record) pairs."""
    for preprocessor in preprocessors:
        records = _through(records, preprocessor)
    return records


def _through(records: Iterable[tuple[str, Record]], preprocessor: Preprocessor) -> Iterator[tuple[str, Record]]:
    for where, record in records:
        try:
            result = preprocessor(record)
            results = () if result is None else (result,) if isinstance(result, Mapping) else tuple(result)
        except InputError as error:
            raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from error
        except (OSError, MemoryError):  # which are not the record's fault
            raise
        except Exception as error:
            name = getattr(preprocessor, "__name__", type(preprocessor).__name__)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"{where}: preprocessor {name} failed: {reason}") from error
        for changed in results:
            yield where, changed
