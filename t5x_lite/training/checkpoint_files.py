"""Checkpoints as they lie on the disk: what is in them, read without a model and without touching a device.

A checkpoint is a directory `checkpoints/<step>/` with a directory an item (`params`, `optimizer`, `progress`, and
`ema` where there is one), each an Orbax tree of arrays; a record of what was saved; and a seal over the files.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from t5x_lite.errors import InputError
from t5x_lite.run_directory import complete_steps
from t5x_lite.training.integrity import UnreadableCheckpoint, compare, part_of_fingerprint

RECORD = "checkpoint.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """What is noted beside the arrays when a checkpoint is saved.

    Attributes:
      time: when, in seconds since 1970; None: written before there were records.
      loss: validation loss at this step; None: not evaluated there.
      fingerprints: of every array, by item and name, such as `params/decoder/norm/scale`.
    """

    time: float | None = None
    loss: float | None = None
    fingerprints: Mapping[str, int] = dataclasses.field(default_factory=dict)


def write_record(path: Path, record: Record) -> None:
    """Writes the record of a checkpoint that is being made."""
    (path / RECORD).write_text(json.dumps(dataclasses.asdict(record), indent=1))


def read_record(path: Path) -> Record:
    """Returns the record of a checkpoint; an empty one of those from before there were any.

    Raises:
      UnreadableCheckpoint: there is one that cannot be read.
    """
    try:
        record = Record(**json.loads((path / RECORD).read_text()))
        if not all(isinstance(number, int | float | None) for number in (record.time, record.loss)):
            raise TypeError("time and loss are numbers")
        return dataclasses.replace(record, fingerprints=dict(record.fingerprints))
    except FileNotFoundError:
        return Record()
    except (ValueError, TypeError) as error:
        raise UnreadableCheckpoint(f"checkpoint {path} is damaged: {RECORD} cannot be read") from error


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a checkpoint; what it holds is read when it is asked for.

    Attributes:
      name: its item and its name in there, such as `params/decoder/norm/scale`.
      store: the open array.
    """

    name: str
    store: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size along every axis."""
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return self.store.dtype.numpy_dtype

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """Returns its values, or those of a part.

        Raises:
          UnreadableCheckpoint: they cannot be read.
        """
        try:
            return self.store[part].read().result() if part else self.store.read().result()
        except ValueError as error:
            raise UnreadableCheckpoint(f"{self.name} cannot be read: {first_line(error)}") from error

    def parts(self) -> Iterator[tuple[slice, ...]]:
        """Yields the parts as it is stored in, each of which can be read without reading another."""
        sizes = self.store.chunk_layout.read_chunk.shape or ()  # None: a scalar
        starts = (range(0, length, size) for length, size in zip(self.shape, sizes, strict=True))
        for corner in itertools.product(*starts):
            yield tuple(
                slice(begin, min(begin + size, length))
                for begin, size, length in zip(corner, sizes, self.shape, strict=True)
            )

    def fingerprint(self) -> int:
        """Returns the fingerprint of what is stored; reads it a part at a time."""
        total = 0
        for part in self.parts():
            total += part_of_fingerprint(self.read(part), [along.start for along in part], self.shape)
        return total % 2**32


def stored_arrays(path: Path, cache: int = 0) -> dict[str, StoredArray]:
    """Opens every array of a checkpoint, by item and name; reads none of them.

    Args:
      path: the checkpoint.
      cache: bytes of stored parts to keep, for whoever reads across them.

    Raises:
      UnreadableCheckpoint: one cannot be opened, or there is nothing.
    """
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache}})
    opening: dict[str, Any] = {}
    try:
        for metadata in sorted(path.glob("*/_METADATA")):
            for name, spec in _specs(metadata.parent).items():
                opening[f"{metadata.parent.name}/{name}"] = tensorstore.open(
                    spec, open=True, read=True, context=context
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    if not opening:
        raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: it holds no arrays")
    found = {}
    for name, store in opening.items():
        try:
            found[name] = StoredArray(name, store.result())
        except ValueError as error:
            raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: {name}: {first_line(error)}") from error
    return found


def _specs(item: Path) -> dict[str, dict[str, Any]]:
    metadata = json.loads((item / "_METADATA").read_text())
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    specs = {}
    for row in metadata["tree_metadata"].values():
        if row["value_metadata"].get("skip_deserialize", False):
            continue  # a place in the tree where there is no array
        keys = [str(part["key"]) for part in row["key_metadata"]]
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{item / '.'.join(keys)}/"}
        if (item / "manifest.ocdbt").is_file():
            base = {"driver": "file", "path": f"{item}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(keys)}/"}
        # A chunk that is not there would count as zeros.
        specs["/".join(keys)] = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
    return specs


def items(path: Path) -> list[str]:
    """Returns the names of the trees in a checkpoint."""
    return sorted(metadata.parent.name for metadata in path.glob("*/_METADATA"))


def size(path: Path) -> int:
    """Returns the bytes that the files of a directory hold."""
    return sum(os.stat(file).st_size for file in path.rglob("*") if file.is_file())


def read_numpy(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint as NumPy arrays: no model is built, and no accelerator is needed or touched.

    Args:
      path: a checkpoint, or a run directory, of which the latest is read.

    Returns:
      Nested dicts: `params`, `optimizer`, `progress` and, where there is one, `ema`; each leaf an array as it was
      saved, to the bit. Tuples of the optimizer have become dicts with keys "0", "1", ...

    Raises:
      InputError: there is no checkpoint.
      UnreadableCheckpoint: it is damaged; the message names the file.
    """
    checkpoint = find_checkpoint(path)
    check_files(checkpoint)
    tree: dict[str, Any] = {}
    for name, array in stored_arrays(checkpoint).items():
        *outer, last = name.split("/")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = array.read()
    return tree


def check_files(checkpoint: Path) -> None:
    """Compares a checkpoint's files with its seal, if it has one.

    Raises:
      UnreadableCheckpoint: it is damaged; the message names the file.
    """
    damage = compare(checkpoint).damage
    if damage:
        raise UnreadableCheckpoint(f"checkpoint {checkpoint} is damaged: {damage[0]}")


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint that a path means: itself, or the latest of a run.

    Raises:
      InputError: there is none.
    """
    path = Path(path).expanduser()
    if path.parent.name == "checkpoints" or items(path):
        if not path.is_dir():
            steps = ", ".join(map(str, complete_steps(path.parent))) or "none"
            raise InputError(f"there is no checkpoint {path}; steps that are there: {steps}")
        return path.absolute()
    directory = path if path.name == "checkpoints" else path / "checkpoints"
    steps = complete_steps(directory)
    if not steps:
        raise InputError(
            f"'{path}' {holds_none(path)}; give a run directory or one of its checkpoints, RUN/checkpoints/STEP"
        )
    return (directory / str(steps[-1])).absolute()


def holds_none(path: Path) -> str:
    """Returns why there is no checkpoint at a path, as the end of a sentence that begins with it."""
    return "holds no checkpoint" if path.is_dir() else "is a file" if path.exists() else "does not exist"


def why_kept(losses: Mapping[int, float | None], keep: int, keep_every: int) -> dict[int, list[str]]:
    """Returns why each checkpoint is kept; no reasons: it may go.

    Args:
      losses: validation loss by step; None where there was no evaluation.
      keep: how many of the latest to keep.
      keep_every: steps that divide by this are kept for good; 0: none are.
    """
    steps = sorted(losses)
    reasons: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-keep:]:
        reasons[step].append("latest" if step == steps[-1] else f"last {keep}")
    known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if known:
        reasons[min(known, key=lambda step: (known[step], -step))].append("best")
    for step in steps:
        if keep_every and step % keep_every == 0:
            reasons[step].append(f"every {keep_every}")
    return reasons


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
