"""Records from files of lines: text, JSON lines, TSV and CSV, and from a JSON array.

A part of a file is a range of its bytes; a line belongs to the part in which its first byte lies.
"""

import codecs
import contextlib
import csv
import functools
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

from t5x_lite.data import parts, storage
from t5x_lite.data.parts import OnSkip, Reading, Record, Rows
from t5x_lite.errors import InputError

LineFormat = Literal["text", "jsonl", "json", "tsv", "csv"]

_FOREVER = sys.maxsize
_INVALID = "t5x_lite.invalid"  # the name of an error handler
_PEEKED = 1 << 16
_BLOCK = 1 << 16
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class LinePart:
    """The lines of a file that begin in a range of its bytes; a whole file if it has one part.

    Attributes:
      name: the file.
      format: of its lines.
      start: the first byte.
      stop: the byte behind the last, None for the end of the file.
      size: see `Part`.
    """

    name: str
    format: LineFormat
    start: int = 0
    stop: int | None = None
    size: int = 0

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:  # noqa: D102
        with parts.readable(self.name), _open(self.name, reading) as stream:
            position = self.start
            if self.start:
                position = _next_line(stream, self.start, self.stop or _FOREVER)
            lines = _Lines(stream, self.name, reading, bad, position, self.stop or _FOREVER)
            if self.format == "tsv" and position:
                with _open(self.name, reading) as beginning:
                    first_lines = _Lines(beginning, self.name, reading, bad)
                    header = _tsv_header(first_lines, iter(first_lines))
                yield from _tsv_rows(iter(lines), header, bad)
            else:
                yield from _rows(self.format, lines)


class InputPart:
    """The standard input: read once, here, and not to be sent to another process."""

    name = "standard input"
    size = 0

    def __init__(self, line_format: LineFormat = "text") -> None:
        self._format: LineFormat = line_format
        self._is_read = False

    def __reduce__(self) -> Any:
        raise InputError("the standard input can be read by this process only; give a file, or read with 0 workers")

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:  # noqa: D102
        if self._is_read:
            raise InputError("the standard input has been read already; give a file to read it again")
        self._is_read = True
        with parts.readable(self.name):
            stream = _recoded(cast(BinaryIO, sys.stdin.buffer), reading.encoding)
            yield from _rows(self._format, _Lines(stream, self.name, reading, bad))


def line_parts(file: storage.StoredFile, line_format: LineFormat, encoding: str, part_bytes: int) -> list[LinePart]:
    """Divides a file into parts, each of which another worker can read.

    What is compressed, and what has line ends inside records or characters, is one part.
    """
    whole = LinePart(file.path, line_format, size=file.size)
    if file.size <= part_bytes or storage.compression(file.path) or not parts.ascii_compatible(encoding):
        return [whole]
    if line_format == "csv" or (line_format == "json" and _is_array(file.path)):
        return [whole]
    spans = parts.spans(file.size, part_bytes)
    return [LinePart(file.path, line_format, start, stop, stop - start) for start, stop in spans]


def parse_object(text: str) -> dict[str, Any]:
    """Returns the JSON object that a line holds; raises InputError with the reason, without where it is."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a JSON object on one line ({getattr(error, 'msg', error)})") from None
    if not isinstance(record, dict):
        raise InputError(_not_an_object(record))
    return record


def _not_an_object(record: object) -> str:
    return f"a JSON {'null' if record is None else type(record).__name__}, not an object"


class _Lines:
    """The lines of a stream, decoded.

    Iterating yields where each is and its text, without the line feed; what is too long or cannot be decoded is passed
    to `bad`. The stream is read in blocks, which takes a third of the time that reading line by line does.
    """

    def __init__(
        self, stream: BinaryIO, name: str, reading: Reading, bad: OnSkip, position: int = 0, stop: int = _FOREVER
    ) -> None:
        self.stream, self.name, self.bad = cast(io.BufferedReader, stream), name, bad
        self.limit, self._declared = reading.max_record_bytes, reading.encoding
        self.encoding = parts.line_encoding(reading.encoding)
        self.position, self._stop = position, stop

    def __iter__(self) -> Iterator[tuple[str, str]]:
        # In a later part the number of a line is not known: `locate` finds it out if it is asked for.
        prefix = f"{self.name}@{self.position}+" if self.position else f"{self.name}:"
        number = 0
        for data in self._blocks():
            if not self.position and not number and self.encoding == "utf-8":
                data = data.removeprefix(codecs.BOM_UTF8)
            lines = self._split(data)
            if lines is None:
                yield from self._one_by_one(data, prefix, number)
                number += data.count(b"\n")
                continue
            for number, line in enumerate(lines, number + 1):  # noqa: B020
                yield f"{prefix}{number}", line

    def _split(self, data: bytes) -> list[str] | None:
        """Returns the lines of a block, None if one is malformed or may be too long."""
        if len(data) > self.limit:
            return None
        try:
            lines = data.decode(self.encoding).split("\n")
        except UnicodeDecodeError:
            return None
        if not lines[-1]:
            lines.pop()
        return lines

    def _one_by_one(self, data: bytes, prefix: str, number: int) -> Iterator[tuple[str, str]]:
        for raw in data.removesuffix(b"\n").split(b"\n"):
            number += 1
            if len(raw) > self.limit:
                self.bad(f"{prefix}{number}", self.too_long())
                continue
            try:
                line = raw.decode(self.encoding)
            except UnicodeDecodeError as error:
                self.bad(f"{prefix}{number}", self.invalid(error))
            else:
                yield f"{prefix}{number}", line

    def _blocks(self) -> Iterator[bytes]:
        """Yields whole lines, up to the last that begins before `stop`; of one that is too long its beginning."""
        position, pending, size = self.position, [], 0
        while position < self._stop:
            block = self.stream.read1(_BLOCK)
            cut = block.rfind(b"\n") + 1
            if block and not cut:
                pending.append(block)
                size += len(block)
                if size <= self.limit:
                    continue
                # Longer than what is allowed, and so what `_one_by_one` says of it, whatever follows.
                data, rest = b"".join(pending) + b"\n", b""
                position += self.pass_rest() - 1
            else:
                data, rest = b"".join([*pending, block[:cut] if block else b""]), block[cut:]
            if position + len(data) > self._stop:
                data = data[: data.find(b"\n", self._stop - position - 1) + 1 or None]
            if data:
                yield data
            if not block:
                return
            position += len(data)
            pending, size = [rest] if rest else [], len(rest)

    def pass_rest(self) -> int:
        """Reads to the end of the line, and returns how many bytes that were."""
        count = 0
        for raw in iter(functools.partial(self.stream.readline, _BLOCK), b""):
            count += len(raw)
            if raw.endswith(b"\n"):
                break
        return count

    def too_long(self) -> str:
        return f"longer than max_record_bytes={self.limit}"

    def invalid(self, error: UnicodeDecodeError) -> str:
        if not parts.ascii_compatible(self._declared):
            return f"invalid {self._declared}"
        label = "UTF-8" if self.encoding == "utf-8" else self._declared
        return f"invalid {label} (0x{error.object[error.start]:02x}) at byte {error.start + 1}"


def _next_line(stream: BinaryIO, start: int, stop: int) -> int:
    """Moves the stream to the first line that begins at byte `start` or later, and returns that byte.

    It gives up at `stop`, where a line of any length that fills the part ends the search.
    """
    position = start - 1
    stream.seek(position)
    while position < stop:
        raw = stream.readline(min(1 << 20, stop - position))
        position += len(raw)
        if not raw or raw.endswith(b"\n"):
            return position
    return position


@contextlib.contextmanager
def _open(path: str, reading: Reading) -> Iterator[BinaryIO]:
    """Opens what a file says, uncompressed and in an encoding whose line ends are those of ASCII."""
    with storage.open_decompressed(path) as stream:
        yield _recoded(stream, reading.encoding)


def _recoded(stream: BinaryIO, encoding: str) -> BinaryIO:
    """Returns the stream, in UTF-8 if its encoding has line ends that are not those of ASCII (UTF-16, for one)."""
    if parts.ascii_compatible(encoding):
        return stream
    return cast(BinaryIO, io.BufferedReader(_Recoder(stream, encoding), 1 << 20))


class _Recoder(io.RawIOBase):
    """A stream of UTF-8; what is invalid in the encoding of the stream under it is invalid in UTF-8 too."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        # Half a surrogate pair stands for what is invalid, so that its line is found to be so, and others can be read.
        codecs.register_error(_INVALID, lambda error: ("\udc80", cast(UnicodeDecodeError, error).end))
        self._text = io.TextIOWrapper(stream, encoding, errors=_INVALID, newline="\n")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = self._text.read(1 << 18).encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _rows(line_format: LineFormat, lines: _Lines) -> Rows:
    if line_format == "tsv":
        numbered = iter(lines)
        return _tsv_rows(numbered, _tsv_header(lines, numbered), lines.bad)
    if line_format == "csv":
        return _csv_rows(lines)
    if line_format == "json":
        return _json_rows(lines)
    return _text_rows(lines) if line_format == "text" else _object_rows(lines)


def _text_rows(lines: _Lines) -> Rows:
    for where, line in lines:
        text = line.rstrip("\r")
        if text and not text.isspace():
            yield where, {"text": text}


def _object_rows(lines: _Lines) -> Rows:
    for where, line in lines:
        try:
            record = parse_object(line)
            # "\ud83d\ude00" is an emoji as ASCII spells it, "\ud83d" alone is valid JSON and no text. (Looking for one
            # character first saves the slower search in most lines.)
            if "\\" in line and _SURROGATE.search(line):
                _check_characters(record)
        except InputError as error:
            if line and not line.isspace():
                lines.bad(where, str(error))
        else:
            yield where, record


def _check_characters(record: Record) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("half of a surrogate pair, which is no character") from None


def _tsv_header(lines: _Lines, numbered: Iterator[tuple[str, str]]) -> list[str]:
    # Without its names a file cannot be used, whatever else is to be skipped.
    bad, lines.bad = lines.bad, parts.judge(Reading())
    try:
        for where, line in numbered:
            if names := line.rstrip("\r"):
                return _checked_header(where, names.split("\t"))
        return []
    finally:
        lines.bad = bad


def _checked_header(where: str, header: list[str]) -> list[str]:
    if repeated := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{where}: the header names column '{min(repeated)}' twice")
    return header


def _tsv_rows(lines: Iterator[tuple[str, str]], header: list[str], bad: OnSkip) -> Rows:
    # TSV as published (GLUE and others) has lone quotes in its text: a quote is an ordinary character.
    for where, line in lines:
        if row := line.rstrip("\r"):
            fields = row.split("\t")
            if len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            else:
                bad(where, _miscounted(fields, header))


def _miscounted(fields: list[str], header: list[str]) -> str:
    return f"{len(fields)} fields where the header has {len(header)} ({', '.join(header)})"


class _CsvLines:
    """The lines of one CSV record after another, as `csv.reader` asks for them.

    Attributes:
      number: of the line read last.
      invalid: why a line of the record cannot be used, empty if all can.
    """

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self._raw = iter(functools.partial(lines.stream.readline, lines.limit + 1), b"")
        self.number = 0
        self.begin()

    def begin(self) -> None:
        """Says that what follows is the next record."""
        self.invalid, self._size = "", 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = next(self._raw)
        self.number += 1
        self._size += len(raw)
        if self._size > self._lines.limit:
            if not raw.endswith(b"\n"):
                self._lines.pass_rest()
            raise csv.Error(self._lines.too_long())
        if self.number == 1 and self._lines.encoding == "utf-8":
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            return raw.decode(self._lines.encoding)
        except UnicodeDecodeError as error:
            self.invalid = self._lines.invalid(error)
            return raw.decode(self._lines.encoding, "replace")


def _csv_rows(lines: _Lines) -> Rows:
    # The default limit of 131072 characters a field is shorter than many documents.
    csv.field_size_limit(2**31 - 1)
    source = _CsvLines(lines)
    rows = csv.reader(source, strict=True)
    header: list[str] = []
    while True:
        source.begin()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # A reader that has raised begins anew with the next line.
            source.invalid, row = str(error), ["?"]
        where = f"{lines.name}:{source.number}"
        if source.invalid and not header:
            raise InputError(f"{where}: {source.invalid}")
        if source.invalid:
            lines.bad(where, source.invalid)
        elif row and not header:
            header = _checked_header(where, row)
        elif row and len(row) != len(header):
            lines.bad(where, _miscounted(row, header))
        elif row:
            yield where, dict(zip(header, row, strict=True))


def _json_rows(lines: _Lines) -> Rows:
    """Reads one array of objects, or an object on every line: published files called `.json` are either."""
    if lines.position or not _begins_array(lines.stream.peek(_PEEKED)):
        return _object_rows(lines)
    return _array_rows(lines)


def _is_array(path: str) -> bool:
    with parts.readable(path), storage.open_binary(path) as stream:
        return _begins_array(stream.read(_PEEKED))


def _begins_array(beginning: bytes) -> bool:
    return beginning[:_PEEKED].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


class _ArrayText:
    """A window on the text of a stream, and a place in it.

    Attributes:
      text: what has been read and not been left behind.
      at: the place.
    """

    def __init__(self, lines: _Lines) -> None:
        self._lines, self._decoder = lines, codecs.getincrementaldecoder(lines.encoding)()
        self._raw_decode = json.JSONDecoder().raw_decode
        self.text, self.at = "", 0
        self._line, self._counted = 1, 0

    def where(self) -> str:
        """Returns `FILE:LINE` of the place."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return f"{self._lines.name}:{self._line}"

    def more(self, size: int) -> bool:
        """Reads on, and returns whether there was anything."""
        self.where()
        self.text, self.at, self._counted = self.text[self.at :], 0, 0
        data = self._lines.stream.read(size)
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self._line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise InputError(f"{self._lines.name}:{line}: {self._lines.invalid(error)}") from error
        return bool(data)

    def next_character(self) -> str:
        """Moves to what is not white space and returns it, `""` at the end."""
        while True:
            self.at = json.decoder.WHITESPACE.match(self.text, self.at).end()  # type: ignore[attr-defined]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more(_PEEKED):
                return ""

    def element(self) -> tuple[Any, int]:
        """Moves behind the JSON value at the place and returns it, and its length."""
        size = _PEEKED
        while True:
            try:
                value, end = self._raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                # Perhaps only its beginning has been read.
                reason = f"not a JSON object in an array ({getattr(error, 'msg', error)})"
                is_whole = False
            else:
                is_whole = isinstance(value, dict | list | str) or end < len(self.text)
                reason = "the JSON array has no end"
            if is_whole:
                length = end - self.at
                self.at = end
                return value, length
            if len(self.text) - self.at > self._lines.limit:
                reason = f"{self._lines.too_long()}, or {reason}"
            elif self.more(size):
                size *= 2
                continue
            raise InputError(f"{self.where()}: {reason}")


def _array_rows(lines: _Lines) -> Rows:
    """Yields the objects of a JSON array, of which no more is held than one and what is read at a time."""
    array = _ArrayText(lines)
    array.more(_PEEKED)
    array.text = array.text.removeprefix("\ufeff")
    array.next_character()
    separator = "["
    while (character := array.next_character()) != "]":
        if character != separator:
            missing = "it has no end" if not character else f"',' or ']' expected, not '{character}'"
            raise InputError(f"{array.where()}: a JSON array: {missing}")
        array.at += 1
        if array.next_character() == "]" and separator == "[":
            break
        separator, where = ",", array.where()
        record, length = array.element()
        try:
            if length > lines.limit:
                raise InputError(lines.too_long())
            if not isinstance(record, dict):
                raise InputError(_not_an_object(record))
            _check_characters(record)
        except InputError as error:
            lines.bad(where, str(error))
        else:
            yield where, record
    array.at += 1
    if array.next_character():
        raise InputError(f"{array.where()}: text behind the JSON array")
