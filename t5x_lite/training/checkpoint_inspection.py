"""What there is to say about checkpoints without a model: which there are, whether they are sound, how two differ.

Arrays are read a stored part at a time, so a checkpoint may be larger than memory.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t5x_lite.errors import InputError
from t5x_lite.run_directory import UNREADABLE, complete_steps
from t5x_lite.training import integrity
from t5x_lite.training.checkpoint_files import (
    RECORD,
    Record,
    StoredArray,
    check_files,
    find_checkpoint,
    holds_none,
    items,
    read_record,
    size,
    stored_arrays,
    why_kept,
)
from t5x_lite.training.integrity import UnreadableCheckpoint

_BLOCK = 1 << 18  # numbers that are compared at a time
_CACHE = 2**28  # bytes of stored parts that are kept while they are compared with parts of another shape


@dataclasses.dataclass(frozen=True)
class Entry:
    """A checkpoint of a run.

    Attributes:
      step: of training.
      path: where it is.
      bytes: that its files hold.
      time: when it was saved, in seconds since 1970; None: not noted.
      loss: validation loss; None: not evaluated at this step.
      kept: why it is kept.
      sealed: whether it can be verified.
      items: the trees in it.
    """

    step: int
    path: str
    bytes: int
    time: float | None
    loss: float | None
    kept: list[str]
    sealed: bool
    items: list[str]


def list_checkpoints(run: Path, keep: int, keep_every: int) -> tuple[list[Entry], list[str]]:
    """Returns a run's checkpoints by step, and the names of what is no checkpoint: set aside, or not finished.

    Args:
      run: the run directory.
      keep: how many of the latest are kept.
      keep_every: see `why_kept`.

    Raises:
      InputError: there is no such run.
    """
    directory = run if run.name == "checkpoints" else run / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"'{run}' {holds_none(run)}; give a run directory")
    records = {step: _record(directory / str(step)) for step in complete_steps(directory)}
    reasons = why_kept({step: record.loss for step, record in records.items()}, keep, keep_every)
    entries = []
    for step, record in records.items():
        path = directory / str(step)
        sealed = (path / integrity.SEAL).exists()
        entries.append(Entry(step, str(path), size(path), record.time, record.loss, reasons[step], sealed, items(path)))
    others = [path.name for path in directory.iterdir() if path.is_dir() and not path.name.isdigit()]
    return entries, sorted(others, key=lambda name: (not name.endswith(UNREADABLE), name))


def _record(path: Path) -> Record:
    try:
        return read_record(path)
    except UnreadableCheckpoint:  # `verify` says so
        return Record()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of a checkpoint after all of it has been read.

    Attributes:
      path: the checkpoint.
      sealed: whether its files could be compared with what was sealed; else it was only tried whether arrays can be
        read.
      files: how many there are.
      bytes: that they hold.
      damage: a phrase about each file that has changed, is missing, or does not belong there.
      arrays: those whose values are lost with them.
    """

    path: str
    sealed: bool
    files: int
    bytes: int
    damage: list[str]
    arrays: list[str]


def verify(path: Path) -> Verdict:
    """Reads all files of a checkpoint, and of one that is damaged or not sealed all arrays."""
    files = sum(file.is_file() for file in path.rglob("*"))
    damage, lost, sealed = [], [], False
    try:
        findings = integrity.compare(path)
        sealed = findings.sealed
        damage = findings.damage + [f"{name} is no part of it" for name in findings.extra]
        if not sealed and (path / RECORD).exists():
            damage.append(f"{integrity.SEAL} is missing")
    except UnreadableCheckpoint as error:
        damage.append(str(error))
    if damage or not sealed:
        lost, more = _lost_arrays(path)
        damage += more
    return Verdict(str(path), sealed, files, size(path), damage, lost)


def _lost_arrays(path: Path) -> tuple[list[str], list[str]]:
    """Returns the arrays that do not have their fingerprint or cannot be read, and why nothing can be."""
    try:
        arrays = stored_arrays(path)
    except UnreadableCheckpoint as error:
        return [], [str(error)]
    expected = _record(path).fingerprints
    lost = []
    for name, array in arrays.items():
        try:
            if array.fingerprint() != expected.get(name, array.fingerprint()):
                lost.append(name)
        except UnreadableCheckpoint:
            lost.append(name)
    return lost, []


@dataclasses.dataclass(frozen=True)
class Difference:
    """How an array differs between two checkpoints, `a` and `b`.

    Attributes:
      name: of the array, its item first.
      shapes: in a and b.
      dtypes: in a and b.
      differing: how many numbers differ; None: the shapes do, so numbers were not compared.
      largest: the largest |a - b|; NaN or infinite if that is what one of them holds.
      where: its place in the array.
      relative: |a - b| / |a|, of the norms.
      norms: square root of the sum of squares, of a and b.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    differing: int | None = None
    largest: float = 0.0
    where: tuple[int, ...] = ()
    relative: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)

    @property
    def same(self) -> bool:
        """Whether shape, dtype and all numbers are the same."""
        return self.differing == 0 and self.dtypes[0] == self.dtypes[1]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two checkpoints have and have not in common.

    Attributes:
      a, b: the checkpoints.
      only_a, only_b: names of arrays that the other one lacks.
      arrays: of all that both have.
    """

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    arrays: list[Difference]


def diff(a: str | Path, b: str | Path) -> Comparison:
    """Compares two checkpoints, array by array; of a run directory the latest.

    Raises:
      InputError: there is no checkpoint.
      UnreadableCheckpoint: one of them is damaged: what differs would be the damage.
    """
    paths = find_checkpoint(a), find_checkpoint(b)
    for path in paths:
        check_files(path)
    ours, theirs = (stored_arrays(path, cache=_CACHE) for path in paths)
    arrays = [_difference(ours[name], theirs[name]) for name in sorted(ours.keys() & theirs.keys())]
    return Comparison(
        a=str(paths[0]),
        b=str(paths[1]),
        only_a=sorted(ours.keys() - theirs.keys()),
        only_b=sorted(theirs.keys() - ours.keys()),
        arrays=arrays,
    )


def _difference(a: StoredArray, b: StoredArray) -> Difference:
    shapes, dtypes = (a.shape, b.shape), (a.dtype.name, b.dtype.name)
    if a.shape != b.shape:
        return Difference(a.name, shapes, dtypes)
    differing, largest, where = 0, 0.0, (0,) * len(a.shape)
    squares = np.zeros(3)  # of a, b and a - b
    for start, x, y in _blocks(a, b):
        unequal = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        with np.errstate(invalid="ignore", over="ignore"):  # infinities
            gaps = np.where(unequal, np.abs(x - y), 0.0)
        squares += [np.vdot(x, x), np.vdot(y, y), np.vdot(gaps, gaps)]
        differing += int(unequal.sum())
        peak = float(gaps.max(initial=0.0))  # NaN, if there is one
        if peak > largest or (np.isnan(peak) and not np.isnan(largest)):
            largest, where = peak, start(int(np.argmax(gaps)))
    norms = np.sqrt(squares)
    relative = float(norms[2] / norms[0]) if norms[0] else float(norms[2] and np.inf)
    return Difference(a.name, shapes, dtypes, differing, largest, where, relative, (float(norms[0]), float(norms[1])))


def _blocks(a: StoredArray, b: StoredArray) -> Iterator[tuple]:
    """Yields numbers of both as float64, and a function from an index among them to the place in the array."""
    for part in a.parts():
        x, y = a.read(part), b.read(part)
        corner, shape = [along.start for along in part], x.shape
        x, y = x.reshape(-1), y.reshape(-1)
        for begin in range(0, x.size, _BLOCK):

            def place(index: int, begin: int = begin, corner: list[int] = corner, shape: tuple = shape) -> tuple:
                inside = np.unravel_index(begin + index, shape)
                return tuple(int(first + along) for first, along in zip(corner, inside, strict=True))

            block = slice(begin, begin + _BLOCK)
            yield place, x[block].astype(np.float64), y[block].astype(np.float64)
