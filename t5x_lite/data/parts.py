"""What the readers of all formats share: how to read, what a part of a source is, and what to do with bad records."""

import codecs
import contextlib
import encodings.aliases
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

from t5x_lite.data import storage
from t5x_lite.errors import InputError, nearest

PART_BYTES = 16 << 20
"""About how many bytes of a file are one part."""

BATCH_BYTES = 4 << 20
"""About how many bytes of a columnar or an array_record file are held at a time."""

Record = dict[str, Any]
Rows = Iterator[tuple[str, Record]]
OnSkip = Callable[[str, str], None]
"""Is told where a skipped record is and what is wrong with it."""


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
      on_error: what to do with a record that is malformed: `raise`, or `skip` it. A file that cannot be read any
        further (damaged, cut short) raises either way.
      encoding: of text, a name that Python knows.
      max_record_bytes: a longer line, CSV record, element of a JSON array or array_record is malformed; what bounds
        the memory that a file without line ends takes.

    Raises:
      InputError: a value that is none of these.
    """

    on_error: Literal["raise", "skip"] = "raise"
    encoding: str = "utf-8"
    max_record_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            hint = nearest(str(self.on_error), ("raise", "skip"))
            raise InputError(f"on_error is '{self.on_error}', allowed: raise, skip{hint}")
        size = self.max_record_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"max_record_bytes is '{size}', it must be an integer of 1 or more")
        try:
            is_text = codecs.lookup(self.encoding)._is_text_encoding
        except (LookupError, TypeError, ValueError):
            is_text = False
        if not is_text:
            known = sorted({*encodings.aliases.aliases, *encodings.aliases.aliases.values()})
            hint = nearest(str(self.encoding).lower().replace("-", "_"), known)
            raise InputError(f"encoding '{self.encoding}' is unknown; examples: utf-8, utf-16, latin-1, cp1252{hint}")


def spans(total: int, size: int) -> list[tuple[int, int]]:
    """Divides `range(total)` into spans of about equal length, none longer than `size`; returns (start, stop)."""
    count = -(-total // size)
    return [(total * index // count, total * (index + 1) // count) for index in range(count)]


class Part(Protocol):
    """One stretch of a source: small, picklable, and read by itself.

    Attributes:
      name: of what it is a part of, for messages.
      size: bytes, as stored; 0 where they are not known.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:
        """Yields where each record is and the record.

        Args:
          reading: how.
          bad: is called with where a malformed record is and why, before the next one is read; it may raise.
          columns: formats that store columns apart may leave out others, if they have all of these; none: all.

        Raises:
          InputError: what cannot be read to its end.
        """
        ...


def judge(reading: Reading, on_skip: OnSkip | None = None) -> OnSkip:
    """Returns the `bad` of a `Part.read`: it raises InputError, or tells `on_skip` if `reading` says skip."""

    def bad(where: str, reason: str) -> None:
        if reading.on_error == "raise":
            raise InputError(f"{locate(where)}: {reason}")
        if on_skip:
            on_skip(where, reason)

    return bad


def text_of(where: str, record: Record, column: str) -> str:
    """Returns what a column holds as text: numbers are written out, bytes are UTF-8.

    Raises:
      InputError: with `where` it is, for a column that is missing (and the nearest name), null, or no text or number.
    """
    value = record.get(column)
    if isinstance(value, str):
        return value
    if column not in record:
        raise InputError(missing(column, record, where))
    if value is None:
        raise InputError(f"{where}: column '{column}' is null; every record needs a value")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: column '{column}' is not valid UTF-8 at byte {error.start + 1}") from None
    if isinstance(value, Iterable):
        raise InputError(f"{where}: column '{column}' is a {type(value).__name__}, not a text")
    return str(value)


def missing(column: str, record: Record, where: str = "the record") -> str:
    """Returns the message about a column that a record lacks."""
    return f"column '{column}' is not in {where}; its columns are: {', '.join(record)}{nearest(column, record)}"


def locate(message: str) -> str:
    """Returns a message with `FILE:LINE` for a `FILE@BYTE+LINE` in it, the lines of a file counted from a byte.

    The number of a line is known only to who has read all before it, which the reader of a later part has not: this
    reads the file up to there.
    """
    match = re.search(r"@(\d+)\+(\d+)", message)
    if not match:
        return message
    before = message[: match.start()]
    # A path may hold spaces, and so may what comes before it.
    starts = [0, *(space.end() for space in re.finditer("[ ']", before))]
    path = next((before[start:] for start in starts if storage.is_file(before[start:])), None)
    if path is None:
        return message
    left, lines = int(match[1]), int(match[2])
    with storage.open_binary(path) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return f"{before}:{lines}{message[match.end() :]}"


@contextlib.contextmanager
def readable(name: str, kind: str = "") -> Iterator[None]:
    """Turns what libraries raise for a damaged or missing file into InputError."""
    # OSError: also what pyarrow raises for a file cut short. Its own exceptions derive from ValueError, or from
    # NotImplementedError (a feature of the format that it lacks), or from KeyError and IndexError (broken metadata).
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read '{name}'{kind}: {one_line(error)}") from error
    except Exception as error:
        import pyarrow

        if not isinstance(error, pyarrow.ArrowException):
            raise
        raise InputError(f"cannot read '{name}'{kind}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Returns the message of an exception on one line."""
    return " ".join(str(error).split())


@cache
def ascii_compatible(encoding: str) -> bool:
    """Whether a byte below 128 is always the ASCII character, so that bytes can be cut at line ends before decoding."""
    try:
        plain = bytes(range(128)).decode(encoding) == bytes(range(128)).decode("ascii")
    except UnicodeError:
        return False
    # Encodings that switch alphabets with an escape sequence keep a state from byte to byte.
    return plain and not codecs.lookup(encoding).name.startswith(("iso2022", "hz"))


def line_encoding(encoding: str) -> str:
    """Returns the encoding that lines are decoded with, one by one.

    UTF-8 for one that is not `ascii_compatible`, which is recoded before it is cut into lines.
    """
    name = codecs.lookup(encoding).name
    return name if name != "utf-8-sig" and ascii_compatible(encoding) else "utf-8"
