"""How much faster a draft model makes decoding: one JSON line a figure.

    python benchmarks/speculative.py model=gpt2 draft_layers=2        # the most that a draft of two layers can give
    python benchmarks/speculative.py target=RUN draft=RUN text=FILE   # two trained decoders, prompts from a text

Without trained models the target has random weights and all its layers but the first few add nothing, so that a draft
of those few always agrees. Plain and speculative decoding take turns in one process; a figure is the median of the
ratios of neighbouring runs, with the lowest and the highest of them beside it, as other work on the machine comes and
goes. Settings, with their defaults, are in `SETTINGS`; lists are separated by commas.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import load
from t5x_lite.decoding import GenerationConfig, generate, speculative
from t5x_lite.models import PRESETS, build

SETTINGS = {
    "model": "gpt2",
    "draft_layers": "2",
    "target": "",
    "draft": "",
    "text": "",
    "batch_size": "1,8",
    "num_assistant_tokens": "2,4,8",
    "prompt_length": "32",
    "new_tokens": "64",
    "do_sample": "no,yes",
    "repeats": "5",
}


def main(arguments: list[str]) -> None:
    settings = SETTINGS | dict(argument.split("=", 1) for argument in arguments)
    unknown = settings.keys() - SETTINGS.keys()
    if unknown:
        sys.exit(f"unknown settings {sorted(unknown)}; there are {sorted(SETTINGS)}")
    models = trained(settings) if settings["target"] else agreeing(settings)
    for rows in numbers(settings["batch_size"]):
        batch = {"decoder_input_tokens": prompts(settings, rows, models[0].config.vocab_size)}
        for sampled in settings["do_sample"].split(","):
            for proposals in numbers(settings["num_assistant_tokens"]):
                config = GenerationConfig(
                    max_new_tokens=int(settings["new_tokens"]),
                    do_sample=sampled == "yes",
                    num_assistant_tokens=proposals,
                    eos_token_id=(),
                )
                figure = {"batch_size": rows, "do_sample": config.do_sample, "num_assistant_tokens": proposals}
                print(json.dumps(figure | measure(models, batch, config, int(settings["repeats"]))), flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def agreeing(settings: dict[str, str]) -> tuple[Any, ...]:
    """A model of random weights, and its first layers, after which nothing happens."""
    config = PRESETS[settings["model"]]
    layers = int(settings["draft_layers"])
    params = build(config).init_params(jax.random.key(0))

    def quiet(path: Any, value: jax.Array) -> jax.Array:
        adds = any(getattr(key, "key", None) in ("out", "down") for key in path)
        return value.at[layers:].set(0) if adds else value

    kept = params["decoder"]["layers"]
    params["decoder"]["layers"] = jax.tree_util.tree_map_with_path(quiet, kept)
    few = {**params, "decoder": {**params["decoder"], "layers": jax.tree.map(lambda x: x[:layers], kept)}}
    return build(config), params, build(replace(config, num_decoder_layers=layers)), few


def trained(settings: dict[str, str]) -> tuple[Any, ...]:
    target, draft = load(settings["target"]), load(settings["draft"])
    return target.model, target.params, draft.model, draft.params


def prompts(settings: dict[str, str], rows: int, vocab_size: int) -> np.ndarray:
    length = int(settings["prompt_length"])
    if not settings["text"]:
        return np.random.default_rng(0).integers(3, vocab_size, (rows, length)).astype(np.int32)
    tokens = np.array(load(settings["target"]).tokenizer.encode(Path(settings["text"]).read_text()), np.int32)
    starts = np.linspace(0, tokens.size - length, rows).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


def measure(models: tuple[Any, ...], batch: Any, config: GenerationConfig, repeats: int) -> dict[str, Any]:
    model, params, draft_model, draft_params = models
    params, draft_params = model.unstacked(params), draft_model.unstacked(draft_params)

    def plain() -> Any:
        return generate(model, params, batch, config)

    def speculated() -> Any:
        return speculative.generate(model, params, draft_model, draft_params, batch, config)

    alone, (out, acceptance) = plain(), speculated()  # compiled now
    ratios = [seconds(plain) / seconds(speculated) for _ in range(repeats)]
    rounds = float(jnp.mean(acceptance.rounds))
    return {
        "speedup": round(float(np.median(ratios)), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "accepted_share": round(float(jnp.mean(acceptance.accepted)) / rounds / config.num_assistant_tokens, 3),
        "tokens_per_pass": round(float(jnp.mean(out.lengths)) / rounds, 3),
        "same_tokens": bool(jnp.all(out.tokens == alone.tokens)),
    }


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
