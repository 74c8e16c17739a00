"""How commands read `[CONFIG.yaml or RUN] [key=value ...]`."""

from collections.abc import Sequence
from pathlib import Path

from t5x_lite.config import Resolved, resolve, run_directory
from t5x_lite.errors import InputError


def read_settings(words: Sequence[str]) -> Resolved:
    """Resolves the configuration that the words of a command line ask for.

    Args:
      words: first, if it has no `=`, a YAML file, a run directory or a checkpoint in one; then `key=value`. A run
        directory stands for its `config.yaml`, with `out` set to it.

    Raises:
      InputError: as `config.resolve`, or a directory that holds no run.
    """
    path, overrides = None, list(words)
    if overrides and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
        if path.is_dir():
            run = run_directory(path)
            if not (run / "config.yaml").exists():
                raise InputError(f"{path} is not a run directory: it has no config.yaml")
            path, overrides = run / "config.yaml", [f"out={run}", *overrides]
        elif not path.exists():
            raise InputError(f"there is no configuration file or run directory '{path}'")
    return resolve(path, overrides)
