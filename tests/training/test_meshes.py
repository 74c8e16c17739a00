"""A run does not show on which mesh it was made: every axis alone and together, for every kind of model."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite.data.objectives import Example
from t5x_lite.data.packing import Layout, decoder_batch
from t5x_lite.models import TransformerConfig, build, preset
from t5x_lite.sharding import make_mesh, put_batch
from t5x_lite.training.losses import LossSettings
from t5x_lite.training.optimizers import make_optimizer
from t5x_lite.training.schedules import make_schedule
from t5x_lite.training.state import TrainState, init_state
from t5x_lite.training.step import make_train_step

ONE = "one device"
MESHES = ("data:8", "fsdp:8", "model:8", "data:2,fsdp:2,model:2", "context:4,data:2")
STEPS, ROWS, VOCAB = 20, 16, 64
INPUTS = 16
# No multiple of the four parts that `context` splits a length into: such rows stay whole.
TARGETS = 10

Batch = dict[str, np.ndarray]


def small(name: str, **changes: Any) -> TransformerConfig:
    """Returns a published model at a size for tests; its heads, of keys too, divide over eight devices."""
    published = preset(name)
    return dataclasses.replace(
        published,
        **{
            "vocab_size": VOCAB,
            "embed_dim": 32,
            "num_heads": 8,
            "head_dim": 4,
            "mlp_dim": 64,
            "num_encoder_layers": min(published.num_encoder_layers, 2),
            "num_decoder_layers": min(published.num_decoder_layers, 2),
            "max_positions": INPUTS if published.positions == "learned" else published.max_positions,
            "dropout_rate": 0.1 if published.dropout_rate else 0.0,
            "pad_id": 0,
            "bos_id": 1,
            "eos_id": 1,
            "decoder_start_id": 0,
            **changes,
        },
    )


def words(rng: np.random.Generator, most: int) -> np.ndarray:
    """Random ids: a few of them are frequent, so that there is something to learn."""
    return (2 + (VOCAB - 2) * rng.random(rng.integers(1, most + 1)) ** 3).astype(np.int32)


def pairs(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    """Ragged rows of both sides; a row of padding alone is one of them."""
    rows = [[Example(words(rng, INPUTS), words(rng, TARGETS))] for _ in range(ROWS - 1)]
    return Layout(INPUTS, TARGETS, config.fill_id, config.decoder_start_id)(rows, ROWS)


def continued(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    """Ragged rows of a decoder alone."""
    rows = [words(rng, INPUTS - 1) for _ in range(ROWS)]
    return decoder_batch([([1], list(row)) for row in rows], rows=ROWS, length=INPUTS, pad_id=config.fill_id)


def packed(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    """Rows of a decoder alone that several texts share, which `context` splits without regard to where they begin."""
    layout = Layout(0, INPUTS, config.fill_id, 1, positions=True)
    return layout([[Example(None, words(rng, INPUTS // 3)) for _ in range(3)] for _ in range(ROWS)], ROWS)


def masked(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    """Ragged rows of an encoder alone, with words to predict, two kinds of tokens and a label for each row."""

    def example() -> Example:
        ids = words(rng, INPUTS)
        weights = (rng.random(len(ids)) < 0.4).astype(np.float32)
        shown = np.where(weights > 0, 2, ids).astype(np.int32)
        types = np.sort(rng.integers(0, 2, len(ids)))
        return Example(shown, None, input_targets=ids, input_weights=weights, input_types=types)

    layout = Layout(INPUTS, 0, config.fill_id, 0, extras=("input_targets", "input_weights", "input_types"))
    labels = rng.integers(0, 2, ROWS).astype(np.int32)
    return layout([[example()] for _ in range(ROWS)], ROWS) | {"next_sentence_labels": labels}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model and what it is trained on.

    Attributes:
      config: of the model; T5, BART and GPT-2 drop out, T5 with masks that positions share.
      batch: draws a batch.
      optimizer: its name.
      microbatches: of a step.
    """

    config: TransformerConfig
    batch: Callable[[TransformerConfig, np.random.Generator], Batch]
    optimizer: str = "adamw"
    microbatches: int = 1

    def batches(self) -> list[Batch]:
        return [self.batch(self.config, np.random.default_rng([3, step])) for step in range(STEPS)]


FAMILIES = {
    "t5": Family(small("t5-v1.1-small", dropout_rate=0.1), pairs, "adafactor"),
    "bart": Family(small("bart-base"), pairs),
    "gpt2": Family(small("gpt2"), packed),
    "bert": Family(small("bert-base-uncased", dropout_rate=0.0), masked),
    # Twice as many heads of queries as of keys and values.
    "llama": Family(small("llama-2-70b", num_heads=16, num_kv_heads=8), continued, microbatches=2),
}


@dataclasses.dataclass
class Run:
    """What a training run said at every step, and where it began and ended."""

    metrics: dict[str, list[float]]
    before: TrainState
    after: TrainState


Runs = Callable[[str, str], Run]


@pytest.fixture(scope="module")
def runs(random_params: Any, sharp_params: Any) -> Runs:
    """A function `(family, mesh) -> Run`."""

    @cache
    def train(name: str, mesh_text: str) -> Run:
        family = FAMILIES[name]
        model = build(family.config)
        mesh = make_mesh(devices=jax.devices()[:1]) if mesh_text == ONE else make_mesh(mesh_text)
        schedule = make_schedule("inverse_square_root", 3e-3, 4, STEPS)
        tx = make_optimizer(family.optimizer, schedule, model.logical_axes())
        params = (random_params if family.config.family == "t5" else sharp_params)(family.config)
        before = state = init_state(model, tx, mesh, 0, params)
        step = make_train_step(
            model, tx, schedule, mesh, state, microbatches=family.microbatches, loss=LossSettings(z_loss=1e-4)
        )
        said = []
        for batch in family.batches():
            state, metrics = step(state, put_batch(mesh, batch))
            said.append(metrics)
        return Run({key: [float(metrics[key]) for metrics in said] for key in said[0]}, before, state)

    return train


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mesh_text", MESHES)
def test_every_mesh_trains_the_same(name: str, mesh_text: str, runs: Runs) -> None:
    alone, spread = runs(name, ONE), runs(name, mesh_text)
    assert spread.metrics["target_tokens"] == alone.metrics["target_tokens"]
    # Sums are taken in another order: 5e-7 was seen of losses over 20 steps, 8e-7 of z-losses, 2e-6 of norms.
    for metric in ("loss", "z_loss", "gradient_norm"):
        got, wanted = (np.array(run.metrics[metric]) for run in (spread, alone))
        first = 1e-4 if metric == "gradient_norm" else 1e-5
        np.testing.assert_allclose(got[:10], wanted[:10], rtol=first, atol=0, err_msg=metric)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=0, err_msg=metric)
    assert np.ptp(alone.metrics["loss"]) > 0.1
    layouts = jax.tree.map(lambda x: x.sharding, spread.before)
    assert jax.tree.all(jax.tree.map(lambda s, x: s.is_equivalent_to(x.sharding, x.ndim), layouts, spread.after))
