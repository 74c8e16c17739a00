"""Every family trains: its own objective, on a mesh that splits rows, parameters and heads, as on one device."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest

from t5x_lite import sharding
from t5x_lite.data.objectives import Example
from t5x_lite.data.packing import Layout, decoder_batch
from t5x_lite.models import TransformerConfig, build, preset
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import make_mesh, put_batch
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
FIRST, WORDS, TOPICS = 16, 12, 3


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
    rows = [[Example(np.array(source, np.int32), np.array(target, np.int32))] for source, target in examples]
    return Layout(LENGTH, LENGTH, config.fill_id, start)(rows, ROWS)


@drawn
def corrupted_spans(config: TransformerConfig, rng: np.random.Generator) -> Batch:
    def example(length: int) -> tuple[list[int], list[int]]:
        words, begin, size = sentence(rng, length), int(rng.integers(length - 4)), int(rng.integers(2, 5))
        source = [*words[:begin], SENTINEL, *words[begin + size :], config.eos_id]
        return source, [SENTINEL, *words[begin : begin + size], SENTINEL + 1, config.eos_id]

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


DROPPING = "gpt2 with dropout"
FAMILIES = {
    "t5": Family(small("t5-v1.1-small"), corrupted_spans, "adafactor", 0.03),
    "bart": Family(small("bart-base"), denoised),
    "mbart": Family(small("mbart-large-cc25"), denoised_in_a_language),
    "gpt": Family(small("openai-gpt"), continued),
    "gpt2": Family(small("gpt2"), continued),
    DROPPING: Family(small("gpt2", dropout_rate=0.1, mlp_dropout_rate=0.1), continued),
    "gpt3": Family(small("gpt3-125m", attention_window=4, alternating_window=True), continued),
    "llama": Family(small("llama-2-70b", num_kv_heads=2), continued),
    "palm": Family(small("palm-8b"), continued),
    "bert": Family(small("bert-base-uncased"), masked_words_and_next_sentence),
    "roberta": Family(small("roberta-base"), masked_words),
    "bert sequence classification": Family(
        small("bert-base-uncased", head="sequence_classification", num_labels=TOPICS), topics, learning_rate=2e-3
    ),
    "bert token classification": Family(
        small("bert-base-uncased", head="token_classification", num_labels=5), kinds_of_words, learning_rate=2e-3
    ),
    "bert span": Family(small("bert-base-uncased", head="span"), answers, learning_rate=3e-3),
}


def fresh(config: TransformerConfig) -> Any:
    """Returns parameters as a fresh model has them, but for their exact spread, without compiling anything."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        layer, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        if name in ("scale", "bias"):
            return np.full(shape.shape, float(name == "scale"), np.float32)
        spread = shape.shape[-2] ** -0.5 if name == "kernel" else 1.0 if config.initialization == "t5" else 0.2
        if layer.endswith("query") and not config.scaled_attention:
            spread *= config.head_dim**-0.5
        return (spread * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, build(config).param_shapes())


@dataclasses.dataclass
class Run:
    """What a training run said at every step, and where it ended."""

    model: Transformer
    metrics: dict[str, list[float]]
    state: TrainState


Runs = Callable[[str, str], Run]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """A function `(family, mesh) -> Run`; one device where the mesh is empty."""

    @cache
    def train(name: str, mesh_text: str) -> Run:
        family = FAMILIES[name]
        model = build(family.config)
        mesh = make_mesh(mesh_text) if mesh_text else make_mesh(devices=jax.devices()[:1])
        tx = make_optimizer(family.optimizer, family.learning_rate, model.logical_axes())
        state = init_state(model, tx, mesh, seed=0, params=fresh(family.config))
        step = make_train_step(model, tx, optax.constant_schedule(family.learning_rate), mesh, state)
        said = []
        for batch in family.batches(family.config):
            state, metrics = step(state, put_batch(mesh, batch))
            said.append(metrics)
        return Run(model, {name: [float(metrics[name]) for metrics in said] for name in said[0]}, state)

    return train


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_on_a_mesh(name: str, runs: Runs) -> None:
    losses = runs(name, MESH).metrics["loss"]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


# The others are those of `test_meshes.py`.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("t5", "bart", "gpt2", "bert", "llama")])
def test_other_families_learn_the_same_on_one_device(name: str, runs: Runs) -> None:
    alone, spread = runs(name, ""), runs(name, MESH)
    # Sums in another order. Of 30 steps, and 14 families, 3e-6 was the largest seen.
    for metric in spread.metrics.keys() - {"accuracy"}:
        # AdamW steps as far where a gradient is nothing but rounding: that of the keys' biases, or of what adds as much
        # to the logits of all places of a span. So modules' parameters and updates may differ by any amount.
        if metric.startswith(("update_norm", "parameter_norm/")):
            continue
        # It does not see a gradient that is twice too large; the norm does, and 3e-5 was seen of it.
        rtol = 1e-4 if metric.startswith("gradient_norm") else 1e-5
        np.testing.assert_allclose(spread.metrics[metric], alone.metrics[metric], rtol=rtol, atol=0, err_msg=metric)


def test_what_a_step_counts(runs: Runs) -> None:
    for name, family in FAMILIES.items():
        head, batches = family.config.head, family.batches(family.config)
        if head in ("sequence_classification", "span"):
            wanted = [ROWS * (2 if head == "span" else 1)] * STEPS
        else:
            side = "decoder" if family.config.num_decoder_layers else "encoder"
            wanted = [np.sum(batch[f"{side}_loss_weights"]) for batch in batches]
            assert len(set(wanted)) > 1
        assert runs(name, MESH).metrics["target_tokens"] == wanted, name


def test_dropout_is_on_where_it_is_asked_for(runs: Runs) -> None:
    # With dropout the runs of one seed are equal on both layouts, see above: so are the random bits.
    first, without = (runs(name, MESH).metrics["loss"][0] for name in (DROPPING, "gpt2"))
    assert abs(first - without) > 1e-3


# --- layouts --------------------------------------------------------------------------------------------------------


def shard(array: jax.Array) -> tuple[int, ...]:
    return array.addressable_shards[0].data.shape


@pytest.mark.parametrize(("name", "moments"), [("llama", ("mu", "nu")), ("bert", ("mu", "nu")), ("t5", ("v",))])
def test_the_optimizer_s_state_is_split_as_the_parameters_are(name: str, moments: tuple[str, ...], runs: Runs) -> None:
    state = runs(name, MESH).state
    for moment in moments:
        kept = jax.tree.leaves([tree for _, tree in optax.tree.get_all_with_path(state.opt_state, moment)])
        for param, array in zip(jax.tree.leaves(state.params), kept, strict=True):
            assert (array.shape, shard(array)) == (param.shape, shard(param))
    for tree in (state.params, state.opt_state):
        total = sum(array.nbytes for array in jax.tree.leaves(tree))
        # What is no matrix is split over one of fsdp:2,model:2 at most.
        assert 3 < total / sharding.bytes_per_device(tree) <= 4


def test_heads_of_keys_and_values_are_split_unless_there_is_one(runs: Runs) -> None:
    for name, joined, split in (("gpt2", 32, 16), ("llama", 16, 8), ("palm", 8, 8)):
        state = runs(name, MESH).state
        for tree in (state.params, optax.tree.get(state.opt_state, "mu")):
            attention = tree["decoder"]["layers"]["self_attention"]
            for part, columns, held in (("query", 32, 16), ("key", joined, split), ("value", joined, split)):
                kernel = attention[part]["kernel"]
                assert kernel.shape == (2, 32, columns), (name, part)
                assert shard(kernel) == (2, 16, held), (name, part)


# --- gradients ------------------------------------------------------------------------------------------------------


def difference(a: Any, b: Any) -> float:
    """The largest difference of two trees, relative to the second's largest number."""
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(b))
    return max(np.max(np.abs(x - y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) / largest


def only(batch: Batch, rows: np.ndarray) -> Batch:
    """Returns the batch with all other rows turned into padding."""
    empty = {name: np.where(rows[:, None], batch[name], 0) for name in ("encoder_segment_ids", "encoder_loss_weights")}
    return batch | empty


def test_gradients_of_bert_do_not_depend_on_the_number_of_microbatches() -> None:
    family = FAMILIES["bert"]
    model = build(family.config)
    params = fresh(family.config)
    # Rows of very different numbers of masked words, and one of padding alone: it is no example of either task.
    batch = only(family.batches(family.config)[0], np.arange(ROWS) != 5)
    batch["encoder_loss_weights"][::4, 8:] = 0.0

    @cache
    def program(microbatches: int) -> Any:
        def compute(params: Any, batch: Batch) -> Any:
            return loss_gradients(model, params, batch, microbatches=microbatches, key=jax.random.key(0))

        return jax.jit(compute)

    def gradients(batch: Batch, microbatches: int = 1) -> Any:
        return jax.tree.map(np.asarray, program(microbatches)(params, batch))

    whole, sums = gradients(batch)
    assert sums.weight == np.sum(batch["encoder_loss_weights"])
    for microbatches in (2, 4):
        got, got_sums = gradients(batch, microbatches)
        assert difference(got, whole) < 1e-6  # float32 sums in another order
        np.testing.assert_allclose(got_sums, sums, rtol=1e-6)

    # What they are not: the mean of the parts' own means.
    parts = [only(batch, np.arange(ROWS) % 4 == part) for part in range(4)]
    means = [gradients(part) for part in parts]
    assert len({float(part.weight) for _, part in means}) > 2
    naive = jax.tree.map(lambda *g: sum(g) / len(g), *[mean for mean, _ in means])
    assert difference(naive, whole) > 1e-2

    # The second task is a part of them: an example of it weighs as much as any other, masked words or not.
    other = batch | {"next_sentence_labels": 1 - batch["next_sentence_labels"]}
    assert difference(gradients(other)[0], whole) > 1e-2
    padding = batch["next_sentence_labels"].copy()
    padding[5] = 1 - padding[5]
    assert difference(gradients(batch | {"next_sentence_labels": padding})[0], whole) == 0
