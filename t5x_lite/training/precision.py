"""What float16 needs to train: a loss scaled so that gradients neither vanish nor overflow.

Float16 ends at 65504 and has nothing below 6e-8, while most gradients of a Transformer are smaller than that. So the
loss is multiplied by `LossScale.scale` before the backward pass and the gradients, of the float32 parameters and in
float32, are divided by it after. A step that overflows all the same is left out and lowers the scale. float32 and
bfloat16 have the exponents for any gradient and need none of this.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


@struct.dataclass
class LossScale:
    """What a loss is multiplied by; always a power of two, so that scaling back loses nothing.

    The convention is that of `torch.amp.GradScaler`: 2**16 at first, doubled after 2000 finite steps in a row, halved
    at a step that is not finite.

    Attributes:
      scale: float32 scalar.
      good_steps: int32 scalar, finite steps since the scale last changed or a step was not finite.
    """

    scale: jax.Array
    good_steps: jax.Array

    def next(self, finite: jax.Array) -> "LossScale":
        """Returns the scale for the next step; `finite` is a bool scalar: whether this step's gradients are."""
        counted = self.good_steps + 1
        grown = self.scale * 2
        # No gradients at all (a frozen model, say) would let it grow until it is infinite itself.
        grows = finite & (counted >= GROWTH_INTERVAL) & jnp.isfinite(grown)
        return LossScale(
            scale=jnp.where(finite, jnp.where(grows, grown, self.scale), self.scale / 2),
            good_steps=jnp.where(finite & (counted < GROWTH_INTERVAL), counted, 0),
        )


def initial_loss_scale(dtype: Any) -> LossScale | None:
    """Returns the scale that training in `dtype` (a dtype or its name) starts with; None unless that is float16."""
    if jnp.dtype(dtype) != jnp.float16:
        return None
    return LossScale(scale=jnp.asarray(FIRST_SCALE, jnp.float32), good_steps=jnp.zeros((), jnp.int32))
