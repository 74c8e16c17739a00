"""Learning rates as functions of the step; `step` counts this run's updates from 0."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from t5x_lite.errors import InputError, nearest

SCHEDULES = ("inverse_square_root", "constant", "linear", "cosine")
T5_WARMUP = 10_000


def inverse_square_root(learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """Returns `learning_rate / sqrt(max(step, warmup_steps))`: flat at first, as T5 was pre-trained (section 3.1.2)."""

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        return learning_rate * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step, jnp.float32), max(warmup_steps, 1)))

    return schedule


def make_schedule(name: str, learning_rate: float, warmup_steps: int | None, total_steps: int) -> optax.Schedule:
    """Returns the schedule of that name.

    Args:
      name: `inverse_square_root` (T5's), `constant`, `linear` (to 0 at the last step) or `cosine` (likewise).
      learning_rate: the peak; for `inverse_square_root` the numerator, 1.0 in T5.
      warmup_steps: linear warm-up from 0, none by default; for `inverse_square_root` the steps before the decay sets
        in, 10,000 by default.
      total_steps: the run's steps, where `linear` and `cosine` end.

    Raises:
      InputError: unknown name, or a warm-up longer than the run of a schedule that has an end.
    """
    if name not in SCHEDULES:
        raise InputError(
            f"optimizer.schedule '{name}' is unknown, allowed: {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}"
        )
    if name == "inverse_square_root":
        return inverse_square_root(learning_rate, T5_WARMUP if warmup_steps is None else warmup_steps)
    warmup = warmup_steps or 0
    if name != "constant" and warmup >= total_steps:
        raise InputError(f"optimizer.warmup_steps {warmup} must be less than train.steps {total_steps}")
    after: Callable[[], optax.Schedule] = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, total_steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, total_steps - warmup),
    }[name]
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), after()], [warmup])
