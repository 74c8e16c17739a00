"""`t5x-lite eval`: the numbers of a run on held-out data."""

import argparse
import dataclasses
import json
from pathlib import Path

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.cli.settings import read_settings
from t5x_lite.config import Resolved, RunConfig, run_directory
from t5x_lite.data import recipe
from t5x_lite.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("settings", nargs="+", metavar="RUN key=value", help=SETTINGS_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the metrics and keeps them in the run's `eval/`."""
    resolved = read_settings(args.settings)
    config = _with_given_data(resolved)
    data = recipe.open_data(config.data)
    recipe.check_objectives(config, data)

    from t5x_lite.cli.display import ProgressObserver, show
    from t5x_lite.data.pipeline import Dataset
    from t5x_lite.evaluation.evaluator import evaluate, generation_metrics
    from t5x_lite.loading import load
    from t5x_lite.models import build
    from t5x_lite.sharding import check_divides, make_mesh
    from t5x_lite.training.step import make_eval_step

    first = args.settings[0]
    checkpoint = first if "=" not in first and Path(first).is_dir() else config.out
    # Not the mesh of the training: the run may have moved to another machine since.
    mesh = make_mesh(config.mesh if resolved.origins["mesh"] == "command line" else "")
    check_divides(mesh, {"batch": config.train.batch_size})
    lm = load(checkpoint, mesh=mesh)
    # Float32 parameters under the run's compute dtype, as its own evaluations had it.
    model = build(lm.config, config.train.dtype)
    tokenizer = lm.require_tokenizer()
    observer = ProgressObserver()
    read = recipe.datasets(data, dataclasses.replace(config, model=lm.config), tokenizer, observer.building)
    for note in read.notes:
        observer.note(note)
    dataset = read.validation if config.data.split == "validation" else read.train
    if not isinstance(dataset, Dataset):
        raise InputError(
            "data.split=train with data.streaming: there is no end of it; give data.path and data.streaming=false"
        )
    eval_step = make_eval_step(model, lm.mesh)
    metrics = evaluate(eval_step, lm.params, dataset.eval_batches(), tokenizer, lm.mesh)
    if len(dataset.components) > 1:
        for index, component in enumerate(dataset.components):
            alone = evaluate(eval_step, lm.params, dataset.component(index).eval_batches(), tokenizer, lm.mesh)
            metrics |= {f"{component.name}/{name}": value for name, value in alone.items()}
    for task in data.tasks:
        examples = list(recipe.pairs(task, config.data, config.data.split))
        if examples:
            most = dataset.input_length or dataset.target_length
            found = generation_metrics(
                lm, examples, dataset.target_length, task.metrics, task.labels, max_input_tokens=most
            )
            several = len(data.tasks) > 1
            metrics |= {f"{task.name}/{name}" if several else name: value for name, value in found.items()}
    result = {"checkpoint": str(lm.checkpoint), "split": config.data.split, **metrics}
    folder = run_directory(checkpoint) / "eval"
    folder.mkdir(exist_ok=True)
    name = f"{config.data.split}-{lm.checkpoint.name}.json" if lm.checkpoint else f"{config.data.split}.json"
    where = config.data.path if config.data.split == "train" or not config.data.eval_path else config.data.eval_path
    (folder / name).write_text(json.dumps({**result, "data": where}, indent=1))
    show(result, args.json)
    return 0


def _with_given_data(resolved: Resolved) -> RunConfig:
    # Whoever names a file here wants all of it evaluated, not the part that a training run would have held out.
    data = resolved.config.data
    given = [key for key in ("data.path", "data.eval_path") if resolved.origins[key] == "command line"]
    if given == ["data.path"]:
        data = dataclasses.replace(data, eval_path=data.path)
    if data.eval_path and data.split == "validation":
        # Not the data of the training, which may be large, or on another machine.
        data = dataclasses.replace(data, path=data.eval_path)
    return dataclasses.replace(resolved.config, data=data)
