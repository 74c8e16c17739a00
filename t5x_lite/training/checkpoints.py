"""Checkpoints: written in the background, checked when written and when read, never the only copy.

A checkpoint is a directory `<step>/` with the items `params`, `optimizer`, `progress` and, where there is one, `ema`,
each written by Orbax and restored onto any mesh. It is made under another name and gets its own when it is complete,
has been read back and is sealed (see `integrity`): so what is called a checkpoint is one.
"""

import contextlib
import errno
import itertools
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from t5x_lite.errors import InputError
from t5x_lite.run_directory import UNREADABLE, complete_steps, has_begun
from t5x_lite.training import checkpoint_files, integrity
from t5x_lite.training import checkpoint_writing as writing
from t5x_lite.training.agreement import Agreement
from t5x_lite.training.checkpoint_files import Record, first_line, read_record, stored_arrays, why_kept
from t5x_lite.training.integrity import UnreadableCheckpoint
from t5x_lite.training.precision import initial_loss_scale
from t5x_lite.training.state import TrainState

PARTIAL, DELETED = ".partial", ".deleted"  # suffixes of what is being made, and of what is going
MARGIN = 1.05  # of free space over the arrays' bytes: for the files that describe them, and whatever else is written


class Checkpointer:
    """Saves and restores the states of one run. With several processes all call the same methods in the same order.

    Args:
      directory: the run's `checkpoints/`, which all processes see; created if it is missing.
      keep: how many of the latest checkpoints to keep, beside the one with the lowest validation loss.
      keep_every: checkpoints of steps that divide by this are kept for good; 0: none are.
      timeout: seconds that several processes wait for each other, and for the disk.
      saved: called in process 0, from another thread, with the step of every checkpoint that is complete.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 3,
        *,
        keep_every: int = 0,
        timeout: float = 600.0,
        saved: Callable[[int], None] | None = None,
    ):
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every, self._saved = keep, keep_every, saved
        self._agreement = Agreement(timeout)
        self._limit = timeout if self._agreement.count > 1 else None  # alone, a slow disk keeps nobody waiting
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._agreement.index == 0:
            _remove_leftovers(self.directory)

    def save(self, state: TrainState, loss: float | None = None) -> None:
        """Starts to write `state`; returns when it has been copied from the devices.

        Args:
          state: the state; it may be donated to the next step at once.
          loss: validation loss at this step, by which the best checkpoint is chosen.

        Raises:
          InputError: the disk has no room. The checkpoints that were there stay.
        """
        self.wait()
        step = int(state.step)
        partial = self.directory / f".{step}{PARTIAL}"
        items, pending = _items(state), list[Any]()
        try:
            self._agreement.together("room", lambda: self._check_room(step, items))
            self._agreement.first("prepared", lambda: writing.make_directories(partial, items))
            self._agreement.together("copied", lambda: pending.extend(writing.start_writing(partial, items)))
            prints = integrity.fingerprints(dict(writing.named(items)))
        except Exception as error:
            self._discard(partial, pending)
            raise self._explained(step, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(step, partial, list(items), pending, prints, loss), name="save", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until everything saved is on disk, has been read back, and is sealed.

        Raises:
          InputError: the disk was full; the previous checkpoints stay.
          TimeoutError: another process did not do its part in time; the message names it.
          RuntimeError: what was read back is not what was saved; the message names the array.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            (step, error), self._failure = self._failure, None
            raise self._explained(step, error) from error

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending."""
        return complete_steps(self.directory)

    def restore(self, abstract: TrainState) -> tuple[TrainState | None, list[str]]:
        """Restores the latest checkpoint that can be read; which that is, process 0 decides.

        Those after it are renamed to `<step>.unreadable`: nothing is lost, and their steps can be saved again.

        Args:
          abstract: shapes, dtypes and layouts wanted, from `abstract_state`.

        Returns:
          The state (None: there was no checkpoint), and a line about each checkpoint that was passed over.

        Raises:
          InputError: there are checkpoints, and none can be read; they stay as they are.
        """
        damaged: dict[int, str] = {}
        steps = self._agreement.first("steps", self.steps)
        begun = self._agreement.first("begun", lambda: has_begun(self.directory.parent))
        for step in reversed(steps):
            try:
                found, notes = _read_together(self.directory / str(step), _items(abstract), self._agreement)
            except UnreadableCheckpoint as error:
                damaged[step] = str(error)
                continue
            names = self._agreement.first("set aside", lambda: [self._set_aside(bad) for bad in damaged])
            passed = [f"{why}; set aside as {name}" for why, name in zip(damaged.values(), names, strict=True)]
            return _state(step, found, abstract), passed + notes
        if damaged or begun:
            why = "; ".join(damaged.values()) or "all have been set aside"
            raise InputError(f"no readable checkpoint is left in {self.directory}: {why}")
        return None, []

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def _check_room(self, step: int, items: dict[str, Any]) -> None:
        # The processes write to one disk: the first looks for room for all of them, the others for their own part.
        leaves = jax.tree.leaves(items)
        bytes_of = (lambda x: x.nbytes) if self._agreement.index == 0 else _local_bytes
        needed = MARGIN * sum(bytes_of(x) for x in leaves)
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise self._disk_full(step, f"needs {needed / 1e6:.3g} MB, {free / 1e6:.3g} MB are free")

    def _finish(
        self,
        step: int,
        partial: Path,
        items: list[str],
        pending: list[Any],
        prints: dict[str, int],
        loss: float | None,
    ) -> None:
        agreement = self._agreement
        mine = (agreement.index, agreement.count)
        try:
            agreement.together("written", lambda: writing.wait_for(pending, self._limit))
            pending.clear()  # they hold the state that was saved
            writing.give_back_memory()
            record = Record(time.time(), loss, prints)
            agreement.first("merged", lambda: writing.complete(partial, items, record))
            found = agreement.together("read back", lambda: writing.check_written(partial, prints, mine))
            sums = {name: digest for part in found for name, digest in part.items()}
            agreement.first("kept", lambda: self._keep_it(step, partial, dict(sorted(sums.items()))))
        except BaseException as error:  # whatever it is, `wait` must not return as if all were saved
            if isinstance(error, Exception):
                self._discard(partial, pending)
            self._failure = step, error
        finally:
            writing.give_back_memory()

    def _keep_it(self, step: int, partial: Path, sums: dict[str, str]) -> None:
        integrity.seal(partial, sums)
        final = self.directory / str(step)
        partial.rename(final)
        writing.to_disk(self.directory)
        if self._saved is not None:
            self._saved(step)
        losses = {step: _loss(self.directory / str(step)) for step in self.steps()}
        for old, reasons in why_kept(losses, self._keep, self._keep_every).items():
            if not reasons:
                # In one moment no checkpoint any more: one that is half deleted must not be taken for one.
                going = self.directory / f".{old}{DELETED}"
                (self.directory / str(old)).rename(going)
                shutil.rmtree(going, ignore_errors=True)

    def _discard(self, partial: Path, pending: list[Any]) -> None:
        with contextlib.suppress(Exception):  # what is still written would come back
            writing.wait_for(pending, self._limit)
        if self._agreement.index == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _set_aside(self, step: int) -> str:
        names = (f"{step}{'' if n == 1 else f'-{n}'}{UNREADABLE}" for n in itertools.count(1))
        name = next(name for name in names if not (self.directory / name).exists())
        (self.directory / str(step)).rename(self.directory / name)
        return name

    def _explained(self, step: int, error: BaseException) -> BaseException:
        text = str(error)
        # TensorStore reports system errors as text.
        numbers = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        full = getattr(error, "errno", None) in numbers or any(os.strerror(number) in text for number in numbers)
        return self._disk_full(step, "the disk is full") if full else error

    def _disk_full(self, step: int, why: str) -> InputError:
        kept = self.steps()
        last = f"the one of step {kept[-1]} is kept" if kept else "there is no earlier one"
        return InputError(
            f"could not save the checkpoint of step {step} in {self.directory}: {why}; {last};"
            " free some space and run again"
        )


def read(path: Path, items: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Restores items of one checkpoint, each array directly in the layout asked for.

    Args:
      path: `checkpoints/<step>`.
      items: `params`, `optimizer`, ..., each a tree of `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      The items, and a line about each file that does not belong there.

    Raises:
      UnreadableCheckpoint: it is damaged.
      InputError: it is sound, but its arrays have other names or shapes than asked for.
    """
    return _read_together(path, items, None)


def load_params(path: str | Path, abstract: Any) -> tuple[Any, Path, list[str]]:
    """Restores parameters from a run directory (its latest readable checkpoint) or from one checkpoint.

    Of a run that keeps a running mean of its parameters (`train.ema_decay`) that mean is loaded, not the last ones.

    Args:
      path: run directory or checkpoint.
      abstract: tree of `jax.ShapeDtypeStruct`s: the dtypes and layouts wanted.

    Returns:
      The parameters, the checkpoint they are from, and a line about each that was damaged and passed over.

    Raises:
      InputError: no checkpoint, none that can be read, or one of another model.
    """
    notes: list[str] = []
    for checkpoint in _candidates(Path(path).expanduser()):
        item = "ema" if (checkpoint / "ema").is_dir() else "params"
        try:
            found, remarks = read(checkpoint, {item: abstract})
            return found[item], checkpoint, notes + remarks
        except UnreadableCheckpoint as error:
            notes.append(str(error))
    raise InputError("; ".join(notes) or f"{path} holds no checkpoint")


def save_params(path: Path, params: Any) -> None:
    """Writes parameters alone as a checkpoint, complete and sealed, from which `load_params` restores.

    Args:
      path: `checkpoints/<step>`; must not exist yet.
      params: tree of arrays.
    """
    partial = path.absolute().with_name(f".{path.name}{PARTIAL}")
    items = {"params": params}
    writing.make_directories(partial, items)
    writing.wait_for(writing.start_writing(partial, items), None)
    prints = integrity.fingerprints(dict(writing.named(items)))
    writing.complete(partial, list(items), Record(time.time(), None, prints))
    integrity.seal(partial, writing.check_written(partial, prints, (0, 1)))
    partial.rename(path)


def _items(state: TrainState) -> dict[str, Any]:
    progress: dict[str, Any] = {"skipped": state.skipped}
    if state.loss_scale is not None:
        progress["loss_scale"] = state.loss_scale
    items = {"params": state.params, "optimizer": state.opt_state, "progress": progress, "ema": state.ema}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _state(step: int, found: dict[str, Any], abstract: TrainState) -> TrainState:
    def put(value: Any, like: Any) -> jax.Array:
        host = np.asarray(value, like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: host[index])

    progress = found.get("progress")
    if progress is None:  # a checkpoint from before there was any
        scale = None if abstract.loss_scale is None else initial_loss_scale("float16")
        progress = {
            "skipped": put(0, abstract.skipped),
            "loss_scale": jax.tree.map(put, scale, abstract.loss_scale),
        }
    return TrainState(
        step=put(step, abstract.step),
        params=found["params"],
        opt_state=found.get("optimizer", abstract.opt_state),  # one without arrays is what it is
        skipped=progress["skipped"],
        loss_scale=progress.get("loss_scale"),
        ema=found.get("ema"),
    )


def _read_together(path: Path, items: dict[str, Any], agreement: Agreement | None) -> tuple[dict[str, Any], list[str]]:
    """Restores items as `read`; all processes read, and fail, together if they have an agreement."""
    share = (agreement.index, agreement.count) if agreement else (0, 1)

    def check() -> list[Any]:
        findings = integrity.compare(path, share)
        damage = findings.damage
        if not findings.sealed and (path / checkpoint_files.RECORD).exists():
            damage = [f"{integrity.SEAL} is missing"]
        if damage:
            raise UnreadableCheckpoint(f"checkpoint {path} is damaged: {damage[0]}")
        return [findings.sealed, [f"{path / name} is no part of the checkpoint: left alone" for name in findings.extra]]

    restored: dict[str, Any] = {}
    expected: dict[str, int] = {}

    def restore() -> None:
        restored.update(_restore(path, items, sealed))
        stored, saved = stored_arrays(path), read_record(path).fingerprints
        for name, leaf in writing.named(items):
            if name in saved and stored[name].dtype == leaf.dtype:  # in another dtype its bits are others
                expected[name] = saved[name]

    if agreement is None:
        sealed, notes = check()
        restore()
    else:
        sealed, notes = agreement.together("checked", check)[0]
        agreement.together("restored", restore)
    # Where nothing can fail in one process alone: these are computations of all.
    prints = integrity.fingerprints({name: array for name, array in writing.named(restored) if name in expected})
    for name, value in prints.items():
        if value != expected[name]:
            raise RuntimeError(f"{name} of checkpoint {path} is not what was saved once it is in memory")
    return restored, notes


def _restore(path: Path, items: dict[str, Any], sealed: bool) -> dict[str, Any]:
    restored = {}
    for name, abstract in items.items():
        if name == "progress" and not (path / name).is_dir():
            continue
        try:
            _check_shapes(path, name, abstract)
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
            restored[name] = writing.handler().restore(epath.Path(path / name), args=args)
        except (InputError, UnreadableCheckpoint):
            raise
        except Exception as error:
            if sealed:  # every byte is as it was written, so the fault lies elsewhere
                raise
            raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    return restored


def _check_shapes(path: Path, item: str, abstract: Any) -> None:
    have = {name: array.shape for name, array in stored_arrays(path).items() if name.startswith(f"{item}/")}
    want = {name: tuple(leaf.shape) for name, leaf in writing.named({item: abstract})}
    for name in sorted(want.keys() | have.keys()):
        if have.get(name) != want.get(name):
            raise InputError(
                f"checkpoint {path} does not fit the model: {name} is {have.get(name, 'absent')} there"
                f" and {want.get(name, 'absent')} here"
            )


def _candidates(path: Path) -> Iterator[Path]:
    if path.parent.name == "checkpoints":
        yield checkpoint_files.find_checkpoint(path)
    else:
        for step in reversed(complete_steps(path / "checkpoints")):
            yield (path / "checkpoints" / str(step)).absolute()


def _local_bytes(x: jax.Array) -> int:
    shard = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return shard * sum(part.replica_id == 0 for part in x.addressable_shards)


def _loss(path: Path) -> float | None:
    try:
        return read_record(path).loss
    except UnreadableCheckpoint:  # noticed when somebody wants to read it
        return None


def _remove_leftovers(directory: Path) -> None:
    """Removes what saves and deletions that were cut short have left."""
    for pattern in (f".*{PARTIAL}", f".*{DELETED}", "*.orbax-checkpoint-tmp*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
