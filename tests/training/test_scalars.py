"""Scalars in one array."""

import jax
import jax.numpy as jnp
import pytest

from t5x_lite.training.scalars import Scalars


def test_a_compiled_function_returns_one_array_of_them() -> None:
    def step(x: jax.Array) -> Scalars:
        return Scalars.of({"loss": jnp.sum(x), "finite": jnp.all(x > 0), "rate": 0.5, "count": x.size})

    found = jax.jit(step)(jnp.array([1.0, 2.0]))
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [(4,)]
    assert found.fetch() == {"loss": 3.0, "finite": 1.0, "rate": 0.5, "count": 2.0}
    assert (float(found["loss"]), float(found["rate"])) == (3.0, 0.5)
    assert dict(found).keys() == {"loss", "finite", "rate", "count"}
    assert "other" not in found
    with pytest.raises(KeyError):
        found["other"]
