"""Records from files that are not lines of text: Parquet, Arrow and array_record."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from t5x_lite.data import parts, storage
from t5x_lite.data.parts import BATCH_BYTES, OnSkip, Reading, Record, Rows
from t5x_lite.errors import InputError

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class ParquetPart:
    """Some row groups of a Parquet file.

    Attributes:
      name: the file.
      groups: the first row group and the one behind the last; None: all.
      size: see `Part`.
    """

    name: str
    groups: tuple[int, int] | None = None
    size: int = 0

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:  # noqa: D102
        with parts.readable(self.name, " as Parquet"), storage.open_decompressed(self.name) as stream:
            table = _parquet_file(stream, self.name)
            names = table.schema_arrow.names
            wanted = list(dict.fromkeys(columns)) if columns and set(columns) <= set(names) else None
            first, last = self.groups or (0, table.num_row_groups)
            sizes = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
            number = sum(group.num_rows for group in sizes[:first])
            rows = sum(group.num_rows for group in sizes[first:last])
            if not rows:
                return
            batch = _batch_rows(sum(group.total_byte_size for group in sizes[first:last]), rows)
            for table_batch in table.iter_batches(batch, row_groups=range(first, last), columns=wanted):
                for record in table_batch.to_pylist():
                    number += 1
                    yield f"{self.name}:{number}", record


def parquet_parts(file: storage.StoredFile, part_bytes: int) -> list[ParquetPart]:
    """Divides a Parquet file at row groups; only one that is larger than a part is looked into."""
    if file.size <= part_bytes or storage.compression(file.path):
        return [ParquetPart(file.path, None, file.size)]
    with parts.readable(file.path, " as Parquet"), storage.open_binary(file.path) as stream:
        metadata = _parquet_file(stream, file.path).metadata
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    # What a row group takes in the file is not always known; its share of all of them is.
    total = sum(sizes) or 1
    out, first, share = [], 0, 0
    for group, size in enumerate(sizes, 1):
        share += size
        if share * file.size >= part_bytes * total or group == len(sizes):
            out.append(ParquetPart(file.path, (first, group), share * file.size // total))
            first, share = group, 0
    return out or [ParquetPart(file.path, None, file.size)]


def _parquet_file(stream: Any, name: str) -> Any:
    import pyarrow.parquet

    # Parquet needs random access: a compressed file is held whole.
    return pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()) if storage.compression(name) else stream)


def _batch_rows(size: int, rows: int) -> int:
    return max(1, min(1024, BATCH_BYTES * rows // max(size, 1)))


@dataclass(frozen=True)
class ArrowPart:
    """Record batches of an Arrow file, in the streaming format (as Hugging Face datasets are saved) or the file format.

    Attributes:
      name: the file.
      index: of the part.
      count: of parts. Batches of a stream belong to the part of the file in which their first byte lies, those of the
        file format are divided by their number.
      size: see `Part`.
    """

    name: str
    index: int = 0
    count: int = 1
    size: int = 0

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:  # noqa: D102
        number = 0
        with parts.readable(self.name, " as Arrow"), _open_arrow(self.name) as stream:
            for part, batch in self._batches(stream):
                if part > self.index:
                    return
                if part < self.index:
                    number += batch.num_rows
                    continue
                wanted = columns if set(columns) <= set(batch.schema.names) else ()
                for record in _arrow_records(batch, wanted):
                    number += 1
                    yield f"{self.name}:{number}", record

    def _batches(self, stream: Any) -> Iterator[tuple[int, Any]]:
        """Yields to which part each batch belongs, and the batch (of a local file a view, which reads nothing yet)."""
        import pyarrow

        magic = stream.read(6)
        stream.seek(0)
        if magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(stream)
            batches = reader.num_record_batches
            yield from ((batch * self.count // batches, reader.get_batch(batch)) for batch in range(batches))
            return
        size = stream.size()
        reader = pyarrow.ipc.open_stream(stream)
        while True:
            start = stream.tell()
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                break
            yield start * self.count // size, batch
        # Without this mark a stream that was cut between two batches would look complete.
        stream.seek(size - len(_END_OF_STREAM))
        if stream.read() != _END_OF_STREAM:
            raise InputError(f"cannot read '{self.name}' as Arrow: the stream has no end; it was cut short")


def arrow_parts(file: storage.StoredFile, part_bytes: int) -> list[ArrowPart]:
    """Divides an Arrow file at record batches."""
    is_divisible = not storage.compression(file.path)
    count = -(-file.size // part_bytes) if is_divisible and file.size > part_bytes else 1
    return [ArrowPart(file.path, index, count, file.size // count) for index in range(count)]


def _open_arrow(path: str) -> Any:
    import pyarrow

    if storage.compression(path):
        with storage.open_decompressed(path) as stream:
            return pyarrow.BufferReader(stream.read())
    if storage.is_remote(path):
        return pyarrow.PythonFile(storage.open_binary(path), mode="r")
    return pyarrow.memory_map(path)


def _arrow_records(batch: Any, columns: tuple[str, ...]) -> Iterator[Record]:
    if columns:
        batch = batch.select(list(dict.fromkeys(columns)))
    step = _batch_rows(batch.nbytes, batch.num_rows) if batch.num_rows else 1
    for start in range(0, batch.num_rows, step):
        yield from batch.slice(start, step).to_pylist()


@dataclass(frozen=True)
class ArrayRecordPart:
    """A range of the records of an array_record file: UTF-8 JSON objects, or plain texts.

    Attributes:
      name: the file.
      start: the first record.
      stop: the record behind the last; None for the end.
      size: see `Part`.
    """

    name: str
    start: int = 0
    stop: int | None = None
    size: int = 0

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:  # noqa: D102
        from t5x_lite.data.readers import parse_object

        reader = _array_record_reader(self.name)
        total = reader.num_records()
        # The first record says what all are, so that a text in braces among texts is one of them.
        is_json = _is_object(reader.read([0])[0])
        start, stop = self.start, total if self.stop is None else min(self.stop, total)
        step = 8  # before it is known how large records are
        while start < stop:
            batch = reader.read(start, min(start + step, stop))
            for number, raw in enumerate(batch, start + 1):
                where = f"{self.name}:{number}"
                try:
                    if len(raw) > reading.max_record_bytes:
                        raise InputError(f"longer than max_record_bytes={reading.max_record_bytes}")
                    text = raw.decode(reading.encoding)
                    record = parse_object(text) if is_json else {"text": text}
                except UnicodeDecodeError:
                    hint = "; a dataset that TFDS has written is read as tfds:NAME"
                    bad(where, f"neither a JSON object nor text in {reading.encoding}{hint}")
                except InputError as error:
                    bad(where, str(error))
                else:
                    yield where, record
            start += len(batch)
            step = _batch_rows(sum(map(len, batch)), len(batch))
        reader.close()


def array_record_parts(file: storage.StoredFile, part_bytes: int) -> list[ArrayRecordPart]:
    """Divides an array_record file; only one that is larger than a part is looked into."""
    if storage.is_remote(file.path):
        raise InputError(f"'{file.path}': array_record files are read from a local disk only; copy it there")
    if file.size <= part_bytes:
        return [ArrayRecordPart(file.path, size=file.size)]
    reader = _array_record_reader(file.path)
    total = reader.num_records()
    reader.close()
    spans = parts.spans(total, max(1, part_bytes * total // file.size))
    return [ArrayRecordPart(file.path, start, stop, file.size // len(spans)) for start, stop in spans]


def _array_record_reader(name: str) -> Any:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    with parts.readable(name, " as array_record"):
        storage.look_up(name)
        reader = array_record_module.ArrayRecordReader(name)
    # The library says neither that a file is none of its own nor that it was cut short: it finds nothing in it.
    if not reader.num_records():
        raise InputError(f"no records in '{name}': empty, cut short, or not an array_record file")
    return reader


def _is_object(raw: bytes) -> bool:
    if not re.match(rb"\s*\{", raw):
        return False
    try:
        return isinstance(json.loads(raw), dict)
    except ValueError:
        return False
