"""Every optimizer but Adafactor (see `test_optimizers`) against its formulas in float64 NumPy, layer by layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.training.optimizers import make_optimizer

Arrays = dict[str, np.ndarray]
Step = Callable[[np.ndarray, int], np.ndarray]  # (gradient, step from 1) -> update before decay and learning rate

LAYERS, STEPS, DECAY, CLIP = 3, 6, 0.1, 4.0
AXES = {
    "embedding": ("vocab", "embed"),
    "wide": ("layers", "embed", "mlp"),
    "tall": ("layers", "mlp", "embed"),
    "scale": ("layers", "embed"),
    "bias_table": ("buckets", "heads"),
    "pooler": ("embed", "features"),
}
SHAPES = {
    "embedding": (20, 6),
    "wide": (LAYERS, 6, 16),
    "tall": (LAYERS, 16, 6),
    "scale": (LAYERS, 6),
    "bias_table": (8, 2),
    "pooler": (6, 6),
}
DECAYED = {"embedding", "wide", "tall", "pooler"}


def learning_rate(step: Any) -> Any:
    return 0.01 * (step + 1) / STEPS


def draw(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    # Layers differ in size by a factor of ten each: whoever takes a stack for one array gives itself away.
    sizes = {"wide": [[[1.0]], [[10.0]], [[0.1]]], "tall": [[[10.0]], [[0.1]], [[1.0]]]}
    return {name: rng.normal(size=shape) * np.asarray(sizes.get(name, 1.0)) for name, shape in SHAPES.items()}


def unstacked(arrays: Arrays) -> Arrays:
    """Every layer as an array of its own, `wide.0` and so on."""
    flat = {}
    for name, value in arrays.items():
        parts = {f"{name}.{i}": layer for i, layer in enumerate(value)} if AXES[name][0] == "layers" else {name: value}
        flat.update(parts)
    return flat


def adam(b1: float, b2: float) -> Step:
    m, v = 0.0, 0.0

    def step(g: np.ndarray, t: int) -> np.ndarray:
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)

    return step


def lion(b1: float, b2: float) -> Step:
    m = 0.0

    def step(g: np.ndarray, _: int) -> np.ndarray:
        nonlocal m
        direction, m = np.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g
        return direction

    return step


def sgd(b1: float) -> Step:
    m = 0.0

    def step(g: np.ndarray, _: int) -> np.ndarray:
        nonlocal m
        m = b1 * m + g
        return m

    return step


def muon(b1: float) -> Step:
    m = 0.0

    def step(g: np.ndarray, t: int) -> np.ndarray:
        nonlocal m
        m = b1 * m + (1 - b1) * g
        x = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        x = x / (np.linalg.norm(x) + 1e-8)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return 0.2 * max(g.shape) ** 0.5 * x

    return step


def reference(rule: Callable[[str], Step]) -> Arrays:
    """The parameters after all steps, every layer on its own."""
    params = unstacked(draw(0))
    rules = {name: rule(name) for name in params}
    for t in range(1, STEPS + 1):
        gradients = unstacked(draw(t))
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        for name, p in params.items():
            update = rules[name](gradients[name] * min(1.0, CLIP / norm), t)
            if name.split(".")[0] in DECAYED:
                update = update + DECAY * p
            params[name] = p - learning_rate(t - 1) * update
    return params


def ours(name: str, **options: Any) -> Arrays:
    tx = make_optimizer(name, learning_rate, AXES, clip_norm=CLIP, weight_decay=DECAY, **options)

    @jax.jit
    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    as_float32 = lambda arrays: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)  # noqa: E731
    params = as_float32(draw(0))
    state = tx.init(params)
    for t in range(1, STEPS + 1):
        params, state = update(params, state, as_float32(draw(t)))
    return unstacked(jax.tree.map(np.asarray, params))


def muon_rule(b1: float, b2: float) -> Callable[[str], Step]:
    return lambda name: muon(b1) if name.split(".")[0] in ("wide", "tall", "pooler") else adam(0.9, b2)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("adamw", {}, lambda _: adam(0.9, 0.999)),
        ("adamw", {"b1": 0.5, "b2": 0.9}, lambda _: adam(0.5, 0.9)),
        ("lion", {}, lambda _: lion(0.9, 0.99)),
        ("lion", {"b1": 0.5, "b2": 0.9}, lambda _: lion(0.5, 0.9)),
        ("sgd", {}, lambda _: sgd(0.9)),
        ("sgd", {"b1": 0.5}, lambda _: sgd(0.5)),
        ("sgd", {"b1": 0.0}, lambda _: sgd(0.0)),
        ("muon", {}, muon_rule(0.95, 0.95)),
        ("muon", {"b1": 0.5, "b2": 0.9}, muon_rule(0.5, 0.9)),
    ],
)
def test_follows_its_formulas_layer_by_layer(name: str, options: Any, rule: Callable[[str], Step]) -> None:
    wanted, got = reference(rule), ours(name, **options)
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        moved = np.max(np.abs(value - unstacked(draw(0))[path]))
        # Float32 against float64: half a unit in the last place of the parameter at each of six updates, and rounding
        # in the update itself, of which 5 Newton-Schulz iterations make the most.
        atol = 4e-7 * np.max(np.abs(value)) + 2e-5 * moved
        np.testing.assert_allclose(got[path], value, rtol=0, atol=atol, err_msg=path)


def test_sgd_without_momentum_keeps_nothing() -> None:
    state = make_optimizer("sgd", 0.1, AXES, b1=0.0).init(draw(0))
    assert jax.tree.leaves(state) == []


def test_muon_updates_have_the_rms_of_adam() -> None:
    # The point of the factor: with Newton-Schulz's singular values of 0.7 to 1.2 an update of a full-rank matrix has
    # an RMS of about 0.2, whatever its shape.
    tx = make_optimizer("muon", 1.0, AXES)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw(0))
    updates, _ = tx.update(params, tx.init(params), params)
    for name in ("wide", "tall", "pooler"):
        for layer in updates[name].reshape(-1, *updates[name].shape[-2:]):  # one by one
            assert float(jnp.sqrt(jnp.mean(layer**2))) == pytest.approx(0.2, rel=0.3), name
