"""`t5x-lite report`: a page about one run or several, to be opened in a browser."""

import argparse
import json
from pathlib import Path

from t5x_lite.report.page import summary, write_report
from t5x_lite.report.runs import read_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; several are drawn over each other")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the page, and prints where it is."""
    runs = read_runs(args.runs)
    output = write_report(runs, Path(args.output).expanduser())
    # Not `display.show`, which needs JAX: reading a log should not take as long as beginning to train.
    print(json.dumps({"report": str(output), **summary(runs)}) if args.json else output)
    return 0
