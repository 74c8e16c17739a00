"""Weights & Biases, for who wants it: the package is an extra, and is imported here alone, once it is asked for."""

import importlib.util
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.errors import InputError


def check_installed(project: str) -> None:
    """Checks, without importing it, that the package is there if a run names a project.

    Raises:
      InputError: it is not.
    """
    if project and not (sys.modules.get("wandb") or importlib.util.find_spec("wandb")):
        raise InputError(
            f"train.wandb={project} needs the wandb package: pip install 't5x_lite[wandb]' (or: pip install wandb)"
        )


class WandbRun:
    """A run at Weights & Biases that receives every record of the log.

    A run that continues goes on there too: its id is kept in `RUN/wandb_id`. Steps that are made again replace nothing
    there; they are drawn over the old ones, because every number has the training step as its horizontal axis. Without
    a network `WANDB_MODE=offline` collects everything under `RUN/wandb/`, for `wandb sync`.

    Args:
      project: where the run belongs.
      directory: the run directory; its name is the run's.
      config: flat keys and values, shown beside the run.

    Raises:
      InputError: the package is not installed, or cannot begin a run.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]):
        check_installed(project)
        import wandb  # type: ignore[import-not-found]

        name = directory / "wandb_id"
        if not name.exists():
            name.write_text(secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                id=name.read_text().strip(),
                resume="allow",
                dir=str(directory),
                config=dict(config),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            line = " ".join(str(error).split())
            raise InputError(
                f"train.wandb={project}: Weights & Biases cannot begin a run ({line});"
                " WANDB_MODE=offline needs no network"
            ) from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Sends the numbers of a record, in the background; their names are as in TensorBoard."""
        prefix = record.get("split", "train")
        numbers = {f"{prefix}/{name}": value for name, value in record.items() if name not in ("step", "split")}
        self._run.log({"step": record["step"], **numbers})

    def close(self) -> None:
        """Sends the rest."""
        self._run.finish()
