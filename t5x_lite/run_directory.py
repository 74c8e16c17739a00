"""A run's directory: whether the run has begun, who works in it, and whether a configuration is still its own.

A run has begun when it has a checkpoint. Until then a start may be corrected at will, and everything in the directory
is written anew; from then on configuration, tokenizer and data are fixed, because the promise is to continue exactly.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5x_lite.config import RunConfig, TaskConfig, flatten, resolve, save
from t5x_lite.errors import InputError

UNREADABLE = ".unreadable"  # suffix of a damaged checkpoint that was set aside

# What may differ between two starts of one run; anything else would make it another run.
MAY_CHANGE = (
    "mesh",
    "out",
    "fit_vocabulary",
    "data.path",  # files may move; what is in them may not change, which the fingerprint tells
    "data.eval_path",
    "data.split",
    "data.cache_dir",
    "data.data_dir",
    "data.workers",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.remat",
    "train.scan_layers",
    "train.loss_chunk",
    "train.nonfinite",
    "train.profile",
    "train.wandb",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "distributed.timeout",
)

ENDING = ("linear", "cosine", "warmup_stable_decay")  # schedules that know the run's last step


def complete_steps(checkpoints: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a `checkpoints/` directory, ascending."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit() and path.is_dir())


def has_begun(out: Path) -> bool:
    """Returns whether the run in `out` has a checkpoint, readable or set aside."""
    checkpoints = out / "checkpoints"
    return bool(complete_steps(checkpoints)) or any(checkpoints.glob(f"*{UNREADABLE}"))


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keeps other processes from training in `out`; a process that is killed lets go.

    Raises:
      InputError: another process trains there, or `out` cannot be a directory.
    """
    import fcntl

    if not str(out).strip() or str(out) == ".":
        raise InputError("out= is empty or the working directory; give the run one of its own, such as out=runs/first")
    if out.name == "checkpoints" and (out.parent / "config.yaml").exists():
        raise InputError(f"out={out} holds the checkpoints of the run '{out.parent}'; give this run a place of its own")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise InputError(f"out={out} cannot be a run directory: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training in out={out}") from None
        yield


def check_same_run(out: Path, config: RunConfig, fingerprint: str) -> list[str]:
    """Checks that a run which has begun can be continued with this configuration and data.

    Args:
      out: the run directory.
      config: what is asked for now.
      fingerprint: of the data that is there now.

    Returns:
      A line about each change that is allowed but matters.

    Raises:
      InputError: something differs that may not.
    """
    if not (out / "data.sha256").exists():
        raise InputError(f"out={out} holds an imported model; to train it give another out= and init_from={out}")
    old = flatten(resolve(out / "config.yaml").config)
    new = flatten(config)
    for key, value in new.items():
        if key not in MAY_CHANGE and _placeless(old[key]) != _placeless(value):
            raise InputError(
                f"out={out} holds a run with {key}={old[key]}, not {value}; give another out= for another run"
            )
    if (out / "data.sha256").read_text() != fingerprint:
        raise InputError(
            f"the data of {config.data.path} is not what the run in out={out} began with, so it cannot be continued"
            f" exactly; start another with out= and init_from={out}"
        )
    steps = complete_steps(out / "checkpoints")
    if steps and steps[-1] > config.train.steps:
        raise InputError(
            f"the run in out={out} has made {steps[-1]} steps already; train.steps={new['train.steps']} is less"
        )
    if old["train.steps"] != new["train.steps"] and config.optimizer.schedule in ENDING:
        return [
            f"train.steps was {old['train.steps']} and is {config.train.steps}: the {config.optimizer.schedule}"
            " schedule now ends there, and the steps made so far followed the old one"
        ]
    return []


def _placeless(value: Any) -> Any:
    """Returns the value of a key, `data.tasks` without the places of their files, as `data.path` may change."""
    if not (isinstance(value, tuple) and any(isinstance(task, TaskConfig) for task in value)):
        return value
    return [dataclasses.replace(task, path="anywhere", eval_path="") for task in value]


def record(out: Path, config: RunConfig, fingerprint: str) -> None:
    """Writes `config.yaml` and the data's fingerprint, each completely or not at all."""
    partial = out / "config.partial"
    partial.write_text(fingerprint)
    partial.rename(out / "data.sha256")
    save(config, partial)
    partial.rename(out / "config.yaml")
