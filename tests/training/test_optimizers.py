"""Adafactor against trajectories recorded from T5X, see `fixtures/make_adafactor_reference.py`."""

import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import sharding
from t5x_lite.errors import InputError
from t5x_lite.models import TransformerConfig, build
from t5x_lite.training.checkpoints import Checkpointer
from t5x_lite.training.optimizers import (
    OPTIMIZERS,
    adafactor,
    by_label,
    decayed,
    hidden_matrices,
    hold,
    make_optimizer,
    matching,
    select,
    stacked,
    trained_parameters,
)
from t5x_lite.training.state import abstract_state, init_state, state_shardings
from t5x_lite.training.step import make_train_step

FIXTURES = Path(__file__).parents[1] / "fixtures"
T5X = np.load(FIXTURES / "adafactor_t5x.npz")


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_adafactor_reference", FIXTURES / "make_adafactor_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()
Flat = dict[str, np.ndarray]

# Float32 rounding, added up over 100 updates and relative to a parameter's RMS: at most 1.4e-6 was seen. A real
# difference is of another order: leaving out step_offset makes 0.3.
TOLERANCE = 5e-6


def is_stacked(params: Flat) -> dict[str, bool]:
    return {path: path.startswith("layers/") for path in params}


def follow(tx: optax.GradientTransformation, stack: bool) -> dict[int, Flat]:
    """The parameters after 1, 10 and 100 updates with the recorded recipe's gradients."""
    layout = recipe.stack_layers if stack else dict

    @jax.jit
    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = layout(recipe.initial_parameters())
    state = tx.init(jax.tree.map(jnp.asarray, params))
    kept = {}
    for step in range(recipe.STEPS):
        params, state = update(params, state, layout(recipe.gradients(step)))
        if step + 1 in recipe.KEEP:
            kept[step + 1] = jax.tree.map(np.asarray, params)
    return kept


def rate(start: int = 0) -> optax.Schedule:
    return lambda step: 1.0 / jnp.sqrt(jnp.maximum(step + start, 10).astype(jnp.float32))


def ours(stack: bool, start: int = 0, **options: Any) -> dict[int, Flat]:
    layout = recipe.stack_layers if stack else dict
    return follow(adafactor(rate(start), is_stacked(layout(recipe.initial_parameters())), **options), stack)


@pytest.fixture(scope="module")
def unscanned() -> dict[int, Flat]:
    return ours(stack=False)


@pytest.fixture(scope="module")
def scanned() -> dict[int, Flat]:
    return ours(stack=True)


def assert_follows(run: str, kept: dict[int, Flat], skip: tuple[str, ...] = ()) -> None:
    for n, params in kept.items():
        for path, value in params.items():
            if path in skip:
                continue
            rms = T5X[f"{run}/{n}/{path}/rms"]
            sample = T5X[f"{run}/{n}/{path}/sample"]
            worst = np.max(np.abs(recipe.subsample(value) - sample)) / rms
            assert worst < TOLERANCE, f"{path} after {n} updates: {worst:.2g} of its RMS"
            # And of what is not stored, the RMS.
            assert np.sqrt(np.mean(value.astype(np.float64) ** 2)) == pytest.approx(rms, rel=TOLERANCE)


def test_the_recipe_is_the_recorded_one() -> None:
    for path, value in recipe.initial_parameters().items():
        assert value.astype(np.float64).sum() == T5X[f"init/{path}/sum"]
    for step in recipe.GRAD_SUM_STEPS:
        for path, value in recipe.gradients(step).items():
            assert value.astype(np.float64).sum() == T5X[f"grad/{step}/{path}/sum"]
    np.testing.assert_allclose([rate()(i) for i in range(100)], T5X["learning_rate/from_0"], rtol=2e-7)


def test_adafactor_follows_t5x(unscanned: dict[int, Flat]) -> None:
    assert_follows("unscanned", unscanned)


def test_stacked_adafactor_follows_t5x(scanned: dict[int, Flat]) -> None:
    # T5X factors stacked arrays by their axis names and ignores the minimum of 128 then; ours keeps to it, so that
    # stacking changes nothing: `narrow` has to equal T5X's arrays of single layers.
    assert_follows("scanned", scanned, skip=("layers/narrow",))
    for n, params in scanned.items():
        for layer in range(recipe.LAYERS):
            rms = T5X[f"unscanned/{n}/layer_{layer}/narrow/rms"]
            sample = T5X[f"unscanned/{n}/layer_{layer}/narrow/sample"]
            assert np.max(np.abs(recipe.subsample(params["layers/narrow"][layer]) - sample)) < TOLERANCE * rms


def test_stacking_changes_nothing(unscanned: dict[int, Flat], scanned: dict[int, Flat]) -> None:
    for n in recipe.KEEP:
        one_by_one = recipe.stack_layers(unscanned[n])
        for path, value in scanned[n].items():
            rms = np.sqrt(np.mean(one_by_one[path] ** 2, axis=tuple(range(1, value.ndim)), keepdims=True))
            # The same operations on the same numbers; sums are vectorised differently.
            assert np.max(np.abs(value - one_by_one[path]) / rms) < TOLERANCE, path


def test_stock_optax_on_stacked_arrays_is_another_optimizer(scanned: dict[int, Flat]) -> None:
    # The reason for `per_layer`: Optax takes RMS and clipping over all layers at once, so the layer whose parameters
    # are a hundredth of another's is updated a hundred times too hard.
    stock = optax.adafactor(rate(), min_dim_size_to_factor=128, weight_decay_rate=None)
    kernel = follow(stock, stack=True)[1]["layers/kernel"]
    start = recipe.stack_layers(recipe.initial_parameters())["layers/kernel"]
    ratio = [np.std(kernel[i] - start[i]) / np.std(scanned[1]["layers/kernel"][i] - start[i]) for i in range(3)]
    assert ratio[2] > 30
    assert np.max(np.abs(kernel - scanned[1]["layers/kernel"])) > 0.1 * np.sqrt(np.mean(start**2))
    # On single arrays it is the same.
    assert_follows("unscanned", {1: follow(stock, stack=False)[1]})


def test_step_offset(unscanned: dict[int, Flat]) -> None:
    # T5X restores a step count of 1000 and subtracts step_offset; ours starts from 0 with a schedule of its own.
    assert_follows("offset", ours(stack=False, start=recipe.RESUMED_AT))
    # A count of 1000 without an offset, in other words.
    without = ours(stack=False, start=recipe.RESUMED_AT, step_offset=-recipe.RESUMED_AT)
    assert_follows("no_offset", without)
    rms = T5X["offset/100/embedding/rms"]
    sample = T5X["offset/100/embedding/sample"]
    assert np.max(np.abs(recipe.subsample(without[100]["embedding"]) - sample)) > 0.1 * rms


# --- on the model ---------------------------------------------------------------------------------------------------


def test_which_parameters_are_stacked_and_decayed(umt5_config: Any) -> None:
    model = build(umt5_config)
    leaves = jax.tree_util.tree_leaves_with_path(model.param_shapes())
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    for name, in_stack, decays in zip(
        names,
        jax.tree.leaves(stacked(model.logical_axes())),
        jax.tree.leaves(decayed(model.logical_axes())),
        strict=True,
    ):
        assert in_stack == ("/layers/" in name), name
        assert decays == (name.endswith("kernel") or name == "embedding/table"), name


@pytest.mark.parametrize("name", ["t5-base", "t5-v1.1-base"])
def test_adafactor_needs_a_hundredth_of_the_memory(name: str) -> None:
    model = build(name)
    shapes = model.param_shapes()
    state = jax.eval_shape(make_optimizer("adafactor", 1e-3, model.logical_axes()).init, shapes)

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert size(state) <= 0.01 * size(shapes)
    assert size(jax.eval_shape(make_optimizer("adamw", 1e-3, model.logical_axes()).init, shapes)) > 2 * size(shapes)


AXES = {"kernel": ("layers", "embed", "mlp"), "table": ("buckets", "heads"), "scale": ("layers", "embed")}


def toy(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (2, 4, 8), "table": (6, 3), "scale": (2, 4)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def two_updates(name: str, **options: Any) -> list[Any]:
    tx = make_optimizer(name, lambda step: jnp.where(step == 0, 1e-2, 2e-2), AXES, **options)
    params, state, all_updates = toy(0), tx.init(toy(0)), []
    for seed in (1, 2):
        updates, state = tx.update(toy(seed), state, params)  # the parameters stay, so that runs can be compared
        all_updates.append(updates)
    return all_updates


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled_and_times_the_learning_rate(name: str) -> None:
    plain, decaying = two_updates(name), two_updates(name, weight_decay=0.1)
    for rate, before, after in zip((1e-2, 2e-2), plain, decaying, strict=True):
        expected = -rate * 0.1 * toy(0)["kernel"]
        np.testing.assert_allclose(after["kernel"] - before["kernel"], expected, rtol=1e-4, atol=1e-8)  # a difference
        for undecayed in ("scale", "table"):
            np.testing.assert_array_equal(after[undecayed], before[undecayed])


def test_clip_norm_is_global_and_before_the_optimizer() -> None:
    gradients, params = toy(1), toy(0)
    norm = optax.tree.norm(gradients)
    plain = make_optimizer("adamw", 1e-2, AXES)
    # Adam does not see the size of a first gradient; what the second moment holds tells.
    for limit, factor in ((0.5, 0.5 / norm), (1e6, 1.0), (0.0, 1.0)):
        tx = make_optimizer("adamw", 1e-2, AXES, clip_norm=limit)
        _, got = tx.update(gradients, tx.init(params), params)
        _, wanted = plain.update(jax.tree.map(lambda g, f=factor: g * f, gradients), plain.init(params), params)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_unknown_optimizer() -> None:
    with pytest.raises(InputError, match=r"'adafacto' is unknown, allowed: adafactor, .*; did you mean 'adafactor'"):
        make_optimizer("adafacto", 1e-3, AXES)


# --- what is trained and what decays -------------------------------------------------------------------------------


def paths(tree: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def test_patterns_match_whole_paths(tiny_config: TransformerConfig) -> None:
    axes = build(tiny_config).logical_axes()
    chosen = matching(axes, ["encoder/*", "*/final_norm/scale", "embedding/tabl?"], "optimizer.frozen")
    for path, matched in zip(paths(build(tiny_config).param_shapes()), jax.tree.leaves(chosen), strict=True):
        wanted = path.startswith("encoder/") or path in ("decoder/final_norm/scale", "embedding/table")
        assert matched == wanted, path
    assert not any(jax.tree.leaves(matching(axes, [], "optimizer.frozen")))


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("encodr/*", "encoder/*"), ("encoder", "encoder/*"), ("embedding/tables", "embedding/table"), ("zzz", "")],
)
def test_a_pattern_that_matches_nothing(tiny_config: TransformerConfig, pattern: str, hint: str) -> None:
    axes = build(tiny_config).logical_axes()
    for key in ("frozen", "no_decay"):
        with pytest.raises(InputError, match=rf"optimizer.{key} '{re.escape(pattern)}' matches no parameter") as error:
            make_optimizer("adamw", 1e-3, axes, **{key: ["decoder/*", pattern]})
        assert "\n" not in str(error.value)
        assert f"did you mean '{hint}'" in str(error.value) if hint else "did you mean" not in str(error.value)


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(InputError, match=r"optimizer.frozen kernel, \[st\]\* matches every parameter"):
        make_optimizer("adamw", 1e-3, AXES, frozen=["kernel", "[st]*"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_decay(name: str) -> None:
    axes = {**AXES, "other": ("embed", "vocab")}
    params = {**toy(0), "other": jnp.ones((4, 6))}
    tx, plain = (make_optimizer(name, 0.1, axes, weight_decay=wd, no_decay=["oth*"]) for wd in (0.1, 0.0))
    updates, _ = tx.update(params, tx.init(params), params)
    without, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_array_equal(updates["other"], without["other"])
    assert np.all(np.asarray(updates["kernel"]) != np.asarray(without["kernel"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_have_no_state_and_no_part(name: str) -> None:
    gradients, params = toy(1), toy(0)
    tx = make_optimizer(name, 0.1, AXES, clip_norm=0.5, weight_decay=0.1, frozen=["ta*"])
    # What an optimizer does that has never heard of the frozen ones. The norm that clips is then of the trained ones.
    rest = select(AXES, {"kernel": 1, "table": 0, "scale": 1}, 1)
    alone = make_optimizer(name, 0.1, rest, clip_norm=0.5, weight_decay=0.1)
    state, lone_state = tx.init(params), alone.init({key: params[key] for key in rest})
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
        lone, lone_state = alone.update(
            {key: gradients[key] for key in rest}, lone_state, {key: params[key] for key in rest}
        )
        np.testing.assert_array_equal(updates["table"], jnp.zeros_like(params["table"]))
        for key in rest:
            np.testing.assert_array_equal(updates[key], lone[key])
        assert_equal(state, lone_state)
    assert not [path for path in paths(state) if "table" in path]


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_frozen_number_that_is_not_finite_does_no_harm() -> None:
    gradients = {**toy(1), "table": jnp.full((6, 3), jnp.nan)}
    tx = make_optimizer("adamw", 0.1, AXES, clip_norm=0.5, frozen=["table"])
    updates, _ = tx.update(gradients, tx.init(toy(0)), toy(0))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(updates))


def test_what_is_held_is_not_differentiated(
    tiny_config: TransformerConfig, random_batch: Any, random_params: Any
) -> None:
    model = build(tiny_config)
    batch = random_batch(np.random.default_rng(0), 2, 8, 6, 256)
    frozen = ["encoder/*", "embedding/*", "decoder/layers/mlp/*"]
    trained = trained_parameters(model.logical_axes(), frozen)

    def gradient(trained: Any) -> Any:
        return jax.jit(jax.grad(lambda params: jnp.sum(model.apply({"params": hold(params, trained)}, batch) ** 2)))

    shapes = model.param_shapes()
    gradients = {"all": gradient(None), "some": gradient(trained)}
    flops = {key: function.lower(shapes).cost_analysis()["flops"] for key, function in gradients.items()}
    forward = jax.jit(lambda p: model.apply({"params": p}, batch)).lower(shapes).cost_analysis()["flops"]
    # Backward costs twice the forward; without the encoder's and without kernel gradients of the decoder's mlp.
    assert flops["all"] > 2.5 * forward
    assert flops["some"] < 0.75 * flops["all"]
    params = random_params(tiny_config)
    every, some = gradients["all"](params), gradients["some"](params)
    for path, trains, a, b in zip(paths(params), *map(jax.tree.leaves, (trained, every, some)), strict=True):
        np.testing.assert_allclose(b, a if trains else jnp.zeros_like(a), rtol=1e-4, atol=1e-5, err_msg=path)


def test_labels_without_a_transformation_get_zeros() -> None:
    tx = by_label({"up": optax.scale(2.0)}, {"a": {"b": "up", "c": "none"}, "d": "up"})
    tree = {"a": {"b": jnp.ones(2), "c": jnp.full(3, 5.0)}, "d": jnp.ones(1)}
    updates, _ = tx.update(tree, tx.init(tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    np.testing.assert_array_equal(updates["a"]["b"], [2.0, 2.0])
    np.testing.assert_array_equal(updates["a"]["c"], [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(updates["d"], [2.0])


def test_which_parameters_muon_makes_orthogonal(tiny_config: TransformerConfig) -> None:
    for name in ("t5-small", "gpt2", "bert-base-uncased", "bart-base"):
        model = build(name)
        for path, hidden in zip(
            paths(model.param_shapes()), jax.tree.leaves(hidden_matrices(model.logical_axes())), strict=True
        ):
            head = path.split("/")[0] in ("head", "next_sentence_head", "classifier")
            assert hidden == (path.endswith("/kernel") and not head), (name, path)


def test_a_number_that_the_optimizer_does_not_have() -> None:
    with pytest.raises(InputError, match=r"optimizer.b1=0.9: adafactor has no such number; .* adamw, lion, muon, sgd$"):
        make_optimizer("adafactor", 1e-3, AXES, b1=0.9)
    with pytest.raises(InputError, match=r"optimizer.b2=0.9: sgd has no such number; .* adamw, lion, muon$"):
        make_optimizer("sgd", 1e-3, AXES, b2=0.9)


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "model:8", "data:2,fsdp:2,model:2"])
@pytest.mark.parametrize("frozen", [(), ("encoder/*", "*/scale")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_lies_as_its_parameters_do(
    tiny_config: TransformerConfig, name: str, frozen: tuple[str, ...], mesh: str
) -> None:
    model, devices = build(tiny_config), sharding.make_mesh(mesh)
    shapes, axes = model.param_shapes(), model.logical_axes()
    tx = make_optimizer(name, 1e-3, axes, clip_norm=1.0, weight_decay=0.1, frozen=frozen)
    layouts = sharding.tree_shardings(devices, axes, shapes)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layouts)
    state, lain = jax.eval_shape(tx.init, shapes), sharding.optimizer_shardings(devices, tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(lain)
    # By path: a moment ends in the path of its parameter (Adafactor's have their own inside, and are all unfactored
    # here, where no side reaches 128).
    by_path = {tuple(path): layout for path, layout in jax.tree_util.tree_leaves_with_path(layouts)}
    found = 0
    for (path, leaf), layout in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(lain), strict=True):
        keys = [key for key in path if isinstance(key, jax.tree_util.DictKey)]
        parameter = by_path.get(tuple(keys))
        if parameter is None or leaf.shape != _shape(shapes, keys):
            assert leaf.size <= max(3, tiny_config.num_decoder_layers), path  # counts, or what Adafactor leaves empty
            continue
        found += 1
        assert layout.is_equivalent_to(parameter, leaf.ndim), path
    moments = {"adafactor": 1, "adamw": 2, "lion": 1, "sgd": 1}
    trained = len([p for p in paths(shapes) if not (frozen and (p.startswith("encoder/") or p.endswith("scale")))])
    if name in moments:
        assert found == moments[name] * trained


def _shape(shapes: Any, keys: Any) -> tuple[int, ...]:
    for key in keys:
        shapes = shapes[key.key]
    return shapes.shape


def test_a_step_trains_what_is_not_frozen(tiny_config: TransformerConfig, random_batch: Any) -> None:
    model, devices = build(tiny_config), sharding.make_mesh("data:2,fsdp:2,model:2")
    frozen = ["encoder/*", "*/scale"]
    tx = make_optimizer("muon", 0.01, model.logical_axes(), clip_norm=1.0, frozen=frozen)
    trained = trained_parameters(model.logical_axes(), frozen)
    state = init_state(model, tx, devices, 0)
    before = jax.tree.map(np.asarray, state.params)
    step = make_train_step(model, tx, lambda _: 0.01, devices, state, microbatches=2, trained=trained)
    batch = sharding.put_batch(devices, random_batch(np.random.default_rng(0), 8, 16, 8, 256))
    state, first = step(state, batch)
    for _ in range(4):
        state, metrics = step(state, batch)
    assert metrics["loss"] < first["loss"] - 0.1
    for path, trains, old, new in zip(
        paths(before), *map(jax.tree.leaves, (trained, before, state.params)), strict=True
    ):
        assert np.array_equal(old, new) == (not trains), path


@pytest.mark.parametrize("name", ["lion", "muon", "sgd"])
def test_a_checkpoint_holds_the_state(
    tiny_config: TransformerConfig, random_params: Any, tmp_path: Path, name: str
) -> None:
    # Of trees with parts left out; which states there are besides is a matter of `test_exact_restore`.
    model, devices = build(tiny_config), sharding.make_mesh("data:2,fsdp:2,model:2")
    tx = make_optimizer(name, 0.01, model.logical_axes(), clip_norm=1.0, frozen=["encoder/*", "*/scale"])
    state = init_state(model, tx, devices, 0, random_params(tiny_config))
    moved = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), state.opt_state)
    state = dataclasses.replace(state, opt_state=jax.tree.map(jax.device_put, moved, state_shardings(state).opt_state))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state)
    checkpointer.close()
    restored, _ = Checkpointer(tmp_path).restore(abstract_state(model, tx, devices))
    assert restored is not None
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_equal(restored, state)
