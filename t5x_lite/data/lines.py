"""Files whose lines are used one by one: one that cannot be used says why, and the others are read all the same."""

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from t5x_lite.data.readers import parse_object
from t5x_lite.errors import InputError, nearest

_FIELDS_SHOWN, _LETTERS_SHOWN = 10, 40
_TEXT, _JSON, _TABLE = (".txt", ".text"), (".jsonl", ".json"), (".tsv",)


@dataclass(frozen=True)
class Column:
    """A value that every line has.

    Attributes:
      names: what its field may be called; the first that a line has is taken.
      default: the value of a line without any; None: it needs one.
    """

    names: tuple[str, ...]
    default: str | None = None


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
      number: of the line in its file, counted from 1.
      values: the value of each column.
      error: why there are none; empty where there are.
    """

    number: int
    values: tuple[str, ...] = ()
    error: str = ""


class LineFile:
    """The lines of a file, plain or compressed with gzip.

    `.txt` has a text on every line, blank or not, for the one column without a default. `.jsonl` and `.json` have an
    object on a line, `.tsv` has a row of names and then rows of values, without quoting; blank lines are left out.

    Attributes:
      path: the file.
      count: how many lines `read` yields.
      sha256: of what the file says, uncompressed.
    """

    def __init__(self, path: str | Path, columns: Sequence[Column]) -> None:
        """Reads the file once.

        Raises:
          InputError: a suffix that is not known, a file that cannot be read to its end, or one without any lines or
            whose kind or first row has not all columns.
        """
        self.path = Path(path).expanduser()
        self._columns = columns
        self._suffix = Path(self.path.name.lower().removesuffix(".gz")).suffix
        known = (*_TEXT, *_JSON, *_TABLE)
        if self._suffix not in known:
            raise InputError(f"{path} must end in {' '.join(known)}, plain or with .gz")
        if self._suffix in _TEXT and sum(column.default is None for column in columns) > 1:
            names = " and ".join(column.names[0] for column in columns)
            raise InputError(f"{path} has one text a line; {names} of a line go into a file of {' '.join(known[2:])}")
        digest, self.count = hashlib.sha256(), 0
        for number, raw in self._raw():
            digest.update(raw)
            self.count += self._is_read(number, raw)
        if not self.count:
            raise InputError(f"{path} has no lines")
        self.sha256 = digest.hexdigest()
        self._header = self._read_header() if self._suffix in _TABLE else []

    @property
    def has_fields(self) -> bool:
        """Whether the values of a line have names."""
        return self._suffix not in _TEXT

    def read(self, start: int = 0) -> Iterator[Line]:
        """Yields the lines, without the first `start` of them."""
        records = (line for line in self._raw() if self._is_read(*line))
        for number, raw in islice(records, start, None):
            yield read_line(number, bare(number, raw), self._values)

    def _is_read(self, number: int, raw: bytes) -> bool:
        if self._suffix in _TABLE and number == 1:
            return False
        return self._suffix in _TEXT or bool(raw.strip())

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        try:
            is_compressed = self.path.suffix.lower() == ".gz"
            with cast(BinaryIO, gzip.open(self.path) if is_compressed else self.path.open("rb")) as file:
                yield from enumerate(file, 1)
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(f"cannot read {self.path}: {' '.join(reason.split())}") from error

    def _read_header(self) -> list[str]:
        first = next((read_line(1, bare(*line), lambda text: (text,)) for line in self._raw()), None)
        if first is None or first.error:
            raise InputError(f"{self.path} has no row of names: {first.error if first else 'it is empty'}")
        names = first.values[0].split("\t")
        if len(set(names)) < len(names):
            doubled = _shown(next(name for name in names if names.count(name) > 1))
            raise InputError(f"{self.path}:1: more than one column is called '{doubled}'")
        try:
            _pick(dict.fromkeys(names, ""), self._columns)
        except InputError as error:
            raise InputError(f"{self.path}:1: {error}") from None
        return names

    def _values(self, text: str) -> tuple[str, ...]:
        if self._suffix in _TEXT:
            return tuple(text if column.default is None else column.default for column in self._columns)
        if self._suffix in _TABLE:
            fields = text.split("\t")
            if len(fields) != len(self._header):
                raise InputError(f"{len(fields)} fields where the first line has {len(self._header)}")
            return _pick(dict(zip(self._header, fields, strict=True)), self._columns)
        return _pick(parse_object(text), self._columns)


def bare(number: int, raw: bytes) -> bytes:
    """Returns a line of a file without its line break and, if it is the first, without a byte order mark."""
    start = codecs.BOM_UTF8 if number == 1 else b""
    return raw.removeprefix(start).removesuffix(b"\r\n").removesuffix(b"\n")


def read_line(number: int, raw: bytes, values: Callable[[str], tuple[str, ...]]) -> Line:
    """Returns a line.

    Args:
      number: of the line.
      raw: what is on it.
      values: what its text says; raises InputError for a text that cannot be used.
    """
    try:
        return Line(number, values(raw.decode()))
    except UnicodeDecodeError as error:
        return Line(number, error=f"not valid UTF-8 (0x{raw[error.start]:02x} at byte {error.start + 1})")
    except InputError as error:
        return Line(number, error=str(error))


def _pick(record: Mapping[str, object], columns: Sequence[Column]) -> tuple[str, ...]:
    out = []
    for column in columns:
        name = next((name for name in column.names if name in record), None)
        if name is None:
            if column.default is None:
                wanted = " or ".join(f"'{_shown(name)}'" for name in column.names)
                known = [_shown(name) for name in islice(record, _FIELDS_SHOWN)]
                listed = ", ".join(known) or "none"
                more = f" and {len(record) - len(known)} more" if len(record) > len(known) else ""
                raise InputError(f"no field {wanted}; the fields are: {listed}{more}{nearest(column.names[0], known)}")
            out.append(column.default)
            continue
        value = record[name]
        if not isinstance(value, str):
            raise InputError(f"field '{_shown(name)}' is {json.dumps(value)[:40]}, not a text")
        try:
            value.encode()
        except UnicodeEncodeError:  # "\\ud800" alone is valid JSON
            raise InputError(f"field '{_shown(name)}' has half of a surrogate pair, which is no character") from None
        out.append(value)
    return tuple(out)


def _shown(name: str) -> str:
    """Returns the name of a field as a message shows it: short, on one line, in letters of any encoding."""
    return json.dumps(name)[1:-1][:_LETTERS_SHOWN]
