"""How a checkpoint gets onto the disk, and what makes sure that it did."""

import asyncio
import contextlib
import ctypes
import math
import os
import shutil
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from t5x_lite.training import integrity
from t5x_lite.training.checkpoint_files import Record, stored_arrays, write_record

# Arrays are stored as they are: compressing them saved 8 % of the disk, and took four times the processor's time and
# up to 1.5 times the state in memory. In parts of at most this size: reading one back takes little memory, and freed
# pieces of this size do not stay with the process (with parts of 32 MiB it kept half the state).
_PART_BYTES = 8 * 2**20


def handler() -> Any:
    """Returns what writes and reads one item in Orbax's format, without any waiting for other processes."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def named(items: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the arrays with their names; those of named tuples are as Orbax stores them, by field."""

    def plain(key: Any) -> str:
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))

    flat = jax.tree_util.tree_flatten_with_path(items)[0]
    return [("/".join(plain(key) for key in keys), leaf) for keys, leaf in flat]


def make_directories(partial: Path, items: dict[str, Any]) -> None:
    """Makes the directories that items are written to, anew."""
    shutil.rmtree(partial, ignore_errors=True)
    for name in items:
        (partial / name).mkdir(parents=True)


def start_writing(partial: Path, items: dict[str, Any]) -> list[Any]:
    """Copies this process's part of the arrays from its devices, and returns what to wait for until it is written."""
    _measure_waits_by_a_steady_clock()

    async def start() -> list[Any]:
        pending = []
        for name, tree in items.items():
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PART_BYTES), tree)
            args = ocp.args.PyTreeSave(tree, save_args=save_args)
            pending += await handler().async_save(epath.Path(partial / name), args=args) or []
        return pending

    with ThreadPoolExecutor(1) as pool:  # whoever calls may have an event loop of its own, as notebooks do
        return pool.submit(asyncio.run, start()).result()


def _measure_waits_by_a_steady_clock() -> None:
    """Gives Orbax's waits a clock that nobody sets: by the wall clock a save fails when that is put forward."""
    steady = types.SimpleNamespace(**{**vars(time), "time": time.monotonic})
    with contextlib.suppress(ImportError):  # another Orbax, with other files
        from orbax.checkpoint._src.futures import future, signaling_client

        for module in (future, signaling_client):
            module.time = steady  # type: ignore[assignment]


def wait_for(pending: list[Any], timeout: float | None) -> None:
    """Waits until all that `start_writing` returned is written, at most `timeout` seconds."""
    end = None if timeout is None else time.monotonic() + timeout
    for future in pending:
        future.result(timeout=None if end is None else max(1, math.ceil(end - time.monotonic())))


def complete(partial: Path, items: list[str], record: Record) -> None:
    """Joins what the processes have written, and adds the record."""
    for name in items:
        handler().finalize(epath.Path(partial / name))
    write_record(partial, record)


def check_written(partial: Path, fingerprints: dict[str, int], share: tuple[int, int]) -> dict[str, str]:
    """Reads back this process's share of files and arrays; returns the digests of the files.

    Raises:
      RuntimeError: an array is not what was saved.
    """
    found = integrity.digests(partial, share, fresh=True)
    arrays = stored_arrays(partial)
    if arrays.keys() != fingerprints.keys():
        raise RuntimeError(f"{min(arrays.keys() ^ fingerprints.keys())} was not written to {partial} as it was saved")
    for name in sorted(arrays)[share[0] :: share[1]]:
        if arrays[name].fingerprint() != fingerprints[name]:
            raise RuntimeError(
                f"{name}, as read back from {partial.parent}, is not what was saved: memory or disk cannot be relied on"
            )
    return found


def to_disk(directory: Path) -> None:
    """Brings a directory's names to the disk, so that a rename outlives a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_back_memory() -> None:
    """Returns to the system what glibc keeps of freed memory.

    Old states, and the parts that were read back, come from many threads, each with a heap of its own. Without this a
    process grew by the size of the state within a few saves; with it 50 saves leave what the first has left.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
