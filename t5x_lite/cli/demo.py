"""`t5x-lite demo`: the whole path on the embedded corpus, offline, in about two minutes on two cores.

Trains a tokenizer, pre-trains a small T5 by span corruption, fine-tunes it on a text-to-text task made from the same
corpus, evaluates both against a baseline, generates, saves, and loads again. Fails if a baseline is not clearly beaten.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5x_lite.cli.main import SETTINGS_HELP
from t5x_lite.config import RunConfig, resolve
from t5x_lite.errors import InputError

if TYPE_CHECKING:
    from t5x_lite.language_model import LanguageModel
    from t5x_lite.training.loop import TrainResult

# A T5 v1.1 of 1.3 million parameters.
MODEL = (
    "model=t5-v1.1-small",
    "model.embed_dim=128",
    "model.mlp_dim=256",
    "model.num_heads=4",
    "model.head_dim=32",
    "model.num_encoder_layers=2",
    "model.num_decoder_layers=2",
)
PRETRAIN = (
    *MODEL,
    "model.dropout_rate=0",
    "tokenizer=unigram:2048",
    "train.steps=500",
    "train.batch_size=16",
    "train.input_length=64",
    "train.checkpoint_every=250",
    "optimizer.schedule=linear",
    "optimizer.learning_rate=0.05",
    "optimizer.warmup_steps=20",
)
FINETUNE = (
    "model.dropout_rate=0.1",
    "data.objective=text_to_text",
    "train.steps=150",
    "train.batch_size=32",
    "train.input_length=64",
    "train.target_length=8",
    "train.eval_batches=0",
    "optimizer.schedule=linear",
    "optimizer.learning_rate=0.03",
    "optimizer.warmup_steps=20",
)

# "Clearly beaten": the loss is at least this many nats below the unigram entropy, accuracy this far above the majority.
LOSS_MARGIN = 0.5
ACCURACY_MARGIN = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"for the pre-training: {SETTINGS_HELP}")
    parser.add_argument("--out", default="", help="directory to keep the runs in; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; status 1 if a model does not clearly beat its baseline or is not the same after loading."""
    from t5x_lite.cli.display import show

    if args.out and Path(args.out).exists():
        raise InputError(f"--out {args.out} exists already; give a new directory")
    began = time.monotonic()
    out = Path(args.out or tempfile.mkdtemp(prefix="t5x-lite-demo-"))
    try:
        results, reports = demonstrate(out, args.settings)
    finally:
        if not args.out:
            shutil.rmtree(out, ignore_errors=True)
    results["seconds"] = round(time.monotonic() - began, 1)
    results["peak_memory_mb"] = _peak_memory_mb()
    if not args.json:
        print(*reports, sep="\n")
    show(results, args.json)
    good = (
        results["heldout_loss"] <= results["unigram_entropy"] - LOSS_MARGIN
        and results["topic_accuracy"] >= results["majority_accuracy"] + ACCURACY_MARGIN
        and results["reloaded_equals_trained"]
    )
    if not args.json:
        print("both baselines are clearly beaten" if good else "not clearly better than both baselines")
    return 0 if good else 1


def demonstrate(out: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Trains both models under `out`; returns the numbers, and lines that show what the models say."""
    from t5x_lite.evaluation.evaluator import generation_metrics
    from t5x_lite.evaluation.metrics import majority_baseline
    from t5x_lite.loading import load

    cache = f"data.cache_dir={out / 'cache'}"
    pretrained = _train(
        "pre-training", resolve(None, [*PRETRAIN, *overrides, cache, f"out={out / 'pretrained'}"]).config
    )

    files, validation = _write_topics(out / "topics")
    settings = [*FINETUNE, *files, cache, f"init_from={out / 'pretrained'}", f"out={out / 'finetuned'}"]
    finetuned = _train("fine-tuning", resolve(None, settings).config)

    lm = load(out / "finetuned")
    accuracy = generation_metrics(lm, [(pair, {}) for pair in validation], max_new_tokens=8)["exact_match"]
    reports = [*_fill_spans(load(out / "pretrained")), *_name_topics(lm, validation)]
    return {
        "heldout_loss": pretrained.metrics["loss"],
        "unigram_entropy": pretrained.metrics["unigram_entropy"],
        "bits_per_byte": pretrained.metrics["bits_per_byte"],
        "topic_accuracy": accuracy,
        "majority_accuracy": majority_baseline([target for _, target in validation]),
        "reloaded_equals_trained": _same(lm, finetuned),
    }, reports


def _train(name: str, config: RunConfig) -> "TrainResult":
    from t5x_lite.cli.display import ProgressObserver
    from t5x_lite.training.loop import train

    with ProgressObserver(name) as observer:
        return train(config, observer)


def _write_topics(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    from t5x_lite.data.stdlib_topics import stdlib_topic_pairs

    train, validation = stdlib_topic_pairs()
    folder.mkdir(parents=True)
    for name, pairs in (("train", train), ("validation", validation)):
        lines = [json.dumps({"inputs": source, "targets": target}) for source, target in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return [f"data.path={folder / 'train.jsonl'}", f"data.eval_path={folder / 'validation.jsonl'}"], validation


def _fill_spans(lm: "LanguageModel") -> list[str]:
    text = "Return a new <extra_id_0> object. If the file does not <extra_id_1>, raise an error."
    answer = lm.generate([text], max_new_tokens=12)[0]
    return [f"pre-trained model, masked:  {text}", f"                    fills in: {answer}"]


def _name_topics(lm: "LanguageModel", pairs: Sequence[tuple[str, str]]) -> list[str]:
    outputs = lm.generate([source for source, _ in pairs[:3]], max_new_tokens=8)
    return [
        f"fine-tuned model: {source[:70]}... -> {output} (truth: {target})"
        for (source, target), output in zip(pairs[:3], outputs, strict=True)
    ]


def _peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (10**6 if sys.platform == "darwin" else 1000)  # macOS counts bytes, Linux kilobytes


def _same(lm: "LanguageModel", result: "TrainResult") -> bool:
    import jax
    import numpy as np

    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(lm.params), jax.tree.leaves(result.state.params), strict=True)
    )
