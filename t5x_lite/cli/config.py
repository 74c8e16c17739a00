"""`t5x-lite config show`: every setting and where its value comes from."""

import argparse
import json

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.cli.settings import read_settings
from t5x_lite.config import flatten


def add_arguments(parser: argparse.ArgumentParser, action: str) -> None:
    """Declares the arguments of `show`."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help=SETTINGS_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints `key = value  (origin)` for every key."""
    resolved = read_settings(args.settings)
    values = flatten(resolved.config)
    if args.json:
        print(json.dumps({key: {"value": value, "origin": resolved.origins[key]} for key, value in values.items()}))
        return 0
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key:<{width}} = {'null' if value is None else value!s:<24} ({resolved.origins[key]})")
    return 0
