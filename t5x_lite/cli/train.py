"""`t5x-lite train`: pre-train or fine-tune, or continue a run."""

import argparse

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.cli.settings import read_settings
from t5x_lite.data import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help=SETTINGS_HELP)
    parser.add_argument("--json", action="store_true", help="print the final metrics as JSON")


def run(args: argparse.Namespace) -> int:
    """Trains, and prints the metrics on the held-out data."""
    config = read_settings(args.settings).config
    # Before JAX is imported: whoever misspells a column should know within a second.
    recipe.check_objectives(config, recipe.open_data(config.data))

    from t5x_lite.cli.display import ProgressObserver, show
    from t5x_lite.training.loop import train

    with ProgressObserver() as observer:
        result = train(config, observer)
    show({"out": config.out, "step": int(result.state.step), **result.metrics}, args.json)
    return 0
