"""From files to devices: strict comparison of names, and arrays that are never whole in host memory twice."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from t5x_lite.errors import CheckpointMismatch

Shape = tuple[int, ...]
Index = tuple[slice, ...]

_LISTED = 40  # lines of a mismatch; a checkpoint of another model differs in hundreds of tensors


def place(leaf: Any, fill: Callable[[np.ndarray, Index], None]) -> jax.Array:
    """Returns an array in its layout, every shard of it read on its own and put where it stays.

    What several devices hold is read once. On a CPU the array that was read into is the device's buffer.

    Args:
      leaf: `jax.ShapeDtypeStruct`; without a sharding the array lies on the first device.
      fill: writes the part of the array that the index (slices with numbers) selects into its first argument.
    """
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    layout: Any = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for device, index in layout.addressable_devices_indices_map(leaf.shape).items():
        part = tuple(piece.indices(size)[:2] for piece, size in zip(index, leaf.shape, strict=True))
        holders.setdefault(part, []).append(device)
    shards: list[jax.Array] = []
    for part, devices in holders.items():
        block = _aligned(tuple(stop - start for start, stop in part), np.dtype(leaf.dtype))
        fill(block, tuple(slice(start, stop) for start, stop in part))
        # Waiting lets the block go, where it was copied, before there is a second one.
        shards += jax.block_until_ready([jax.device_put(block, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, layout, shards)


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    # XLA takes a NumPy array as its own buffer, without a copy, if it starts at a multiple of 64 bytes.
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def check_tensors(
    where: str, have: Mapping[str, Shape], want: Mapping[str, Shape], optional: Iterable[str] = ()
) -> None:
    """Checks that the tensors of a file are those of the model, all of them and no others.

    Args:
      where: the checkpoint, for the message.
      have: names and shapes in the file.
      want: names and shapes that the model needs.
      optional: names among `want` that may be absent.

    Raises:
      CheckpointMismatch: a tensor is missing, unused or of another shape; the message has one line for each, with the
        name that comes nearest.
    """
    missing = sorted(want.keys() - have.keys() - set(optional))
    unused = sorted(have.keys() - want.keys())
    lines = [
        f"{name}: {have[name]} there, {want[name]} in the model"
        for name in sorted(want.keys() & have.keys())
        if have[name] != want[name]
    ]
    lines += [f"{name} {want[name]} is missing{_nearest(name, unused, have)}" for name in missing]
    lines += [f"{name} {have[name]} is not used{_nearest(name, missing, want)}" for name in unused]
    if lines:
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        raise CheckpointMismatch(
            "\n  ".join([f"{where} does not fit the model, {len(lines)} differences:", *lines[:_LISTED], *more])
        )


def _nearest(name: str, others: list[str], shapes: Mapping[str, Shape]) -> str:
    match = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
    return f"; nearest: {match[0]} {shapes[match[0]]}" if match else ""
