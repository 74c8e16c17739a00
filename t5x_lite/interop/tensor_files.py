"""The tensors of a published model's weight files, read one part at a time; and safetensors files, written.

Bytes are read from the file into the array that is returned, and files are not mapped into memory: pages of a mapped
file count as the process's memory until they are unmapped, so that after a while the whole model would be there twice.
That, and bfloat16, which it does not give to NumPy, is why the safetensors library is not used here. The format:
https://huggingface.co/docs/safetensors (8 bytes: the length of the header; the header as JSON; the data).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from t5x_lite.errors import InputError

Tensor = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]
"""A tensor to be written: name, shape, dtype, and the function that gives it when its turn comes."""

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
WEIGHT_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
# Half of what Linux reads ahead by default: a gap shorter than this comes from the disk anyway.
_BLOCK = 1 << 16


class TensorFiles(Protocol):
    """Named tensors in one or more files; nothing of their values has been read.

    Attributes:
      shapes: every tensor's name and shape.
      dtypes: every tensor's name and dtype; `ml_dtypes.bfloat16` for bfloat16.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads one tensor, or the part of it that `index` selects; only that part comes from the disk.

        Args:
          name: one of `shapes`.
          index: a slice for each of the leading axes; their steps are positive.

        Returns:
          A new array, in C order, of the dtype in `dtypes`.

        Raises:
          InputError: the file is gone, or shorter than it was; or there is no memory for the array.
        """
        ...


def open_tensors(directory: Path) -> TensorFiles:
    """Opens the weights in a directory as the Hugging Face Hub has them.

    Args:
      directory: holds one of `model.safetensors`, `model.safetensors.index.json` and its shards, `pytorch_model.bin`,
        `pytorch_model.bin.index.json` and its shards; the first of these that is there is taken.

    Raises:
      InputError: none is there; or a file is missing, cut short, damaged, or asks for anything but tensors.
    """
    # Here, because that module's tensors are `StoredTensor`s too.
    from t5x_lite.interop.torch_files import list_torch_tensors

    formats = {"model.safetensors": _list_safetensors, "pytorch_model.bin": list_torch_tensors}
    for name, list_tensors in formats.items():
        file, index = directory / name, directory / f"{name}.index.json"
        if file.is_file():
            return _Tensors(_list_file(file, list_tensors))
        if index.is_file():
            return _Tensors(_list_shards(index, list_tensors))
    raise InputError(f"no weights in '{directory}'; looked for {', '.join(WEIGHT_FILES)}")


def write_safetensors(path: Path, tensors: Iterable[Tensor]) -> None:
    """Writes one safetensors file, with one tensor in memory at a time.

    The file has its name only when it is complete; one that was there before is replaced.

    Args:
      path: the file.
      tensors: name, shape, dtype, and a function that returns the array; it is called once.

    Raises:
      InputError: the file cannot be written.
      ValueError: a repeated name, a dtype that the format lacks, or an array that is not of its shape and dtype.
    """
    # As the library does: with the widest first, every tensor begins at a multiple of its item's size.
    ordered = sorted(tensors, key=lambda tensor: -np.dtype(tensor[2]).itemsize)
    header = _header(ordered)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for tensor in ordered:
                _write_tensor(stream, *tensor)
        partial.rename(path)
    except OSError as error:
        raise InputError(f"could not write '{path}': {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's elements are.

    Attributes:
      file: the file.
      start: the byte at which its first element begins.
      dtype: of the elements.
      shape: its shape.
      strides: for each axis, how many elements further its next element is; none is negative.
      big_endian: the elements' bytes are in the other order.
    """

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    big_endian: bool = False

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the tensor or a part of it, as `TensorFiles.read`; `name` is for messages."""
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} slices for {name!r} of shape {self.shape}")
        full = (slice(None),) * (len(self.shape) - len(index))
        parts = [range(size)[part] for size, part in zip(self.shape, index + full, strict=True)]
        if any(part.step < 0 for part in parts):
            raise IndexError(f"{name!r} cannot be read backwards")
        try:
            out = np.empty([len(part) for part in parts], self.dtype)
        except (MemoryError, ValueError, OverflowError) as error:
            raise InputError(f"{name!r} of '{self.file}' cannot be held in memory: {error}") from error
        if out.size:
            first = sum(part.start * stride for part, stride in zip(parts, self.strides, strict=True))
            strides = tuple(part.step * stride for part, stride in zip(parts, self.strides, strict=True))
            try:
                with self.file.open("rb") as stream:
                    _fill(out, stream, self.start + first * out.itemsize, strides)
            except (OSError, EOFError) as error:
                raise InputError(f"cannot read {name!r} from '{self.file}': {error}") from error
        if self.big_endian:
            # As integers, because ml_dtypes' arrays do not swap.
            out.view(f"u{out.itemsize}").byteswap(inplace=True)
        return out


class _Tensors:
    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes: Mapping[str, np.dtype] = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self._tensors[name].read(name, index)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides, in elements, of an array of this shape in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _fill(out: np.ndarray, stream: BufferedReader, start: int, strides: tuple[int, ...]) -> None:
    """Fills `out` (not empty) with the elements that begin at byte `start`, `strides` elements apart."""
    span = (1 + sum((size - 1) * stride for size, stride in zip(out.shape, strides, strict=True))) * out.itemsize
    dense = zip(out.shape, strides, contiguous_strides(out.shape), strict=True)
    if out.flags.c_contiguous and all(size == 1 or have == want for size, have, want in dense):
        _read_into(stream, start, out.reshape(-1).view(np.uint8))
    elif span <= _BLOCK:
        buffer = np.empty(span, np.uint8)
        _read_into(stream, start, buffer)
        byte_strides = [stride * out.itemsize for stride in strides]
        out[...] = np.lib.stride_tricks.as_strided(buffer.view(out.dtype), out.shape, byte_strides)
    else:
        axis = max(range(out.ndim), key=lambda axis: strides[axis] if out.shape[axis] > 1 else -1)
        half = out.shape[axis] // 2
        before = (slice(None),) * axis
        _fill(out[(*before, slice(half))], stream, start, strides)
        _fill(out[(*before, slice(half, None))], stream, start + half * strides[axis] * out.itemsize, strides)


def _read_into(stream: BufferedReader, start: int, target: np.ndarray) -> None:
    stream.seek(start)
    count = stream.readinto(target.data)
    if count != target.size:
        raise EOFError(f"it ends {target.size - count} bytes too early")


def _list_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read '{file}': it is no safetensors file, or cut short in its header") from error
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"} if type(header) is dict else {}
    if not entries:
        raise InputError(f"'{file}' has no tensors in its header")
    spans = sorted((*_span(file, name, entry), name) for name, entry in entries.items())
    end = 0
    for begin, after, name in spans:
        if begin != end:
            raise InputError(
                f"'{file}': tensor {name!r} begins at byte {begin}, not where the one before it ends, {end}"
            )
        if 8 + length + after > size:
            raise InputError(f"'{file}' is cut short: tensor {name!r} ends at byte {8 + length + after} of {size}")
        end = after
    if 8 + length + end != size:
        raise InputError(f"'{file}' has {size - 8 - length - end} bytes after its last tensor, {spans[-1][2]!r}")
    tensors = {}
    for name, entry in entries.items():
        start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        tensors[name] = StoredTensor(file, start, _DTYPES[entry["dtype"]], shape, contiguous_strides(shape))
    return tensors


def _span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """Returns where the data of a tensor begins and ends, counted from the header's end, when its entry is sound."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = type(dtype) is str and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        dtype, shape, begin, end, sound = "", (), 0, 0, False
    if not sound:
        raise InputError(f"'{file}': the header's entry of tensor {name!r} is damaged")
    if dtype not in _DTYPES:
        raise InputError(f"'{file}': tensor {name!r} has dtype {dtype!r}; allowed: {', '.join(_DTYPES)}")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise InputError(f"'{file}': tensor {name!r} has {end - begin} bytes; {dtype} of shape {shape} needs {needed}")
    return begin, end


def _list_file(file: Path, list_tensors: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    # What a clone of a model's repository has, where Git LFS is not installed.
    if file.stat().st_size < 1000 and file.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"'{file}' is a Git LFS pointer and not the weights; fetch them with 'git lfs pull'")
    return list_tensors(file)


def _list_shards(index: Path, list_tensors: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = index.parent / shard
        if not file.is_file():
            lost = next(name for name, place in weight_map.items() if place == shard)
            raise InputError(f"'{file}' is missing; '{index.name}' has tensor {lost!r} there")
        found = _list_file(file, list_tensors)
        for name in (name for name, place in weight_map.items() if place == shard):
            if name not in found:
                raise InputError(f"'{file}' has no tensor {name!r}, which '{index.name}' has there")
            tensors[name] = found[name]
        for name in found.keys() - tensors.keys():
            raise InputError(f"'{file}' has tensor {name!r}, which '{index.name}' does not have there")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {name: Path(shard).name == shard for name, shard in weight_map.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"'{index}' is no index of weights: it needs a 'weight_map' of tensor to file") from error
    for name, is_name in files.items():
        if not is_name:
            # An index is from the network as the weights are, and must not reach other directories.
            raise InputError(f"'{index}' has tensor {name!r} in {weight_map[name]!r}, which is not a plain file name")
    if not weight_map:
        raise InputError(f"'{index}' names no tensors")
    return weight_map


def _header(tensors: Sequence[Tensor]) -> bytes:
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    # transformers refuses a file that does not say of which framework its tensors are, and knows pt, tf, flax and mlx.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype, _ in tensors:
        dtype = np.dtype(dtype)
        if name in header:
            raise ValueError(f"two tensors are named {name!r}")
        if dtype not in codes:
            raise ValueError(f"tensor {name!r} has dtype {dtype}; safetensors has {', '.join(map(str, codes))}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_tensor(
    stream: BinaryIO, name: str, shape: tuple[int, ...], dtype: np.dtype, give: Callable[[], np.ndarray]
) -> None:
    array = np.asarray(give())
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise ValueError(f"{name!r} is {array.dtype} of shape {array.shape}, not {dtype} of shape {tuple(shape)}")
    # As bytes, because ml_dtypes' arrays are no buffers.
    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
