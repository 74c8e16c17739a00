"""Records from files: text, JSON lines, TSV, CSV and Parquet, each plain or compressed with gzip or zstandard.

A record is a `dict[str, str]`, column name to value. Every reader streams, so a file is never held in memory whole
(a compressed Parquet file is the exception, because Parquet needs random access).
"""

import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

from t5x_lite.data import corpus
from t5x_lite.errors import InputError, nearest

STDLIB = "stdlib"
"""The path that names the embedded corpus, `t5x_lite.data.corpus`; a file of that name is read as `./stdlib`."""

_Rows = Iterator[tuple[str, dict[str, object]]]  # where the record starts ("FILE:LINE"), and the record


def read_records(path: str, columns: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """Returns an iterator over the records of one or more files.

    Args:
        path: a file, a glob (`**` crosses directories) or several of them separated by commas; or `stdlib`. The files
            of a glob are read in sorted order. The suffix names the format: .txt .text .md .rst .log or none (one
            record a line, column `text`, blank lines skipped), .jsonl .json (one object a line), .tsv (header row, no
            quoting), .csv (header row), .parquet; each may carry a further .gz or .zst.
        columns: the columns to keep, every one of which each record must have; none keeps all.

    Raises:
        InputError: at once for a path that names no file or a suffix that is not known; while iterating for content
            that cannot be read (the message names file and line), a missing or null column, or no records at all.
    """
    return _read(path, _resolve(path), columns)


def check_columns(path: str, columns: tuple[str, ...]) -> None:
    """Raises InputError unless the first record found at `path` (as in `read_records`) has all of `columns`."""
    for file in _resolve(path):
        for _, record in _rows(file, ()):
            for name in columns:
                _require(name, record, file)
            return
    raise InputError(f"no records in '{path}'")


def _read(path: str, files: list[str], columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    empty = True
    for file in files:
        for where, record in _rows(file, columns):
            empty = False
            selected = {}
            for name in columns or record:
                _require(name, record, where)
                value = record[name]
                if value is None:
                    raise InputError(f"{where}: column '{name}' is null; every record needs a value")
                selected[name] = value if isinstance(value, str) else str(value)
            yield selected
    if empty:
        raise InputError(f"no records in '{path}'")


def _require(name: str, record: dict[str, object], where: str) -> None:
    if name not in record:
        known = ", ".join(record)
        raise InputError(f"column '{name}' is not in {where}; its columns are: {known}{nearest(name, record)}")


def _resolve(path: str) -> list[str]:
    # A name may itself hold a comma or a bracket, so a file that exists is taken literally first.
    parts = [path] if os.path.isfile(os.path.expanduser(path)) and path != STDLIB else path.split(",")
    files = []
    for part in parts:
        name = os.path.expanduser(part if len(parts) == 1 else part.strip())
        if name == STDLIB or os.path.isfile(name):
            matches = [name]
        elif os.path.isdir(name):
            raise InputError(f"'{name}' is a directory; give its files, for example '{os.path.join(name, '*.jsonl')}'")
        else:
            matches = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        if not matches:
            raise InputError(f"no file matches '{name}'")
        files += matches
    for file in files:
        if file != STDLIB:
            _format(file)
    return files


def _format(file: str) -> tuple["_Reader", str]:
    """Returns the reader for a file and the suffix of its compression, `""` for none."""
    stem, suffix = os.path.splitext(os.path.basename(file).lower())
    compression = suffix if suffix in (".gz", ".zst") else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix not in _READERS:
        allowed = " ".join(known for known in _READERS if known)
        raise InputError(f"'{file}' has an unknown suffix '{suffix}'; allowed: {allowed}, plain or with .gz or .zst")
    return _READERS[suffix], compression


def _rows(file: str, columns: tuple[str, ...]) -> _Rows:
    if file == STDLIB:
        yield from ((document.module, document._asdict()) for document in corpus.stdlib_documents())
        return
    reader, compression = _format(file)
    try:
        with _open(file, compression) as stream:
            yield from reader(stream, file, columns)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read '{file}': {' '.join(str(error).split())}") from error


def _open(file: str, compression: str) -> io.BufferedIOBase:
    if compression == ".gz":
        return gzip.open(file, "rb")
    if compression == ".zst":
        # Not the zstandard package: its stream reader ends quietly, with no error, where a file is cut short.
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    return open(file, "rb")


def _lines(stream: io.BufferedIOBase, file: str) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, 1):
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.start + 1
            raise InputError(f"{file}:{number}: invalid UTF-8 (0x{raw[byte - 1]:02x}) at byte {byte}") from error


def _text_rows(stream: io.BufferedIOBase, file: str, columns: tuple[str, ...]) -> _Rows:
    for number, line in _lines(stream, file):
        if line.strip():
            yield f"{file}:{number}", {"text": line.rstrip("\r\n")}


def _json_rows(stream: io.BufferedIOBase, file: str, columns: tuple[str, ...]) -> _Rows:
    for number, line in _lines(stream, file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}:{number}: not a JSON object on one line ({error.msg})") from error
        if not isinstance(record, dict):
            raise InputError(f"{file}:{number}: a {type(record).__name__}, not a JSON object on one line")
        try:
            # "\\ud800" alone is valid JSON and no text.
            if "\\u" in line:
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{file}:{number}: half of a surrogate pair, which is no character") from error
        yield f"{file}:{number}", record


def _delimited_rows(stream: io.BufferedIOBase, file: str, delimiter: str, quoting: Literal[0, 3]) -> _Rows:
    # The default limit of 131072 characters a field is shorter than many documents.
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, line in _lines(stream, file))
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    try:
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if not row:
                continue
            if not header:
                header = row
                if repeated := {name for name in header if header.count(name) > 1}:
                    raise InputError(f"{where}: the header names column '{min(repeated)}' twice")
                continue
            if len(row) != len(header):
                raise InputError(f"{where}: {len(row)} fields where the header has {len(header)} ({', '.join(header)})")
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}:{rows.line_num}: {error}") from error


def _csv_rows(stream: io.BufferedIOBase, file: str, columns: tuple[str, ...]) -> _Rows:
    return _delimited_rows(stream, file, ",", csv.QUOTE_MINIMAL)


def _tsv_rows(stream: io.BufferedIOBase, file: str, columns: tuple[str, ...]) -> _Rows:
    # TSV as published (GLUE and others) has lone quotes in its text: a quote is an ordinary character.
    return _delimited_rows(stream, file, "\t", csv.QUOTE_NONE)


def _parquet_rows(stream: io.BufferedIOBase, file: str, columns: tuple[str, ...]) -> _Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        source = io.BytesIO(stream.read()) if _format(file)[1] else stream
        table = pyarrow.parquet.ParquetFile(source)
        known = set(columns) <= set(table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=list(columns) if columns and known else None):
            for record in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", record
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read '{file}' as Parquet: {' '.join(str(error).split())}") from error


_Reader = Callable[[io.BufferedIOBase, str, tuple[str, ...]], _Rows]
_READERS: dict[str, _Reader] = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".log", ""), _text_rows),
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".tsv": _tsv_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
