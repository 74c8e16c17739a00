"""Tensors in the files of `torch.save`, found without PyTorch and without running anything that the file asks for.

Such a file is a pickle, which is a program: it names functions and has them called. Here it gets, in place of the few
functions that make tensors, ones that write down where the tensor's bytes are; any other name is refused. There are two
containers, both of which `torch.load` still reads: a zip archive (PyTorch 1.6 and later), and before that several
pickles and the raw storages one after the other. See `torch/serialization.py` and `torch/_utils.py` of PyTorch.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from t5x_lite.errors import InputError
from t5x_lite.interop.tensor_files import StoredTensor

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before 1.6
_WRAPPERS = ("state_dict", "model")

_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


def list_torch_tensors(file: Path) -> dict[str, StoredTensor]:
    """Finds the tensors in a file of `torch.save`.

    Args:
      file: holds a dict of name to tensor, or a dict that has one under `state_dict` or `model`.

    Raises:
      InputError: the file cannot be read, is cut short or damaged, holds anything else, or asks for a function that
        no tensor needs.
    """
    try:
        with file.open("rb") as stream:
            archive = stream.read(4) == b"PK\x03\x04"
            return _from_archive(file, stream) if archive else _from_sequence(file, stream)
    except InputError:
        raise
    except Exception as error:
        # What a damaged archive or pickle raises is not to be foreseen; pickle's own documentation says so.
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read '{file}'; it is cut short, damaged, or not from torch.save ({why})") from error


class _Storage(NamedTuple):
    dtype: str
    key: str
    count: int  # of elements


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Place(NamedTuple):
    start: int
    size: int  # in bytes


class _StandIn:
    """What a pickle gets in place of a function: it can be called, and a pickle can do nothing else to it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Dict(dict):
    """In place of an OrderedDict. A module's state_dict carries an attribute, `_metadata`, which says nothing here."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    if type(storage) is not _Storage:
        raise pickle.UnpicklingError("a tensor without storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor whose shape, strides or offset cannot be")
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    if metadata:
        raise pickle.UnpicklingError("a tensor that is conjugated or negated when it is used")
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> _Tensor:
    if type(dtype) is not str or dtype not in _DTYPES:
        raise pickle.UnpicklingError("a tensor of unknown dtype")
    return _rebuild_tensor_v2(storage, offset, shape, strides, grad, hooks, metadata)._replace(dtype=dtype)


def _rebuild_parameter(data: Any, *rest: Any) -> _Tensor:
    if type(data) is not _Tensor:
        raise pickle.UnpicklingError("a parameter without tensor")
    return data


# Stand-ins and strings only: of a class or a NumPy dtype a pickle could change the attributes.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _StandIn(_Dict),
    ("torch._utils", "_rebuild_tensor"): _StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _StandIn(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _StandIn(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _StandIn(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _StandIn(_rebuild_parameter),
    ("torch.storage", "UntypedStorage"): "uint8",
    ("torch", "DoubleStorage"): "float64",
    ("torch", "FloatStorage"): "float32",
    ("torch", "HalfStorage"): "float16",
    ("torch", "BFloat16Storage"): "bfloat16",
    ("torch", "LongStorage"): "int64",
    ("torch", "IntStorage"): "int32",
    ("torch", "ShortStorage"): "int16",
    ("torch", "CharStorage"): "int8",
    ("torch", "ByteStorage"): "uint8",
    ("torch", "BoolStorage"): "bool",
    **{("torch", name): name for name in _DTYPES},
}


# The unpickler written in Python: the one in C makes room for whatever number of objects a pickle claims to have.
class _Unpickler(pickle._Unpickler):
    def __init__(self, file: Path, stream: BinaryIO):
        # PyTorch's choice for the strings of Python 2.
        super().__init__(stream, encoding="utf-8")  # pyright: ignore[reportCallIssue]
        self.file = file
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise InputError(f"'{self.file}' asks for {f'{module}.{name}'!r}, which no tensor needs; refused")
        return admitted

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in _DTYPES or type(key) is not str or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage of unknown kind")
        if view not in ([], [None]):
            raise pickle.UnpicklingError("a storage that is part of another")
        storage = _Storage(dtype, key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"two descriptions of storage {key}")
        return storage


def _from_archive(file: Path, stream: BinaryIO) -> dict[str, StoredTensor]:
    with zipfile.ZipFile(stream) as archive:
        members = {member.filename: member for member in archive.infolist()}
        roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1 or "/" in roots[0]:
            raise InputError(f"'{file}' is a zip archive, but not from torch.save: it needs one data.pkl")
        if packed := [name for name, member in members.items() if member.compress_type != zipfile.ZIP_STORED]:
            raise InputError(f"'{file}': {packed[0]!r} is compressed; torch.save does not compress")
        order = members.get(f"{roots[0]}/byteorder")
        big_endian = order is not None and archive.read(order) == b"big"
        unpickler = _Unpickler(file, io.BytesIO(archive.read(members[f"{roots[0]}/data.pkl"])))
        tensors = _named_tensors(file, unpickler.load())
    places = {}
    for key in unpickler.storages:
        if (member := members.get(f"{roots[0]}/data/{key}")) is not None:
            places[key] = _member_place(stream, member)
    return _stored(file, stream, tensors, places, big_endian)


def _member_place(stream: BinaryIO, member: zipfile.ZipInfo) -> _Place:
    # The directory says where a member's own header begins; that one says how long it is, padding included.
    stream.seek(member.header_offset)
    header = stream.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise zipfile.BadZipFile(f"{member.filename} is not where it should be")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return _Place(member.header_offset + 30 + name + extra, member.file_size)


def _from_sequence(file: Path, stream: BinaryIO) -> dict[str, StoredTensor]:
    stream.seek(0)
    if _Unpickler(file, stream).load() != _MAGIC:
        raise InputError(f"'{file}' is not from torch.save: it begins neither as a zip archive nor as PyTorch's files")
    for _ in ("version", "sizes of types"):
        _Unpickler(file, stream).load()
    unpickler = _Unpickler(file, stream)
    tensors = _named_tensors(file, unpickler.load())
    places = {}
    for key in _Unpickler(file, stream).load():
        storage = unpickler.storages[key]
        count = int.from_bytes(stream.read(8), "little")
        if count != storage.count:
            raise pickle.UnpicklingError(f"storage {key} has {count} elements, not {storage.count}")
        # These are in little-endian order whatever the machine was.
        places[key] = _Place(stream.tell(), count * _DTYPES[storage.dtype].itemsize)
        stream.seek(places[key].size, os.SEEK_CUR)
    return _stored(file, stream, tensors, places, big_endian=False)


def _named_tensors(file: Path, content: Any) -> dict[str, _Tensor]:
    if isinstance(content, dict):
        wrapped = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        if len(wrapped) > 1:
            raise InputError(f"'{file}' has both 'state_dict' and 'model'; one of them is to hold the tensors")
        content = content[wrapped[0]] if wrapped else content
    if not isinstance(content, dict) or not content:
        raise InputError(f"'{file}' holds {_kind(content)}, not a dict of tensors")
    for name, tensor in content.items():
        if type(name) is not str:
            raise InputError(f"'{file}' names a tensor by {_kind(name)}, not a string")
        if type(tensor) is not _Tensor:
            raise InputError(f"'{file}' has {_kind(tensor)} at {name!r}, not a tensor")
    return dict(content)


def _kind(value: Any) -> str:
    # Not the value itself: a short pickle can make one that takes forever to print.
    return "nothing" if value == {} else f"an object of type {type(value).__name__.strip('_').lower()}"


def _stored(
    file: Path, stream: BinaryIO, tensors: dict[str, _Tensor], places: dict[str, _Place], big_endian: bool
) -> dict[str, StoredTensor]:
    file_size = os.fstat(stream.fileno()).st_size
    found = {}
    for name, tensor in tensors.items():
        place = places.get(tensor.storage.key)
        if place is None:
            raise InputError(f"'{file}' has no data of tensor {name!r}")
        if place.start + place.size > file_size:
            raise InputError(f"'{file}' is cut short: the data of tensor {name!r} is not all there")
        dtype = _DTYPES[tensor.dtype]
        claimed = tensor.storage.count * _DTYPES[tensor.storage.dtype].itemsize
        _check_extent(file, name, tensor, min(place.size, claimed))
        start = place.start + tensor.offset * dtype.itemsize
        found[name] = StoredTensor(file, start, dtype, tensor.shape, tensor.strides, big_endian)
    return found


def _check_extent(file: Path, name: str, tensor: _Tensor, size: int) -> None:
    """Raises InputError unless every element of a tensor is within the `size` bytes of its storage."""
    if 0 in tensor.shape:
        return
    room = size // _DTYPES[tensor.dtype].itemsize
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    count = math.prod(tensor.shape)
    # A stride of 0 repeats elements. A small file could so ask for any amount of memory, and no weights are like that.
    if last >= room or count > room:
        raise InputError(
            f"'{file}': tensor {name!r} of shape {tensor.shape} has more elements than its storage, {room}"
        )
