"""The numbers of a step, together in one array."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_pytree_node_class
class Scalars(Mapping[str, jax.Array]):
    """Named scalars that are one float32 array on the device, and so come to the host in one transfer.

    A step has some fifty of them; fetched one by one they would cost fifty transfers in every step. Counts above
    2**24 are rounded.

    Args:
      names: of the scalars.
      array: float32 `[len(names)]`.
    """

    def __init__(self, names: tuple[str, ...], array: jax.Array):
        self.names = names
        self.array = array

    @classmethod
    def of(cls, scalars: Mapping[str, jax.typing.ArrayLike]) -> "Scalars":
        """Returns scalars, numbers of any dtype, as one array."""
        return cls(tuple(scalars), jnp.stack([jnp.asarray(value, jnp.float32) for value in scalars.values()]))

    def fetch(self) -> dict[str, float]:
        """Returns the numbers; waits until they are there."""
        return dict(zip(self.names, np.asarray(self.array).tolist(), strict=True))

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self.names:
            raise KeyError(name)
        return self.array[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def tree_flatten(self) -> tuple[tuple[jax.Array], tuple[str, ...]]:
        """Returns the array, and the names as what stays the same."""
        return (self.array,), self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: tuple[jax.Array]) -> "Scalars":
        """Returns what `tree_flatten` took apart."""
        return cls(names, *children)
