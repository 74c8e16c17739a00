"""Checkpoints: written in the background, checked when read, never the only copy.

A checkpoint is an Orbax directory `<step>/` with the items `params` and `optimizer`, restored onto any mesh. Orbax
renames a directory into place when it is complete, so one that was cut short is never taken for a checkpoint. It does
not notice a changed byte in array data, so this module adds `checksums.json` to every finished checkpoint.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from t5x_lite.errors import InputError
from t5x_lite.run_directory import UNREADABLE, complete_steps, has_begun
from t5x_lite.training.state import TrainState

CHECKSUMS = "checksums.json"


class Checkpointer:
    """Saves and restores the states of one run.

    Args:
      directory: the run's `checkpoints/`; created if it is missing.
      keep: how many of the latest checkpoints to keep, beside the one with the lowest validation loss.
    """

    def __init__(self, directory: Path, keep: int = 3):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._unsealed = True  # a run that was killed may have left a complete checkpoint without its seal
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, loss: float | None = None) -> None:
        """Starts to write `state`; returns when it has been copied from the devices.

        Args:
          state: the state; it may be donated to the next step at once.
          loss: validation loss at this step, by which the best checkpoint is chosen.

        Raises:
          InputError: the disk has no room. The checkpoints that were there stay.
        """
        step = int(state.step)
        self.wait()
        needed = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise self._disk_full(step, f"needs {needed / 1e6:.3g} MB, {free / 1e6:.3g} MB are free")
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(state.opt_state)
                ),
                metrics={"loss": math.inf if loss is None else loss},
            )
            self._unsealed = True
        except Exception as error:
            raise self._save_failed(step, error) from error

    def wait(self) -> None:
        """Waits until everything saved is on disk and sealed with checksums.

        Raises:
          InputError: the disk was full; the previous checkpoints stay.
        """
        try:
            self._manager.wait_until_finished()
            self.seal_finished()
        except Exception as error:
            raise self._save_failed(None, error) from error

    def seal_finished(self) -> None:
        """Seals the checkpoint that was being written, if it is complete by now; quick enough to call at every step."""
        if self._unsealed and not self._manager.is_saving_in_progress():
            self._unsealed = False
            if jax.process_index() == 0:
                for step in self.steps():
                    seal(self.directory / str(step))

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending."""
        return complete_steps(self.directory)

    def restore(self, abstract: TrainState) -> tuple[TrainState | None, list[str]]:
        """Restores the latest checkpoint that can be read.

        Those after it are renamed to `<step>.unreadable`: nothing is lost, and their steps can be saved again.

        Args:
          abstract: shapes, dtypes and layouts wanted, from `abstract_state`.

        Returns:
          The state (None: there was no checkpoint), and a line about each checkpoint that was passed over.

        Raises:
          InputError: there are checkpoints, and none can be read; they stay as they are.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                items = read(self.directory / str(step), {"params": abstract.params, "optimizer": abstract.opt_state})
            except UnreadableCheckpoint as error:
                damaged[step] = str(error)
                continue
            notes = [f"{why}; set aside as {self._set_aside(bad)}" for bad, why in damaged.items()]
            layout = abstract.step.sharding
            state = TrainState(
                step=jax.device_put(jax.numpy.int32(step), layout),
                params=items["params"],
                opt_state=items["optimizer"],
                skipped=jax.device_put(jax.numpy.int32(0), layout),
            )
            return state, notes
        if damaged or has_begun(self.directory.parent):
            why = "; ".join(damaged.values()) or "all have been set aside"
            raise InputError(f"no readable checkpoint is left in {self.directory}: {why}")
        return None, []

    def _set_aside(self, step: int) -> str:
        names = (f"{step}{'' if n == 1 else f'-{n}'}{UNREADABLE}" for n in itertools.count(1))
        name = next(name for name in names if not (self.directory / name).exists())
        (self.directory / str(step)).rename(self.directory / name)
        self._manager.reload()
        return name

    def close(self) -> None:
        """Waits for the last save and releases the threads."""
        self.wait()
        self._manager.close()

    def _save_failed(self, step: int | None, error: Exception) -> Exception:
        text = str(error)
        # TensorStore reports system errors as text.
        numbers = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        full = getattr(error, "errno", None) in numbers or any(os.strerror(number) in text for number in numbers)
        return self._disk_full(step, "the disk is full") if full else error

    def _disk_full(self, step: int | None, why: str) -> InputError:
        kept = self.steps()
        which = "the checkpoint" if step is None else f"the checkpoint of step {step}"
        last = f"the one of step {kept[-1]} is kept" if kept else "there is no earlier one"
        return InputError(f"could not save {which} in {self.directory}: {why}; {last}; free some space and run again")


class UnreadableCheckpoint(Exception):
    """A checkpoint directory that cannot be restored; the message says why, in one line."""


def seal(path: Path) -> None:
    """Writes the checksums of a complete checkpoint beside its files, unless they are there."""
    target = path / CHECKSUMS
    if not target.exists():
        partial = path / f"{CHECKSUMS}.partial"
        partial.write_text(json.dumps(_checksums(path), indent=1))
        partial.rename(target)


def verify(path: Path) -> bool:
    """Compares a checkpoint's files with its checksums.

    Returns:
      Whether there are any; a process that is killed between writing and sealing leaves none.

    Raises:
      UnreadableCheckpoint: a file is missing or has changed; the message names the first.
    """
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        raise UnreadableCheckpoint(f"checkpoint {path} is damaged: {CHECKSUMS} cannot be read") from None
    found = _checksums(path)
    bad = [name for name, digest in expected.items() if found.get(name) != digest]
    if bad:
        raise UnreadableCheckpoint(
            f"checkpoint {path} is damaged: {bad[0]} " + ("has changed" if bad[0] in found else "is missing")
        )
    return True


def read(path: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Restores items of one checkpoint, each array directly in the layout asked for.

    Args:
      path: `checkpoints/<step>`.
      items: `params` and/or `optimizer`, each a tree of `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      UnreadableCheckpoint: it is damaged.
      InputError: it is sound, but its arrays have other names or shapes than asked for.
    """
    sealed = verify(path)
    out = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for name, abstract in items.items():
            try:
                _check_shapes(path, checkpointer.metadata(path / name).item_metadata.tree, abstract)
                out[name] = checkpointer.restore(path / name, abstract)
            except InputError:
                raise
            except Exception as error:
                if sealed:  # every byte is as it was written, so the fault lies elsewhere
                    raise
                raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: {_first_line(error)}") from error
    return out


def load_params(path: str | Path, abstract: Any) -> tuple[Any, Path, list[str]]:
    """Restores parameters from a run directory (its latest readable checkpoint) or from one checkpoint.

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
        try:
            return read(checkpoint, {"params": abstract})["params"], checkpoint, notes
        except UnreadableCheckpoint as error:
            notes.append(str(error))
    raise InputError("; ".join(notes) or f"{path} holds no checkpoint")


def save_params(path: Path, params: Any) -> None:
    """Writes parameters alone as a checkpoint, complete and sealed, from which `load_params` restores.

    Args:
      path: `checkpoints/<step>`; must not exist yet.
      params: tree of arrays.
    """
    partial = path.absolute().with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "params", params)
    seal(partial)
    partial.rename(path)


def _candidates(path: Path) -> Iterator[Path]:
    if path.parent.name == "checkpoints":
        if not path.is_dir():
            steps = ", ".join(map(str, complete_steps(path.parent))) or "none"
            raise InputError(f"there is no checkpoint {path}; steps that are there: {steps}")
        yield path.absolute()
    else:
        for step in reversed(complete_steps(path / "checkpoints")):
            yield (path / "checkpoints" / str(step)).absolute()


def _check_shapes(path: Path, stored: Any, abstract: Any) -> None:
    def by_name(tree: Any) -> dict[str, tuple[int, ...]]:
        named = jax.tree_util.tree_flatten_with_path(tree)[0]
        # Named tuples of the optimizer come back as dicts: compare the plain names on the way to each leaf.
        return {
            "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in keys): tuple(
                leaf.shape
            )
            for keys, leaf in named
        }

    have, want = by_name(stored), by_name(abstract)
    for name in sorted(want.keys() | have.keys()):
        if have.get(name) != want.get(name):
            raise InputError(
                f"checkpoint {path} does not fit the model: {name} is {have.get(name, 'absent')} there"
                f" and {want.get(name, 'absent')} here"
            )


def _checksums(path: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith(CHECKSUMS):
            with file.open("rb") as stream:
                digests[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
