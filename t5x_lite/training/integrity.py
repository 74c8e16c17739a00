"""Whether a checkpoint is what was saved: fingerprints of its arrays, and a seal over its files.

A *fingerprint* follows from the values of an array and their places alone. It is computed on the devices where the
array lies, and again from what was read back from the disk: so everything between the two is checked, the copy to the
host, the encoding and the writing. It is a sum over all numbers, so parts may come in any order and of any shape, and
a checkpoint that was saved on one mesh can be compared on another. A single number that differs always shows; more of
them by chance escape once in 2**32.

A *seal* holds the SHA-256 of every file. It is written when the fingerprints have been found right, and whatever
happens to the files afterwards shows without reading an array.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SEAL = "checksums.json"

# MurmurHash3's finalizer, before which the number's place is mixed in: for any place a bijection of 32 bits.
_PLACE, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_BLOCK = 1 << 15  # numbers at a time, so that the steps between stay in the processor's cache
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # by size in bytes; of eight, each half by itself


class UnreadableCheckpoint(Exception):
    """A checkpoint directory that cannot be restored; the message says why, in one line."""


def fingerprints(arrays: dict[str, Any]) -> dict[str, int]:
    """Returns the fingerprint of each array, below 2**32, computed where the arrays lie.

    In several processes it is a computation of all of them, as any other on a global array. One array after the other:
    in one program they would take more memory at once, and many programs in flight that each reduce over groups of
    devices can, on the CPU, wait for each other until XLA ends the process.
    """
    return {name: int(_on_devices(_replicated(x))(x)) for name, x in arrays.items()}


def _replicated(x: Any) -> NamedSharding | None:
    layout = x.sharding if isinstance(x, jax.Array) else None
    return NamedSharding(layout.mesh, PartitionSpec()) if isinstance(layout, NamedSharding) else None


@functools.cache
def _on_devices(layout: NamedSharding | None) -> Any:
    return jax.jit(_sum_of_mixed, out_shardings=layout)


def _sum_of_mixed(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits ^ (place * np.uint32(_PLACE))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(_FIRST)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(_SECOND)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def part_of_fingerprint(values: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """Returns what a part adds to an array's fingerprint, modulo 2**32.

    Args:
      values: the part, of as many axes as the array.
      start: where it begins in the array.
      shape: of the whole array.
    """
    values = np.ascontiguousarray(values).reshape(values.shape)  # of NumPy's own making a scalar gets an axis
    halves = (2,) if values.dtype.itemsize == 8 else ()
    bits = values.reshape(-1).view(_UNSIGNED[values.dtype.itemsize]).reshape(*(values.shape + halves or (1,)))
    shape, start = (*shape, *halves) or (1,), (*start, *(0 for _ in halves)) or (0,)
    # The place of the first number of every row of the part, by the strides of the whole.
    row_places, stride = np.full(1, start[-1] % 2**32, np.uint32), 1
    for axis in reversed(range(bits.ndim - 1)):
        stride *= shape[axis + 1]
        along = (np.arange(bits.shape[axis], dtype=np.uint64) + start[axis]) * (stride % 2**32)
        row_places = np.add.outer(along.astype(np.uint32), row_places).reshape(-1)
    rows = bits.reshape(-1, bits.shape[-1])
    column = np.arange(rows.shape[1], dtype=np.uint32) * np.uint32(_PLACE)
    row_places = row_places * np.uint32(_PLACE)
    total, at_once = 0, max(1, _BLOCK // max(1, rows.shape[1]))
    for i in range(0, len(rows), at_once):
        for j in range(0, rows.shape[1], _BLOCK):
            mixed = row_places[i : i + at_once, None] + column[j : j + _BLOCK]
            mixed ^= rows[i : i + at_once, j : j + _BLOCK]
            mixed = (mixed ^ (mixed >> 16)) * np.uint32(_FIRST)
            mixed = (mixed ^ (mixed >> 13)) * np.uint32(_SECOND)
            total += int((mixed ^ (mixed >> 16)).sum(dtype=np.uint64))
    return total % 2**32


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a comparison of a checkpoint's files with its seal found; names are relative to the checkpoint.

    Attributes:
      sealed: whether there is a seal; without one nothing was compared.
      changed: files with another content than was sealed, truncated ones among them.
      missing: files that were sealed and are not there.
      extra: files that are there and were not sealed.
    """

    sealed: bool
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def damage(self) -> list[str]:
        """Returns what has changed and what is missing, a phrase each."""
        changed = [f"{name} has changed" for name in self.changed]
        return changed + [f"{name} is missing" for name in self.missing]


def digests(path: Path, share: tuple[int, int] = (0, 1), *, fresh: bool = False) -> dict[str, str]:
    """Returns the SHA-256 of a checkpoint's files by their relative names, the seal's own left out.

    Args:
      path: the checkpoint.
      share: (index, count): only every `count`-th file, beginning with the `index`-th.
      fresh: files have just been written: bring them to the disk first, and drop them from the system's cache where
        it lets us, so that what is read is what the disk holds.
    """
    found = {}
    for name in _files(path)[share[0] :: share[1]]:
        with (path / name).open("rb") as stream:
            if fresh:
                os.fsync(stream.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def seal(path: Path, found: dict[str, str]) -> None:
    """Writes the seal of a checkpoint, completely or not at all; it holds a sum of its own, too."""
    partial = path / f"{SEAL}.partial"
    with partial.open("w") as stream:
        json.dump({**found, SEAL: _sum_of(found)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path / SEAL)


def compare(path: Path, share: tuple[int, int] = (0, 1)) -> Findings:
    """Compares a checkpoint's files with its seal.

    Args:
      path: the checkpoint.
      share: as in `digests`, which files are read; all are looked for.

    Raises:
      UnreadableCheckpoint: the seal itself cannot be read.
    """
    try:
        expected = dict[str, str](json.loads((path / SEAL).read_text()))
    except FileNotFoundError:
        return Findings(sealed=False)
    except (ValueError, TypeError):
        raise UnreadableCheckpoint(f"checkpoint {path} is damaged: {SEAL} cannot be read") from None
    if expected.pop(SEAL, None) not in (None, _sum_of(expected)):  # None: from before it had one
        raise UnreadableCheckpoint(f"checkpoint {path} is damaged: {SEAL} has changed")
    names = sorted(expected)
    there = set(_files(path))
    found = digests(path, share)
    return Findings(
        sealed=True,
        changed=tuple(name for name in names if name in found and found[name] != expected[name]),
        missing=tuple(name for name in names if name not in there),
        extra=tuple(sorted(there - expected.keys())),
    )


def _sum_of(found: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> list[str]:
    files = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith(SEAL))
    return sorted(str(file.relative_to(path)) for file in files)
