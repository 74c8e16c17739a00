"""TensorFlow's checkpoint files, read without TensorFlow.

A checkpoint `model.ckpt-7` is a file of names, `model.ckpt-7.index`, and files of bytes,
`model.ckpt-7.data-00000-of-00002` and so on. The index is a sorted string table as LevelDB defines it
(https://github.com/google/leveldb/blob/main/doc/table_format.md): blocks of keys that share their beginnings with the
key before, as they are or compressed with Snappy, then a block that says where those are, then a footer. The values are
protocol buffers, `BundleHeaderProto` and `BundleEntryProto` of tensorflow/core/protobuf/tensor_bundle.proto.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from t5x_lite.errors import InputError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two block handles, zeros, the magic number
TRAILER = 5  # bytes after each block: how it is compressed, and a checksum

# The numbers of tensorflow/core/framework/types.proto; what is not here (strings, resources) is no array.
DTYPES = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float64),
    3: np.dtype(np.int32),
    4: np.dtype(np.uint8),
    5: np.dtype(np.int16),
    6: np.dtype(np.int8),
    9: np.dtype(np.int64),
    10: np.dtype(np.bool_),
    14: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(np.uint16),
    19: np.dtype(np.float16),
    22: np.dtype(np.uint32),
    23: np.dtype(np.uint64),
}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor is.

    Attributes:
      shape: its sizes.
      dtype: of its numbers, little-endian; None: not numbers.
      file: the shard.
      offset: bytes before it there.
      size: its bytes.
      sliced: whether it is stored in pieces under other keys, which this module does not read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    file: Path
    offset: int
    size: int
    sliced: bool

    def read(self) -> np.ndarray:
        """Returns the array; its checksum is not compared.

        Raises:
          InputError: the shard is missing or too short, or holds it in a form that is not read here.
        """
        if self.dtype is None:
            raise InputError(f"{self.file}: a tensor that is not an array of numbers")
        if self.sliced:
            raise InputError(f"{self.file}: a tensor stored in slices; save it again from one process")
        count = int(np.prod(self.shape, dtype=np.int64))
        if count * self.dtype.itemsize != self.size:
            raise InputError(f"{self.file}: {self.size} bytes cannot be {self.dtype} of shape {list(self.shape)}")
        try:
            array = np.fromfile(self.file, self.dtype, count, offset=self.offset)
        except FileNotFoundError:
            raise InputError(f"data shard {self.file} is missing") from None
        if array.size != count:
            raise InputError(
                f"data shard {self.file} is cut short: {self.file.stat().st_size} bytes, and a tensor ends at"
                f" {self.offset + self.size}"
            )
        return array.reshape(self.shape)


def find(path: Path) -> Path | None:
    """Returns the prefix `.../model.ckpt-N` of the checkpoint at `path`, or None.

    Args:
      path: the prefix, its index file, or a directory: then the checkpoint that its file `checkpoint` calls the
        latest, or else the one with the largest number.
    """
    if path.is_dir():
        prefixes = [index.with_suffix("") for index in path.glob("*.index")]
        state = path / "checkpoint"
        named = re.search(r'^model_checkpoint_path: "(.*)"', _text(state), re.MULTILINE) if state.is_file() else None
        latest = path / Path(named[1]).name if named else None
        if latest in prefixes:
            return latest
        return max(prefixes, key=lambda prefix: int((re.findall(r"\d+$", prefix.name) or [-1])[0]), default=None)
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    return path if path.with_name(f"{path.name}.index").is_file() else None


def read_index(prefix: Path) -> dict[str, Tensor]:
    """Returns the tensors of the checkpoint `prefix` by name; no data shard is opened.

    Raises:
      InputError: the index is missing, damaged or of another kind.
    """
    path = prefix.with_name(f"{prefix.name}.index")
    try:
        rows = dict(_table(path.read_bytes()))
        header = _fields(rows[b""])
        if header.get(2, 0):
            raise ValueError("it is big-endian")
        return {
            # Pieces of sliced tensors have keys of their own, which begin with a zero byte.
            key.decode(): _tensor(prefix, value, shards=header.get(1, 1))
            for key, value in rows.items()
            if key and key[0]
        }
    except FileNotFoundError:
        raise InputError(f"there is no {path}") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as the index of a TensorFlow checkpoint: {error}") from error


def _tensor(prefix: Path, value: bytes, shards: int) -> Tensor:
    entry = _fields(value)
    sizes = [_fields(size).get(1, 0) for number, size in _pairs(entry.get(2, b"")) if number == 2]
    return Tensor(
        shape=tuple(sizes),
        dtype=DTYPES.get(entry.get(1, 0)),
        file=prefix.with_name(f"{prefix.name}.data-{entry.get(3, 0):05}-of-{shards:05}"),
        offset=entry.get(4, 0),
        size=entry.get(5, 0),
        sliced=7 in entry,
    )


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a sorted string table."""
    if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("it does not end as one does")
    position = len(data) - FOOTER
    for _ in range(2):  # the handle of the block of metadata, which TensorFlow leaves empty
        _, position = _varint(data, position)
    for _, handle in _entries(_block(data, data[position:])):
        yield from _entries(_block(data, handle))


def _block(data: bytes, handle: bytes) -> bytes:
    offset, position = _varint(handle, 0)
    size, _ = _varint(handle, position)
    body, trailer = data[offset : offset + size], data[offset + size : offset + size + TRAILER]
    checksum = _crc32c(body + trailer[:1])
    masked = (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    if len(trailer) < TRAILER or masked != int.from_bytes(trailer[1:], "little"):
        raise ValueError("a block's checksum differs: it is damaged")
    if trailer[0] > 1:
        raise ValueError(f"compression {trailer[0]} is unknown")
    return _snappy(body) if trailer[0] else body


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    key, position, end = b"", 0, len(block) - 4 * (restarts + 1)
    while position < end:
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        size, position = _varint(block, position)
        key = key[:shared] + block[position : position + own]
        yield key, block[position + own : position + own + size]
        position += own + size


def _snappy(data: bytes) -> bytes:
    """Decompresses what https://github.com/google/snappy/blob/main/format_description.txt describes."""
    length, position = _varint(data, 0)
    out = bytearray()
    while position < len(data):
        tag, position = data[position], position + 1
        kind, size = tag & 3, tag >> 2
        if kind == 0:  # bytes as they are
            if size >= 60:
                extra = size - 59
                size, position = int.from_bytes(data[position : position + extra], "little"), position + extra
            out += data[position : position + size + 1]
            position += size + 1
            continue
        if kind == 1:
            size, offset, position = (size & 7) + 4, (tag >> 5 << 8) | data[position], position + 1
        else:
            wide = 2 if kind == 2 else 4
            size, offset = size + 1, int.from_bytes(data[position : position + wide], "little")
            position += wide
        if not 0 < offset <= len(out):
            raise ValueError("a compressed block refers to bytes before its beginning")
        for _ in range(size):  # one by one: what is copied may be what was just written
            out.append(out[-offset])
    if len(out) != length:
        raise ValueError("a compressed block has another length than it says")
    return bytes(out)


def _fields(message: bytes) -> dict[int, Any]:
    """Returns the last value of each field of a protocol buffer, by number."""
    return dict(_pairs(message))


def _pairs(message: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(message, position)
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            value, position = int.from_bytes(message[position : position + width], "little"), position + width
        elif wire == 2:
            size, position = _varint(message, position)
            value, position = message[position : position + size], position + size
        else:
            raise ValueError(f"wire type {wire} is unknown")
        yield tag >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C = _crc32c_table()


def _crc32c(data: bytes) -> int:
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = (checksum >> 8) ^ _CRC32C[(checksum ^ byte) & 0xFF]
    return checksum ^ 0xFFFFFFFF
