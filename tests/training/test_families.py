"""Every family trains: its own objective, on a mesh that splits rows, parameters and heads, as on one device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

from t5x_lite import sharding
from t5x_lite.data.pipeline import decoder_batch, encoder_decoder_batch
from t5x_lite.models import TransformerConfig, build, preset
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import make_mesh, put_batch, spec
from t5x_lite.training.optimizers import make_optimizer
from t5x_lite.training.state import TrainState, init_state
from t5x_lite.training.step import loss_gradients, make_train_step

MESH = "data:2,fsdp:2,model:2"
STEPS, ROWS, LENGTH, VOCAB = 30, 8, 16, 64

Batch = dict[str, np.ndarray]
Batches = Callable[[TransformerConfig], list[Batch]]

# --- a language -----------------------------------------------------------------------------------------------------

# Ids below are free for special tokens, whichever of them a family has for what; ids above are words that never occur.
MASK, OPEN, CLOSE, SENTINEL, LANGUAGE = 4, 5, 6, 7, 9
FIRST, WORDS, TOPICS = 16, 24, 3


def sentence(rng: np.random.Generator, length: int, topic: int | None = None) -> list[int]:
    """Words of one topic, each of which says what comes next."""
    topic = int(rng.integers(TOPICS)) if topic is None else topic
    size = WORDS // TOPICS
    begin = int(rng.integers(size))
    return [FIRST + topic * size + (begin + 3 * place) % size for place in range(length)]


def drawn(make: Callable[[TransformerConfig, np.random.Generator], Batch]) -> Batches:
    """Returns a function that draws a batch for every step."""
    return lambda config: [make(config, np.random.default_rng([7, step])) for step in range(STEPS)]


def lengths(rng: np.random.Generator, most: int) -> list[int]:
    """Returns the lengths of the rows; no two ways of averaging over tokens agree on them."""
    return [most, *rng.integers(most // 2, most + 1, ROWS - 1).tolist()]


def pairs(config: TransformerConfig, examples: Sequence[tuple[list[int], list[int]]], start: int) -> Batch:
    arrays = [(np.array(source, np.int32), np.array(target, np.int32)) for source, target in examples]
    return encoder_decoder_batch(
        arrays,
        rows=ROWS,
        input_length=LENGTH,
        target_length=LENGTH,
        pad_id=config.fill_id,
        decoder_start_id=start,
    )


@drawn
def corrupted_spans(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    def example(length: int) -> tuple[list[int], list[int]]:
        words, begin = sentence(rng, length), int(rng.integers(length - 3))
        source = [*words[:begin], SENTINEL, *words[begin + 3 :], config.eos_id]
        return source, [SENTINEL, *words[begin : begin + 3], SENTINEL + 1, config.eos_id]

    return pairs(config, [example(length) for length in lengths(rng, LENGTH - 1)], config.decoder_start_id)


@drawn
def denoised(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    def example(length: int) -> tuple[list[int], list[int]]:
        words = sentence(rng, length)
        kept = [MASK if gone else word for word, gone in zip(words, rng.random(length) < 0.3, strict=True)]
        return [config.bos_id, *kept, config.eos_id], [config.bos_id, *words, config.eos_id]

    return pairs(config, [example(length) for length in lengths(rng, LENGTH - 2)], config.decoder_start_id)


@drawn
def denoised_in_a_language(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    def example(length: int) -> tuple[list[int], list[int]]:
        words = sentence(rng, length)
        kept = [MASK if gone else word for word, gone in zip(words, rng.random(length) < 0.3, strict=True)]
        return [*kept, config.eos_id, LANGUAGE], [*words, config.eos_id, LANGUAGE]

    return pairs(config, [example(length) for length in lengths(rng, LENGTH - 2)], LANGUAGE)


@drawn
def continued(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    start = [] if config.bos_id is None else [config.bos_id]
    words = [[*start, *sentence(rng, length)] for length in lengths(rng, LENGTH - len(start))]
    return decoder_batch([(row[:1], row[1:]) for row in words], rows=ROWS, length=LENGTH, pad_id=config.fill_id)


def encoder_batch(config: TransformerConfig, rows: Sequence[list[int]]) -> Batch:
    made = pairs(config, [(row, []) for row in rows], 0)
    return {name: array for name, array in made.items() if name.startswith("encoder")}


def masked(batch: Batch, rng: np.random.Generator) -> Batch:
    """Returns the batch with 15 % of its words to be predicted: 80 % of them masked, 10 % random, 10 % as they were."""
    tokens = batch["encoder_input_tokens"]
    chosen = (tokens >= FIRST) & (rng.random(tokens.shape) < 0.15)
    chosen[np.arange(ROWS), np.argmax(tokens >= FIRST, axis=1)] |= ~chosen.any(axis=1)
    how = rng.random(tokens.shape)
    shown = np.where(how < 0.8, MASK, np.where(how < 0.9, rng.integers(FIRST, FIRST + WORDS, tokens.shape), tokens))
    return batch | {
        "encoder_input_tokens": np.where(chosen, shown, tokens).astype(np.int32),
        "encoder_target_tokens": tokens,
        "encoder_loss_weights": chosen.astype(np.float32),
    }


@drawn
def masked_words(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    rows = [[config.bos_id, *sentence(rng, length), config.eos_id] for length in lengths(rng, LENGTH - 2)]
    return masked(encoder_batch(config, rows), rng)


@drawn
def masked_words_and_next_sentence(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    rows, types, labels = [], np.zeros((ROWS, LENGTH), np.int32), []
    for length in lengths(rng, LENGTH - 3):
        first, topic, other = length // 2, *rng.permutation(TOPICS)[:2].tolist()
        labels.append(int(rng.integers(2)))
        segments = sentence(rng, first, topic), sentence(rng, length - first, other if labels[-1] else topic)
        rows.append([2, *segments[0], 3, *segments[1], 3])
        types[len(rows) - 1, first + 2 : length + 3] = 1
    batch = encoder_batch(config, rows) | {"encoder_token_types": types}
    return masked(batch, rng) | {"next_sentence_labels": np.array(labels, np.int32)}


@drawn
def topics(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    labels = rng.integers(TOPICS, size=ROWS)
    rows = [[2, *sentence(rng, n, topic), 3] for n, topic in zip(lengths(rng, LENGTH - 2), labels, strict=True)]
    return encoder_batch(config, rows) | {"labels": labels.astype(np.int32)}


@drawn
def kinds_of_words(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    batch = encoder_batch(config, [[2, *sentence(rng, length), 3] for length in lengths(rng, LENGTH - 2)])
    words = batch["encoder_input_tokens"] >= FIRST
    kinds = np.where(words, batch["encoder_input_tokens"] % config.num_labels, 0).astype(np.int32)
    return batch | {"encoder_target_tokens": kinds, "encoder_loss_weights": words.astype(np.float32)}


@drawn
def answers(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    rows, starts, ends = [], [], []
    for length in lengths(rng, LENGTH - 4):
        words = sentence(rng, length)
        start, end = sorted(rng.integers(length, size=2).tolist())
        rows.append([2, *words[:start], OPEN, *words[start : end + 1], CLOSE, *words[end + 1 :], 3])
        starts.append(start + 1)
        ends.append(end + 2)
    positions = {"start_positions": np.array(starts, np.int32), "end_positions": np.array(ends, np.int32)}
    return encoder_batch(config, rows) | positions


# --- models ---------------------------------------------------------------------------------------------------------


def small(name: str, **changes: Any) -> TransformerConfig:
    """Returns a published model at a size for tests, without dropout; special ids are brought down to 0 to 2."""
    published = preset(name)
    ids = {"pad_id", "bos_id", "eos_id", "decoder_start_id"}
    return dataclasses.replace(
        published,
        **{
            "vocab_size": VOCAB,
            "embed_dim": 32,
            "num_heads": 4,
            "head_dim": 8,
            "mlp_dim": 64,
            "num_encoder_layers": min(published.num_encoder_layers, 2),
            "num_decoder_layers": min(published.num_decoder_layers, 2),
            "max_positions": LENGTH if published.positions == "learned" else published.max_positions,
            "dropout_rate": 0.0,
            "attention_dropout_rate": None,
            "mlp_dropout_rate": None,
            **{name: 1 for name in ids if (getattr(published, name) or 0) >= FIRST},
            **changes,
        },
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A model, what it learns, and how.

    Attributes:
      config: of the model.
      batches: of its objective.
      optimizer: its name.
      learning_rate: constant.
    """

    config: TransformerConfig
    batches: Batches
    optimizer: str = "adamw"
    learning_rate: float = 1e-2


FAMILIES = {
    "t5": Family(small("t5-v1.1-small"), corrupted_spans, "adafactor", 0.1),
    "bart": Family(small("bart-base"), denoised),
    "mbart": Family(small("mbart-large-cc25"), denoised_in_a_language),
    "gpt": Family(small("openai-gpt"), continued),
    "gpt2": Family(small("gpt2"), continued),
    "gpt2 with dropout": Family(
        small("gpt2", dropout_rate=0.1, attention_dropout_rate=0.1, mlp_dropout_rate=0.1), continued
    ),
    "gpt3": Family(small("gpt3-125m", attention_window=4, alternating_window=True), continued),
    "llama": Family(small("llama-2-70b", num_kv_heads=2), continued),
    "palm": Family(small("palm-8b"), continued),
    "bert": Family(small("bert-base-uncased"), masked_words_and_next_sentence),
    "roberta": Family(small("roberta-base"), masked_words),
    "bert sequence classification": Family(
        small("bert-base-uncased", head="sequence_classification", num_labels=TOPICS), topics
    ),
    "bert token classification": Family(
        small("bert-base-uncased", head="token_classification", num_labels=5), kinds_of_words
    ),
    "bert span": Family(small("bert-base-uncased", head="span"), answers),
}


def fresh(config: TransformerConfig) -> Any:
    """Returns parameters as a fresh model has them, but for their exact spread, without compiling anything."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        if name in ("scale", "bias"):
            return np.full(shape.shape, float(name == "scale"), np.float32)
        spread = shape.shape[-2] ** -0.5 if name == "kernel" else 0.2
        return (spread * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, build(config).param_shapes())


@dataclasses.dataclass
class Run:
    """What a training run said at every step, and where it ended."""

    model: Transformer
    metrics: dict[str, list[float]]
    state: TrainState


def train(family: Family, batches: list[Batch], mesh: jax.sharding.Mesh) -> Run:
    model = build(family.config)
    tx = make_optimizer(family.optimizer, family.learning_rate, model.logical_axes())
    state = init_state(model, tx, mesh, seed=0, params=fresh(family.config))
    step = make_train_step(model, tx, optax.constant_schedule(family.learning_rate), mesh, state)
    said = []
    for batch in batches:
        state, metrics = step(state, put_batch(mesh, batch))
        said.append(metrics)
    return Run(model, {name: [float(metrics[name]) for metrics in said] for name in said[0]}, state)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_the_same_on_a_mesh(name: str) -> None:
    family = FAMILIES[name]
    batches = family.batches(family.config)
    alone = train(family, batches, make_mesh(devices=jax.devices()[:1]))
    spread = train(family, batches, make_mesh(MESH))

    losses = alone.metrics["loss"]
    worst = {
        m: float(np.max(np.abs(np.array(spread.metrics[m]) / np.array(alone.metrics[m]) - 1)))
        for m in alone.metrics
        if "loss" in m and np.all(np.array(alone.metrics[m]))
    }
    print("FIG", name, losses[0], np.mean(losses[-5:]), np.mean(losses[-5:]) / losses[0], worst)
