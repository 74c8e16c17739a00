"""From records to the token ids that are cached: running text, pairs of texts, and conversations.

No encoder puts a tokenizer's prefix or suffix around anything; the objectives do, each in its way. The EOS of a
conversation's answers is the exception, since only here is it known where they end.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from t5x_lite.data.identity import identity_of
from t5x_lite.data.parts import OnSkip, Record, locate, text_of
from t5x_lite.data.preprocessors import Preprocessor, apply
from t5x_lite.data.tokenizers import Tokenizer, require_eos
from t5x_lite.data.tokens import id_type, tokenizer_identity
from t5x_lite.errors import InputError, nearest

T = TypeVar("T")

_RECORDS, _CHARACTERS = 1000, 2**20  # most of them that are encoded at once
_LONG = 200  # characters, on average; an array costs as much as a list of some fifty ids


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

    def texts(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, ...]]:
        """Yields the texts of which the examples consist, without tokens; the first of each is its `Encoded.key`.

        Raises:
            InputError: as a call.
        """
        ...

    def __call__(self, records: Sequence[tuple[str, Record]]) -> Iterator[Encoded]:
        """Yields the examples of (where, record) pairs, in their order; a record may give none or several.

        Raises:
            InputError: a record that it cannot use; the message begins with `where`.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Encoder(Encoder):
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
    """

    column: str = "text"
    preprocessors: tuple[Preprocessor, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return ("tokens",)

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return () if self.preprocessors else (self.column,)

    @property
    def types(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return (self._ids,)

    def texts(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, ...]]:
        """See `Encoder`."""
        return ((text,) for text in self._texts(records))

    def __call__(self, records: Sequence[tuple[str, Record]]) -> Iterator[Encoded]:
        """See `Encoder`."""
        texts = self._texts(records)
        return map(Encoded, zip(self._arrays(texts), strict=True), texts, map(len, texts))

    def _texts(self, records: Iterable[tuple[str, Record]]) -> list[str]:
        column = self.column
        # The usual case without a call: of short lines there are millions.
        return [
            value if type(value := record.get(column)) is str else text_of(where, record, column)
            for where, record in apply(self.preprocessors, records)
        ]


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

    @property
    def features(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return ("inputs", "targets")

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return () if self.preprocessors else (self.inputs, self.targets)

    @property
    def types(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return (self._ids, self._ids)

    def examples(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[tuple[str, str], Record]]:
        """Yields the two texts of each pair, and the record that they stand in, as preprocessed."""
        for where, record in apply(self.preprocessors, records):
            source, target = text_of(where, record, self.inputs), text_of(where, record, self.targets)
            yield (self.prefix + source, target), record

    def texts(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, ...]]:
        """See `Encoder`."""
        return (pair for pair, _ in self.examples(records))

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

    @property
    def features(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return ("tokens", "answer")

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return ()

    def __post_init__(self) -> None:
        require_eos(self.tokenizer)

    @property
    def types(self) -> tuple[str, ...]:
        """See `Encoder`."""
        return (self._ids, "uint8")

    def texts(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, ...]]:
        """See `Encoder`: what is before an answer and the answer, in turns."""
        for where, record in apply(self.preprocessors, records):
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
        """Returns the ids after which a decoder alone answers: the conversation up to the marker of the answer.

        As `Chat` has it in training, behind the prefix of the tokenizer's texts.

        Raises:
            InputError: a message without a role of the template and a text.
        """
        turns, rest = self._turns("messages", messages)
        ids = self.tokenizer.encode_batch([*(text for turn in turns for text in turn), rest + self.template.assistant])
        for answer in ids[1:-1:2]:
            answer.append(require_eos(self.tokenizer))
        return [*self.tokenizer.prefix_ids, *(token for part in ids for token in part)]

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


def in_batches(
    make: Callable[[Sequence[tuple[str, Record]]], Iterable[T]],
    records: Iterable[tuple[str, Record]],
    on_skip: OnSkip | None,
) -> Iterator[list[T]]:
    """Yields what `make`, an encoder or one of its methods, gives for records, of which it gets a thousand at a time.

    Args:
        make: called with (where, record) pairs; what it gives for one of them does not depend on the others.
        records: such pairs.
        on_skip: is told of each record that cannot be used, and why; all that it would give is left out. None: the
            first of them raises.

    Raises:
        InputError: as `make`, with the line of the file.
    """
    for batch in _batches(records):
        yield _usable(make, batch, on_skip)


def _batches(records: Iterable[tuple[str, Record]]) -> Iterator[list[tuple[str, Record]]]:
    batch: list[tuple[str, Record]] = []
    characters = 0
    for where, record in records:
        batch.append((where, record))
        for value in record.values():
            if type(value) is str:
                characters += len(value)
        if len(batch) == _RECORDS or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _usable(
    make: Callable[[Sequence[tuple[str, Record]]], Iterable[T]],
    batch: Sequence[tuple[str, Record]],
    on_skip: OnSkip | None,
) -> list[T]:
    try:
        return list(make(batch))
    except InputError as error:
        failure = error
    out: list[T] = []
    for where, record in batch:  # one by one, to find those that cannot be used
        try:
            out += list(make([(where, record)]))
        except InputError as error:
            if on_skip is None:
                raise InputError(str(error).replace(where, locate(where), 1)) from error
            on_skip(where, str(error))
    if on_skip is None:
        raise failure
    return out
