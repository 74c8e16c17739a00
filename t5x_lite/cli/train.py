"""`t5x-lite train`: pre-train or fine-tune, or continue a run."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator

from t5x_lite.cli.main import SETTINGS_HELP, explain
from t5x_lite.cli.settings import read_settings
from t5x_lite.config import RunConfig
from t5x_lite.data import recipe
from t5x_lite.training import processes
from t5x_lite.training.processes import Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help=SETTINGS_HELP)
    parser.add_argument("--json", action="store_true", help="print the final metrics as JSON")
    parser.add_argument(
        "--unfinished-status",
        type=int,
        default=0,
        metavar="N",
        help="exit status of a run that SIGTERM ended before its last step, for launchers that start it again",
    )


def run(args: argparse.Namespace) -> int:
    """Trains, and prints the metrics on the held-out data; of several processes the first prints."""
    config = read_settings(args.settings).config
    with _ending_together(config, args) as group:
        return _train(config, group, args)


def _train(config: RunConfig, group: Group, args: argparse.Namespace) -> int:
    # Before JAX is imported, if this is the only process: whoever misspells a column should know within a second.
    recipe.check_objectives(config, recipe.open_data(config.data))

    from t5x_lite.cli.display import ProgressObserver, show
    from t5x_lite.training.loop import train

    if group.index:
        result = train(config, group=group)
    else:
        with ProgressObserver() as observer:
            result = train(config, observer, group=group)
        state = result.state
        notable = {"ended_by": result.ended_by, "skipped": int(state.skipped)}
        notable = {name: value for name, value in notable.items() if value}
        show({"out": config.out, "step": int(state.step), **notable, **result.metrics}, args.json)
    return 0 if not result.ended_by else group.asked_status


@contextlib.contextmanager
def _ending_together(config: RunConfig, args: argparse.Namespace) -> Iterator[Group]:
    """Joins the other processes; whatever ends this one is said in one line, and to the others, who do not wait."""
    group: Group | None = None
    try:
        with processes.join(config.distributed, args.unfinished_status) as group:
            if group.count > 1:
                _keep_stdout_to_ourselves()
            yield group
    except processes.EndedEarly as early:
        if group is None or group.count == 1:
            if early.line:
                print(f"t5x-lite: {early.line}", file=sys.stderr)
            raise
        processes.end_now(early.status, early.line)
    except BaseException as error:
        if group is None or group.count == 1:
            raise
        if group.explanation(error):
            time.sleep(60)  # it is being said, and ends this process
        if args.traceback:
            traceback.print_exc()
        line, status = explain(error)
        group.failed(line, status)
        # JAX's own way out would wait for the others.
        processes.end_now(status, f"process {group.index}: {line}" if group.index else line)


def _keep_stdout_to_ourselves() -> None:
    """Sends what libraries print there, such as who is connected to whom, nowhere, and NCCL's debugging to stderr."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w")
    target = os.dup(2) if "NCCL_DEBUG" in os.environ else os.open(os.devnull, os.O_WRONLY)
    os.dup2(target, 1)
