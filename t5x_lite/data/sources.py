"""Where records come from: files of any format, prepared datasets, the embedded corpus, the standard input.

A record is a `dict[str, Any]`, column name to value. A source consists of parts, which are read one by one by whoever
divides the work, or in order by `Source.records`. Every reader streams, so a file is never held in memory whole
(compressed Parquet and Arrow files are the exception, because they need random access).
"""

import dataclasses
import json
import os
import platform
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

from t5x_lite.data import corpus, storage
from t5x_lite.data.binary_files import array_record_parts, arrow_parts, parquet_parts
from t5x_lite.data.parts import PART_BYTES, OnSkip, Part, Reading, Record, Rows, judge, locate, missing, text_of
from t5x_lite.data.prepared_datasets import TFDS, is_saved_dataset, is_tfds_directory, open_saved_dataset, open_tfds
from t5x_lite.data.readers import InputPart, LineFormat, line_parts
from t5x_lite.errors import InputError, nearest

__all__ = [
    "INPUT", "STDLIB", "Part", "Reading", "Record", "Source",
    "check_columns", "locate", "open_source", "read_records",
]  # fmt: skip

STDLIB = "stdlib"
"""The path that names the embedded corpus, `t5x_lite.data.corpus`; a file of that name is read as `./stdlib`."""

INPUT = "-"
"""The path that names the standard input."""

_KEYS = ("path", "format", "encoding", "on_error", "max_record_bytes", "split", "data_dir", "columns")
_READING = tuple(field.name for field in dataclasses.fields(Reading))


@dataclass(frozen=True)
class Source:
    """Records, and how they are divided.

    Attributes:
      spec: as it was asked for.
      parts: the stretches that are read apart; together every record once, in the order of the files. They do not
        depend on who reads them, and are small and picklable (those of the standard input are not).
      identity: a JSON text that changes when the data may have changed: paths, sizes and times of files, version and
        split of datasets, and how they are read.
      reading: how.
      columns: the names that records get instead of those in the file, in pairs (wanted, in the file).
      is_stream: whether it can be read only once, by this process, in one part: the standard input.
    """

    spec: str
    parts: tuple[Part, ...]
    identity: str
    reading: Reading
    columns: tuple[tuple[str, str], ...] = ()
    is_stream: bool = False

    def records(self, on_skip: OnSkip | None = None, columns: Sequence[str] = ()) -> Rows:
        """Yields where each record is (`FILE:LINE`, or what `locate` makes that of) and the record.

        Args:
          on_skip: is told of every malformed record that `reading` says to skip: where it is and what is wrong.
          columns: readers of formats that store columns apart may leave others out; none: all.

        Raises:
          InputError: malformed data, or no records at all.
        """
        rows = chain.from_iterable(self.read(index, on_skip, columns) for index in range(len(self.parts)))
        first = next(rows, None)
        if first is None:
            raise InputError(f"no records in '{self.spec}'")
        yield first
        yield from rows

    def read(self, part_index: int, on_skip: OnSkip | None = None, columns: Sequence[str] = ()) -> Rows:
        """Yields the records of one part, as `records` does; there may be none."""
        bad = judge(self.reading, on_skip)
        names = dict(self.columns)
        in_file = tuple(names.get(column, column) for column in columns)
        rows = self.parts[part_index].read(self.reading, bad, in_file)
        return self._renamed(rows, bad) if names else rows

    def _renamed(self, rows: Rows, bad: OnSkip) -> Rows:
        old_names = {old for _, old in self.columns}
        for where, record in rows:
            if absent := [old for _, old in self.columns if old not in record]:
                bad(where, missing(absent[0], record))
                continue
            renamed = {new: record[old] for new, old in self.columns}
            yield where, {name: value for name, value in record.items() if name not in old_names} | renamed


def open_source(
    spec: str | Sequence[str] | Mapping[str, Any], reading: Reading | None = None, part_bytes: int = PART_BYTES
) -> Source:
    """Opens a source; looks at names and sizes, and into large files only as far as it takes to divide them.

    Args:
      spec: a string, several, or a mapping of `path`, which is the same, and any of
        `format` (text, jsonl, json, tsv, csv, parquet, arrow, array_record; instead of what the suffix says),
        `split` and `data_dir` (of datasets), `columns` (wanted name: name in the file) and the fields of `Reading`.
        The string is one of these, or several separated by commas:
        a file or glob, here or on a remote store (`**` crosses directories), sorted. The suffix names the format: .txt
        .text .md .rst .log or none (one record a line, column `text`, blank lines skipped), .jsonl (one object a line),
        .json (likewise, or one array of objects), .tsv (header row, no quoting), .csv (header row), .parquet, .arrow,
        each also with a further .gz or .zst; .array_record (JSON objects or texts);
        `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`, prepared as array_record;
        a directory that Hugging Face's `save_to_disk` wrote;
        `stdlib`, the embedded corpus; `-`, the standard input.
      reading: how to read it, where the mapping does not say.
      part_bytes: about how large a part is.

    Raises:
      InputError: a source that is not there, an unknown format, key, encoding or split, only empty files.
    """
    reading = reading or Reading()
    options = _checked(dict(spec) if isinstance(spec, Mapping) else {"path": spec})
    reading = dataclasses.replace(reading, **{key: options[key] for key in _READING if key in options})
    paths = [options["path"]] if isinstance(options["path"], str) else list(options["path"])
    elements = [element for path in paths for element in _elements(path)]
    found = [_open(element, options, reading, part_bytes) for element in elements]
    names = ", ".join(paths)
    if options.get("data_dir") and not any(element.startswith(TFDS) for element in elements):
        raise InputError(f"'{names}' needs no data_dir={options['data_dir']}, which is for {TFDS}NAME")
    if options.get("split") and not any(element.takes_split for element in found):
        raise InputError(f"'{names}' has no splits; split={options['split']} is for tfds: and directories of datasets")
    is_stream = INPUT in elements
    if is_stream and len(elements) > 1:
        raise InputError(f"'{names}': the standard input is read alone, not among files")
    columns = tuple(sorted(dict(options.get("columns", {})).items()))
    identity = {
        "data": [element.identity for element in found],
        "format": options.get("format"),
        "reading": dataclasses.asdict(reading),
        "columns": columns,
    }
    parts = tuple(part for element in found for part in element.parts)
    if not parts:
        raise InputError(f"no records in '{names}': empty")
    return Source(names, parts, json.dumps(identity), reading, columns, is_stream)


def check_columns(source: Source | str | Sequence[str] | Mapping[str, Any], columns: Sequence[str]) -> None:
    """Raises InputError unless the first record of a source (as in `open_source`) has all of `columns`.

    The standard input is not looked at, because what has been read of it is gone.
    """
    source = source if isinstance(source, Source) else open_source(source)
    if source.is_stream:
        return
    for index, part in enumerate(source.parts):
        for _, record in source.read(index):
            for name in columns:
                if name not in record:
                    raise InputError(missing(name, record, part.name))
            return
    raise InputError(f"no records in '{source.spec}'")


def read_records(path: str, columns: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """Returns an iterator over the records of a source, all values as strings.

    Args:
      path: as in `open_source`.
      columns: the columns to keep, every one of which each record must have; none keeps all.

    Raises:
      InputError: at once for what is not there or a format that is not known; while iterating for content that cannot
        be read (the message names file and line), a missing or null column, or no records at all.
    """
    return _written_out(open_source(path).records(columns=columns), columns)


def _written_out(rows: Rows, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    for where, record in rows:
        try:
            yield {column: text_of(where, record, column) for column in columns or record}
        except InputError as error:
            raise InputError(locate(str(error))) from error


@dataclass(frozen=True)
class _CorpusPart:
    """The embedded corpus."""

    name: str = STDLIB
    size: int = 0

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:
        return ((document.module, document._asdict()) for document in corpus.stdlib_documents())


@dataclass(frozen=True)
class _Element:
    """What one of the strings of a source names."""

    parts: Sequence[Part]
    identity: Any
    takes_split: bool = False


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the mapping without keys that say nothing."""
    for key in options:
        if key not in _KEYS:
            raise InputError(f"a source has no '{key}', allowed: {', '.join(_KEYS)}{nearest(str(key), _KEYS)}")
    options = {key: value for key, value in options.items() if value is not None}
    path = options.get("path")
    paths = [path] if isinstance(path, str) else path
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(one, str) and one for one in paths):
        raise InputError(f"the path of a source is {path!r}, it must be a string or several, not empty")
    for key in ("format", "split", "data_dir"):
        if not isinstance(options.get(key, ""), str):
            raise InputError(f"'{key}' of a source is {options[key]!r}, it must be a string")
    if (name := options.get("format", "text")) not in _FORMATS:
        raise InputError(f"format '{name}' is unknown, allowed: {', '.join(_FORMATS)}{nearest(name, _FORMATS)}")
    columns = options.get("columns", {})
    if not isinstance(columns, Mapping) or not all(isinstance(x, str) for pair in columns.items() for x in pair):
        raise InputError(f"'columns' of a source is {columns!r}, it must map wanted names to those in the file")
    return options


def _elements(path: str) -> list[str]:
    # A name may itself hold a comma, so a file that exists is taken literally first.
    if path == STDLIB or os.path.exists(os.path.expanduser(path)):
        return [os.path.expanduser(path)]
    # TFDS writes a slice with brackets, in which nothing is divided.
    pieces = re.split(r",(?![^\[]*\])", path) if path.startswith(TFDS) else path.split(",")
    return [os.path.expanduser(piece.strip() if len(pieces) > 1 else piece) for piece in pieces]


def _open(element: str, options: Mapping[str, Any], reading: Reading, part_bytes: int) -> _Element:
    split, data_dir = options.get("split"), options.get("data_dir")
    if element == STDLIB:
        return _Element([_CorpusPart()], [STDLIB, platform.python_version()])
    if element == INPUT:
        line_format = options.get("format", "text")
        if line_format not in get_args(LineFormat):
            raise InputError(
                f"format {line_format} needs a file; the standard input is {', '.join(get_args(LineFormat))}"
            )
        return _Element([InputPart(line_format)], [INPUT, uuid.uuid4().hex])
    if element.startswith(TFDS):
        dataset, dataset_parts = open_tfds(element, split, data_dir, part_bytes)
        return _Element(dataset_parts, dataset.identity(), takes_split=True)
    if storage.is_directory(element):
        if is_tfds_directory(element):
            raise InputError(f"'{element}' is a dataset of TFDS; read it as {TFDS}NAME, with its data_dir")
        if not is_saved_dataset(element):
            example = os.path.join(element, "*.jsonl")
            raise InputError(f"'{element}' is a directory; give its files, for example '{example}'")
        files, file_parts = open_saved_dataset(element, split, part_bytes)
        return _Element(file_parts, [file.identity() for file in files], takes_split=True)
    found = [storage.look_up(file) for file in storage.find(element)]
    formats = [options.get("format") or _format(file.path) for file in found]
    file_parts = []
    for file, name in zip(found, formats, strict=True):
        # Of several files some may be empty; in a file of no bytes nothing is wrong either.
        file_parts += _FORMATS[name].divide(file, reading, part_bytes) if file.size else []
    return _Element(file_parts, [file.identity() for file in found])


@dataclass(frozen=True)
class _Format:
    suffixes: tuple[str, ...]
    divide: Callable[[storage.StoredFile, Reading, int], Sequence[Part]]


def _lines(line_format: LineFormat) -> Callable[[storage.StoredFile, Reading, int], Sequence[Part]]:
    return lambda file, reading, size: line_parts(file, line_format, reading.encoding, size)


def _array_record(file: storage.StoredFile, reading: Reading, part_bytes: int) -> Sequence[Part]:
    # Its records are no texts, though short ones may look so.
    if is_tfds_directory(os.path.dirname(file.path)):
        raise InputError(f"'{file.path}' is of a dataset of TFDS; read that as {TFDS}NAME, with its data_dir")
    return array_record_parts(file, part_bytes)


_FORMATS = {
    "text": _Format((".txt", ".text", ".md", ".rst", ".log", ""), _lines("text")),
    "jsonl": _Format((".jsonl",), _lines("jsonl")),
    "json": _Format((".json",), _lines("json")),
    "tsv": _Format((".tsv",), _lines("tsv")),
    "csv": _Format((".csv",), _lines("csv")),
    "arrow": _Format((".arrow",), lambda file, reading, size: arrow_parts(file, size)),
    "parquet": _Format((".parquet",), lambda file, reading, size: parquet_parts(file, size)),
    "array_record": _Format((".array_record", ".arrayrecord"), _array_record),
}


def _format(file: str) -> str:
    """Returns the name of a file's format."""
    name = os.path.basename(file).lower().removesuffix(storage.compression(file))
    # As TFDS and others number the files of a set: x.array_record-00000-of-00008.
    suffix = os.path.splitext(re.sub(r"-\d+-of-\d+$", "", name))[1]
    for format_name, known in _FORMATS.items():
        if suffix in known.suffixes:
            return format_name
    allowed = [suffix for known in _FORMATS.values() for suffix in known.suffixes if suffix]
    single = len(_FORMATS["array_record"].suffixes)
    raise InputError(
        f"'{file}' has an unknown suffix '{suffix}'; allowed: {' '.join(allowed[:-single])}, plain or with .gz or"
        f" .zst, and {' '.join(allowed[-single:])}; any other needs its format, as in {{path: NAME, format: jsonl}}"
    )
