"""Examples that share a row do not know of each other: neither loss nor gradient shows that they are packed."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.data.objectives import Example
from t5x_lite.data.packing import Batch, Layout, first_fit
from t5x_lite.models import TransformerConfig, build, preset
from t5x_lite.nn.embeddings import TokenEmbedding
from t5x_lite.training.step import batch_loss

# A row holds several examples, and no model knows positions for more than one of them.
LONGEST, VOCAB = 12, 64
LENGTHS = {"encoder": 29, "decoder": 25}


def small(name: str, **changes: Any) -> TransformerConfig:
    published = preset(name)
    return dataclasses.replace(
        published,
        vocab_size=VOCAB,
        embed_dim=32,
        num_heads=4,
        head_dim=8,
        mlp_dim=64,
        num_encoder_layers=min(published.num_encoder_layers, 2),
        num_decoder_layers=min(published.num_decoder_layers, 2),
        max_positions=LONGEST if published.positions == "learned" else published.max_positions,
        dropout_rate=0.0,
        pad_id=0,
        bos_id=1,
        eos_id=1,
        decoder_start_id=2,
        **changes,
    )


FAMILIES = {
    "t5": small("t5-v1.1-small"),  # relative positions, in self-attention alone
    "bart": small("bart-base"),  # learned positions, behind an offset
    "gpt2": small("gpt2"),  # learned positions
    "llama": small("llama-2-70b", num_kv_heads=2),  # rotary positions
    "bert": small("bert-base-uncased", head="masked_lm", pooler=False),  # learned positions, and token types
}
SIDES = {name: [side for side in LENGTHS if getattr(config, f"num_{side}_layers")] for name, config in FAMILIES.items()}


@dataclasses.dataclass
class Case:
    """A family, its examples, and one compiled function of the loss.

    Attributes:
      sides: the stacks that there are.
      rows: the examples of each row.
      packed: the batch of these rows.
      alone: the batch of the same examples in the same order, each in a row of its own.
      nats: a function of a batch: those of every target, the derivatives of its loss with respect to the weights.
      gradients: a function (batch, weights) of the loss under these weights of its targets: its gradients with respect
        to the vectors of the tokens of each side.
    """

    sides: list[str]
    rows: list[list[Example]]
    packed: Batch
    alone: Batch
    nats: Callable[[Batch], np.ndarray]
    gradients: Callable[[Batch, np.ndarray], dict[str, np.ndarray]]

    def segments(self, side: str) -> np.ndarray:
        return self.packed[f"{side}_segment_ids"]

    @property
    def asked(self) -> str:
        """The side whose tokens are predicted."""
        return self.sides[-1]


def examples(sides: Sequence[str], count: int) -> list[Example]:
    rng = np.random.default_rng(0)

    def draw(side: str) -> np.ndarray | None:
        return rng.integers(3, VOCAB, rng.integers(2, LONGEST + 1)).astype(np.int32) if side in sides else None

    made = [Example(draw("encoder"), draw("decoder")) for _ in range(count)]
    if "decoder" in sides:
        return made
    lengths = [len(example.inputs) for example in made]  # type: ignore[arg-type]
    return [
        dataclasses.replace(
            example,
            input_targets=rng.integers(3, VOCAB, length),
            input_weights=np.ones(length, np.float32),
            input_types=np.sort(rng.integers(0, 2, length)),
        )
        for example, length in zip(made, lengths, strict=True)
    ]


def pack(made: Sequence[Example], capacity: Sequence[int]) -> list[list[Example]]:
    sizes = [[0 if ids is None else len(ids) for ids in (example.inputs, example.targets)] for example in made]
    order, starts = first_fit(np.array(sizes), capacity)
    return [[made[number] for number in order[a:b]] for a, b in pairwise(starts)]


def loss_derivatives(config: TransformerConfig, params: Any, weights_name: str) -> tuple[Any, Any]:
    """Returns `Case.nats` and `Case.gradients`."""
    model = build(config)
    sides = {length: side for side, length in LENGTHS.items()}

    def loss(weights: jax.Array, moved: dict[str, jax.Array], batch: Batch) -> jax.Array:
        def move(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            vectors = call(*args, **kwargs)
            if isinstance(context.module, TokenEmbedding) and context.method_name == "__call__":
                return vectors + moved[sides[vectors.shape[1]]]
            return vectors

        with nn.intercept_methods(move):
            return batch_loss(model, params, batch | {weights_name: weights}).cross_entropy

    both, first = jax.jit(jax.grad(loss, argnums=(0, 1))), jax.jit(jax.grad(loss))

    def unmoved(batch: Batch) -> dict[str, jax.Array]:
        tokens = {side: batch.get(f"{side}_input_tokens") for side in LENGTHS}
        return {side: jnp.zeros((*ids.shape, config.embed_dim)) for side, ids in tokens.items() if ids is not None}

    def nats(batch: Batch) -> np.ndarray:
        # Where the gradients are compiled anyway, another program would cost more than it saves.
        if f"{weights_name.split('_')[0]}_positions" in batch:
            return np.asarray(both(batch[weights_name], unmoved(batch), batch)[0])
        return np.asarray(first(batch[weights_name], unmoved(batch), batch))

    def gradients(batch: Batch, weights: np.ndarray) -> dict[str, np.ndarray]:
        return jax.tree.map(np.asarray, both(weights, unmoved(batch), batch)[1])

    return nats, gradients


@pytest.fixture(scope="module")
def cases(random_params: Any, sharp_params: Any) -> Callable[[str], Case]:
    """A function `family -> Case`."""

    @cache
    def make(name: str) -> Case:
        config, sides = FAMILIES[name], SIDES[name]
        capacity = [LENGTHS[side] if side in sides else 0 for side in LENGTHS]
        extras = () if "decoder" in sides else ("input_targets", "input_weights", "input_types")
        layout = Layout(capacity[0], capacity[1], config.fill_id, config.decoder_start_id, extras=extras)
        rows = pack(examples(sides, 10), capacity)
        assert max(map(len, rows)) >= 3
        packed = dataclasses.replace(layout, positions=True)(rows, 10)
        alone = layout([[example] for row in rows for example in row])
        params = (random_params if config.family == "t5" else sharp_params)(config)
        nats, gradients = loss_derivatives(config, params, f"{sides[-1]}_loss_weights")
        return Case(sides, rows, packed, alone, nats, gradients)

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_s_loss_is_that_of_its_example_alone(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)
    wanted = case.nats(case.alone)[case.alone[f"{case.asked}_segment_ids"] > 0]  # row by row: in the packed order
    real = case.segments(case.asked) > 0
    assert len(wanted) == real.sum() > 50
    assert wanted.std() > 0.5  # the tokens are not all alike to the model
    # Float32 sums of the same numbers in other places of a row; 6e-6 was seen, of losses up to 30 nats.
    np.testing.assert_allclose(case.nats(case.packed)[real], wanted, rtol=1e-6, atol=1e-5)
    # So it is if the model counts positions by itself.
    counting = {key: array for key, array in case.packed.items() if not key.endswith("positions")}
    np.testing.assert_allclose(case.nats(counting)[real], wanted, rtol=1e-6, atol=1e-5)
    # And not if the segments are not told apart, positions or not.
    assert np.max(np.abs(case.nats(one_segment(case.packed))[real] - wanted)) > 0.1


def one_segment(batch: Batch) -> Batch:
    """Returns the batch with one segment in each row, as if its examples were one."""
    return {key: np.minimum(array, 1) if key.endswith("segment_ids") else array for key, array in batch.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_gradient_goes_from_one_example_to_another(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)
    for number in range(1, max(map(len, case.rows)) + 1):
        weights = (case.segments(case.asked) == number).astype(np.float32)
        gradients, leaking = (case.gradients(batch, weights) for batch in (case.packed, one_segment(case.packed)))
        asked = weights.any(axis=1)
        assert set(gradients) == set(case.sides)
        for side in case.sides:
            segments = case.segments(side)
            own = segments == number
            reached = (gradients[side] != 0).any(axis=-1)
            # Every input of an example has a part in its loss, its start token included; nothing else has.
            np.testing.assert_array_equal(reached, own, err_msg=f"{side}, example {number}")
            # This can fail. A decoder looks back only, so that its first example hears of no other all the same.
            others = (segments > 0) & ~own & asked[:, None]
            if side == "decoder":
                others &= segments < number
            heard = (leaking[side] != 0).any(axis=-1)
            assert heard[others].all()
            assert others.any() or (side == "decoder" and number == 1)
