import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.models import TransformerConfig, build
from t5x_lite.sharding import make_mesh, put_batch
from t5x_lite.training.losses import LossSettings
from t5x_lite.training.optimizers import make_optimizer
from t5x_lite.training.schedules import make_schedule
from t5x_lite.training.state import TrainState, abstract_state, init_state
from t5x_lite.training.step import loss_gradients, make_eval_step, make_train_step

MESHES = ("data:2,model:4", "fsdp:4,model:2")  # others, and other families, in test_meshes.py
STEPS = 10
VOCAB = 128
Z_LOSS = LossSettings(z_loss=1e-4)


@pytest.fixture(scope="session")
def config(tiny_config: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(tiny_config, vocab_size=VOCAB, num_decoder_layers=2)


@pytest.fixture(scope="session")
def params(config: TransformerConfig, random_params: Any) -> Any:
    return random_params(config)


@pytest.fixture(scope="session")
def batches(random_batch: Any) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [random_batch(rng, 16, 12, 10, VOCAB) for _ in range(STEPS)]


@dataclasses.dataclass
class Run:
    """A short training run: what it started from, what it said at every step, and where it ended."""

    before: TrainState
    metrics: list[dict[str, float]]
    after: TrainState


def train(
    config: TransformerConfig,
    params: Any,
    batches: list[Any],
    mesh_text: str | None,
    *,
    dtype: str = "float32",
    ema: bool = False,
    tx: optax.GradientTransformation | None = None,
    **options: Any,
) -> Run:
    model = build(config, dtype)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh_text is None else make_mesh(mesh_text)
    schedule = make_schedule("inverse_square_root", 0.1, 4, STEPS)
    tx = tx or make_optimizer("adafactor", schedule, model.logical_axes())
    before = state = init_state(model, tx, mesh, seed=0, params=params, ema=ema)
    step = make_train_step(model, tx, schedule, mesh, state, **options)
    metrics = []
    for batch in batches:
        state, numbers = step(state, put_batch(mesh, batch))
        metrics.append({name: float(value) for name, value in numbers.items()})
    return Run(before, metrics, state)


@pytest.fixture(scope="session")
def one_device(config: TransformerConfig, params: Any, batches: list[Any]) -> Run:
    return train(config, params, batches, None, loss=Z_LOSS)


# --- one step -------------------------------------------------------------------------------------------------------


def test_metrics(one_device: Run, batches: list[Any]) -> None:
    norms = {f"{kind}_norm" for kind in ("gradient", "parameter", "update")}
    names = {"loss", "z_loss", "accuracy", "target_tokens", "tokens", "learning_rate", "finite", "skipped", *norms}
    for number, (metrics, batch) in enumerate(zip(one_device.metrics, batches, strict=True)):
        assert {name for name in metrics if "/" not in name} == names
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["target_tokens"] == np.sum(batch["decoder_target_tokens"] > 0)
        assert metrics["learning_rate"] == pytest.approx(0.1 / np.sqrt(max(number, 4)), rel=1e-6)
        assert 0 <= metrics["accuracy"] <= 1
        for norm in norms:
            parts = [value for name, value in metrics.items() if name.startswith(f"{norm}/")]
            assert metrics[norm] == pytest.approx(np.linalg.norm(parts), rel=1e-5)
            assert metrics[norm] > 0
        assert (metrics["finite"], metrics["skipped"]) == (1, 0)
        assert metrics["z_loss"] > 0
    assert int(one_device.after.step) == STEPS
    assert one_device.metrics[-1]["loss"] < one_device.metrics[0]["loss"]


def test_the_old_state_is_given_away(one_device: Run) -> None:
    # Adafactor keeps placeholders of one number a layer; a program that does not read them leaves them alone.
    arrays = [leaf for leaf in jax.tree.leaves(one_device.before) if leaf.size > 2]
    assert len(arrays) >= 2 * len(jax.tree.leaves(one_device.before.params))
    assert all(leaf.is_deleted() for leaf in arrays)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(one_device.after))


def test_evaluation_has_neither_dropout_nor_z_loss(config: Any, params: Any, batches: list[Any]) -> None:
    mesh = make_mesh("data:4,model:2")
    evaluate = make_eval_step(build(config), mesh)
    first, second = (evaluate(params, put_batch(mesh, batches[0])) for _ in range(2))
    assert first == second
    assert first.z_loss == 0
    logits = jax.jit(build(config).apply)({"params": params}, batches[0])
    batch = batches[0]
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["decoder_target_tokens"])
    # Float32 sums of some eighty numbers near 5, in another order.
    total = np.sum(np.asarray(expected) * batch["decoder_loss_weights"])
    assert float(first.cross_entropy) == pytest.approx(total, rel=1e-5)
    assert first.weight == np.sum(batch["decoder_loss_weights"])


# --- steps that are not finite, float16, a running mean ---------------------------------------------------------------


def infinite(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same batch with a loss that is not finite."""
    return batch | {"decoder_loss_weights": np.where(batch["decoder_loss_weights"] > 0, np.inf, 0).astype(np.float32)}


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


def test_a_step_that_is_not_finite_changes_nothing(config: Any, params: Any, batches: list[Any]) -> None:
    first, second = batches[:2]
    left_out = train(config, params, [first, infinite(second)], None, loss=Z_LOSS, ema_decay=0.9, ema=True)
    alone = train(config, params, [first], None, loss=Z_LOSS, ema_decay=0.9, ema=True)
    for part in ("params", "opt_state", "ema"):
        assert same(getattr(left_out.after, part), getattr(alone.after, part)), part
    assert (int(left_out.after.step), int(left_out.after.skipped)) == (2, 1)
    assert [m["finite"] for m in left_out.metrics] == [1, 0]
    # Neither the optimizer nor the schedule counts the step that was left out.
    resumed = train(config, params, [first, infinite(second), *batches[1:6]], None, loss=Z_LOSS)
    assert resumed.metrics[-1]["learning_rate"] == pytest.approx(0.1 / 5**0.5)
    assert resumed.metrics[-1]["skipped"] == 1
    undisturbed = train(config, params, batches[:6], None, loss=Z_LOSS)
    np.testing.assert_array_equal(
        jax.tree.leaves(resumed.after.opt_state)[0], jax.tree.leaves(undisturbed.after.opt_state)[0]
    )


def test_a_halted_run_stays_where_it_went_wrong(config: Any, params: Any, batches: list[Any]) -> None:
    first, second, third = batches[:3]
    halted = train(config, params, [first, infinite(second), third], None, loss=Z_LOSS, halt_above=0)
    alone = train(config, params, [first], None, loss=Z_LOSS, halt_above=0)
    assert same(halted.after.params, alone.after.params)
    assert halted.metrics[2]["finite"] == 1
    assert np.isfinite(halted.metrics[2]["gradient_norm"])
    assert np.isnan(halted.metrics[2]["update_norm"])
    assert int(halted.after.skipped) == 1


def overflowing() -> optax.GradientTransformation:
    """An optimizer that counts, and whose update is not finite in its second step."""

    def update(updates: Any, count: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        return jax.tree.map(lambda u: jnp.where(count == 1, jnp.inf, 0.01) * u, updates), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def test_an_update_that_is_not_finite_leaves_the_parameters(config: Any, params: Any, batches: list[Any]) -> None:
    first, second = batches[:2]
    both = train(config, params, [first, second], None, tx=overflowing())
    one = train(config, params, [first], None, tx=overflowing())
    assert same(both.after.params, one.after.params)
    assert [(m["finite"], m["skipped"]) for m in both.metrics] == [(1, 0), (0, 1)]
    assert np.isfinite(both.metrics[1]["gradient_norm"])
    assert not np.isfinite(both.metrics[1]["update_norm"])


def test_the_optimizer_needs_little_memory_beside_its_state(config: Any) -> None:
    # Wide and short: what the optimizer needs is more than what the backward pass finds stored.
    config = dataclasses.replace(config, embed_dim=256, mlp_dim=1024)
    model, mesh = build(config), make_mesh(devices=jax.devices()[:1])
    tx = make_optimizer("adamw", 1e-3, model.logical_axes(), weight_decay=0.01)
    state = abstract_state(model, tx, mesh)
    shape = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    inputs = {"encoder_input_tokens": shape, "decoder_input_tokens": shape}
    batch = inputs | {"decoder_target_tokens": shape, "decoder_loss_weights": shape}
    step = make_train_step(model, tx, optax.constant_schedule(1e-3), mesh, state)
    held = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    # The gradients, and of what is computed from them an array at a time; both moments a second time would be 3.
    assert step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes < 1.8 * held


def test_float16_finds_its_loss_scale(config: Any, params: Any, batches: list[Any]) -> None:
    plain = dataclasses.replace(config, dropout_rate=0.0)
    exact = train(plain, params, batches, None)
    halves = train(plain, params, batches, None, dtype="float16")
    assert exact.after.loss_scale is None
    # An overflow, if there is one, halves the scale and is left out; the others follow float32.
    scales = [m["loss_scale"] for m in halves.metrics]
    assert scales[0] == 2.0**16
    assert float(halves.after.loss_scale.scale) == 2.0**16 / 2 ** int(halves.after.skipped)
    if not int(halves.after.skipped):
        # Float16 has 11 bits: sums of products are good to about 1e-3.
        np.testing.assert_allclose([m["loss"] for m in halves.metrics], [m["loss"] for m in exact.metrics], rtol=5e-3)
    assert jax.tree.leaves(halves.after.params)[0].dtype == np.float32


def test_an_overflow_of_float16_halves_the_scale(config: Any, params: Any, batches: list[Any]) -> None:
    run = train(config, params, [infinite(batches[0]), batches[1]], None, dtype="float16")
    assert [m["loss_scale"] for m in run.metrics] == [2.0**16, 2.0**15]
    assert run.metrics[0]["finite"] == 0


def test_the_running_mean_follows_the_parameters(config: Any, params: Any, batches: list[Any]) -> None:
    one, two = (train(config, params, batches[:n], None, ema_decay=0.15, ema=True).after for n in (1, 2))
    # The first update keeps (1 + 0) / (10 + 0) of the mean, the second min(0.15, 2 / 11).
    first = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * np.asarray(new), params, one.params)
    second = jax.tree.map(lambda mean, new: 0.15 * mean + 0.85 * np.asarray(new), first, two.params)
    for state, wanted in ((one, first), (two, second)):
        # A product of float32 numbers, rounded once more.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), state.averaged, wanted)
    assert train(config, params, batches[:1], None).after.averaged is not None


def test_frozen_parameters_have_no_gradient(config: Any, params: Any, batches: list[Any]) -> None:
    trained = jax.tree_util.tree_map_with_path(lambda path, _: "encoder" not in jax.tree_util.keystr(path), params)
    (metrics,) = train(config, params, batches[:1], None, trained=trained).metrics
    assert all(value == 0 for name, value in metrics.items() if name.startswith("gradient_norm/encoder"))
    assert metrics["gradient_norm/decoder/layers/mlp"] > 0


# --- meshes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_text", MESHES)
def test_every_mesh_trains_the_same(
    mesh_text: str, one_device: Run, config: Any, params: Any, batches: list[Any]
) -> None:
    run = train(config, params, batches, mesh_text, loss=Z_LOSS)
    # With dropout on, so the masks do not depend on the mesh either. Sums are taken in another order: 4e-7 was seen.
    for name in ("loss", "z_loss", "target_tokens"):
        got, wanted = ([metrics[name] for metrics in r.metrics] for r in (run, one_device))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, err_msg=name)
    layouts = jax.tree.map(lambda x: x.sharding, run.before)
    assert jax.tree.all(jax.tree.map(lambda s, x: s.is_equivalent_to(x.sharding, x.ndim), layouts, run.after))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gradients(config: TransformerConfig, params: Any) -> Any:
    """A function of the batch that gives gradients and loss sums, without dropout."""
    model = build(dataclasses.replace(config, dropout_rate=0.0))
    compiled = {}

    def compute(batch: Any, microbatches: int = 1, z_loss: float = 0.0) -> Any:
        if microbatches not in compiled:

            def function(params: Any, batch: Any, z_loss: jax.Array) -> Any:
                return loss_gradients(
                    model,
                    params,
                    batch,
                    settings=LossSettings(z_loss=z_loss),
                    microbatches=microbatches,
                    key=jax.random.key(0),
                )

            compiled[microbatches] = jax.jit(function)
        return jax.tree.map(np.asarray, compiled[microbatches](params, batch, jnp.float32(z_loss)))

    return compute


def difference(a: Any, b: Any) -> float:
    """The largest difference of two trees, relative to the second's largest number."""
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(b))
    return max(np.max(np.abs(x - y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) / largest


def parts(batch: Any, number: int) -> list[np.ndarray]:
    """Loss weights that leave the rows of one microbatch each; how many tokens those have differs."""
    rows = np.arange(16)[:, None] % number
    weights = [np.where(rows == part, batch["decoder_loss_weights"], 0.0) for part in range(number)]
    assert len({np.sum(w) for w in weights}) > 1
    return weights


def test_gradients_do_not_depend_on_the_number_of_microbatches(gradients: Any, batches: list[Any]) -> None:
    batch = batches[0]
    whole, sums = gradients(batch)
    for microbatches in (2, 4, 8):
        got, got_sums = gradients(batch, microbatches)
        assert difference(got, whole) < 1e-6  # float32 sums in another order
        np.testing.assert_allclose(got_sums, sums, rtol=1e-6)

    # What they are not: the mean of the parts' own means, which counts a token of a short target more.
    means = [gradients(batch | {"decoder_loss_weights": weights})[0] for weights in parts(batch, 4)]
    naive = jax.tree.map(lambda *g: sum(g) / len(g), *means)
    assert difference(naive, whole) > 1e-2


def test_microbatches_on_a_mesh_train_the_same(gradients: Any, config: Any, params: Any, batches: list[Any]) -> None:
    plain = dataclasses.replace(config, dropout_rate=0.0)
    (metrics,) = train(plain, params, batches[:1], "data:4,model:2", microbatches=2).metrics
    wanted, sums = gradients(batches[0])
    assert metrics["loss"] == pytest.approx(sums.cross_entropy / sums.weight, rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(float(optax.tree.norm(wanted)), rel=1e-5)
    assert metrics["target_tokens"] == sums.weight


def test_gradients_are_of_nats_per_real_target_token(gradients: Any, batches: list[Any]) -> None:
    # The same eight rows, once and twice: twice the tokens, the same mean.
    doubled = {name: np.concatenate([value[:8], value[:8]]) for name, value in batches[1].items()}
    first_half = doubled["decoder_loss_weights"] * (np.arange(16)[:, None] < 8)
    once, sums = gradients(doubled | {"decoder_loss_weights": first_half})
    twice, doubled_sums = gradients(doubled)
    assert difference(twice, once) < 1e-6
    assert doubled_sums.weight == 2 * sums.weight


def test_z_loss_is_reported_apart_but_trained_on(gradients: Any, batches: list[Any]) -> None:
    without, sums = gradients(batches[0])
    with_z, sums_with_z = gradients(batches[0], z_loss=0.01)
    assert sums_with_z.cross_entropy == sums.cross_entropy
    assert (sums.z_loss, sums_with_z.z_loss > 0) == (0, True)
    assert difference(with_z, without) > 1e-3


def test_a_batch_without_targets_gives_zeros(gradients: Any, batches: list[Any]) -> None:
    empty = batches[0] | {"decoder_loss_weights": np.zeros((16, 10), np.float32)}
    got, sums = gradients(empty)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(got))
    assert sums.weight == 0
