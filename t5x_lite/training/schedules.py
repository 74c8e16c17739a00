"""Learning rates as functions of the step; `step` counts this run's updates from 0."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from t5x_lite.errors import InputError, nearest
from t5x_lite.run_directory import ENDING

SCHEDULES = ("inverse_square_root", "constant", "linear", "cosine", "warmup_stable_decay")
T5_WARMUP = 10_000


def inverse_square_root(learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """Returns `learning_rate / sqrt(max(step, warmup_steps))`: flat at first, as T5 was pre-trained (section 3.1.2)."""

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        return learning_rate * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step, jnp.float32), max(warmup_steps, 1)))

    return schedule


def make_schedule(
    name: str,
    learning_rate: float,
    warmup_steps: int | None,
    total_steps: int,
    *,
    decay_steps: int | None = None,
    final_share: float = 0.0,
) -> optax.Schedule:
    """Returns the schedule of that name.

    All but `inverse_square_root` rise linearly from 0 at step 0 to the peak at step `warmup_steps`. Those with an end
    are there at step `total_steps`, one after the last update; from there on they stay.

    * `inverse_square_root`: T5's, see the function;
    * `constant`;
    * `linear`;
    * `cosine`: half a wave (Loshchilov and Hutter 2017, without restarts);
    * `warmup_stable_decay`: constant, and linear over the last `decay_steps` (Hu et al. 2024, MiniCPM, where the
      decay is exponential; Haegele et al. 2024 compare shapes).

    Args:
      name: a member of `SCHEDULES`.
      learning_rate: the peak; for `inverse_square_root` the numerator, 1.0 in T5.
      warmup_steps: none by default; for `inverse_square_root` the steps before the decay sets in, 10,000 by default.
      total_steps: the run's steps.
      decay_steps: of `warmup_stable_decay`; by default a tenth of the run, rounded up.
      final_share: of the peak, where `linear`, `cosine` and `warmup_stable_decay` end.

    Raises:
      InputError: unknown name, a warm-up and decay that do not fit into the run, or a number that the schedule does
        not have.
    """
    if name not in SCHEDULES:
        raise InputError(
            f"optimizer.schedule '{name}' is unknown, allowed: {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}"
        )
    if decay_steps is not None and name != "warmup_stable_decay":
        raise InputError(
            f"optimizer.decay_steps={decay_steps} belongs to warmup_stable_decay; leave it out with {name}"
        )
    if final_share and name not in ENDING:
        raise InputError(
            f"optimizer.final_share={final_share}: the schedule {name} has no end; leave it out, or use"
            f" {', '.join(ENDING)}"
        )
    if name == "inverse_square_root":
        return inverse_square_root(learning_rate, T5_WARMUP if warmup_steps is None else warmup_steps)
    warmup = warmup_steps or 0
    if name in ENDING and warmup >= total_steps:
        raise InputError(f"optimizer.warmup_steps {warmup} must be less than train.steps {total_steps}")
    decay = total_steps - warmup
    if name == "warmup_stable_decay":
        decay = min(decay, -(-total_steps // 10)) if decay_steps is None else decay_steps
        if warmup + decay > total_steps:
            raise InputError(
                f"optimizer.warmup_steps {warmup} and optimizer.decay_steps {decay} are more than train.steps"
                f" {total_steps} together"
            )
    end = learning_rate * final_share
    down: Callable[[], optax.Schedule] = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, end, decay),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay, final_share),
        "warmup_stable_decay": lambda: optax.linear_schedule(
            learning_rate, end, decay, transition_begin=total_steps - warmup - decay
        ),
    }[name]
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), down()], [warmup])
