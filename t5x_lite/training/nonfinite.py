"""What follows a step whose loss, gradient or update is not finite."""

import math
from collections.abc import Mapping

MOST_IN_A_ROW = 20

_NAMES = {
    "loss": "the loss",
    "gradient_norm": "the gradient norm",
    "parameter_norm": "the parameter norm",
    "update_norm": "the norm of the update",
}


def only_the_update(record: Mapping[str, float]) -> bool:
    """Returns whether all that a step was made from is finite, and the update alone is not.

    Args:
      record: the step's metrics. A step that had nothing to update by has an `update_norm` that is not a number.
    """
    return all(math.isfinite(record.get(name, 0.0)) == (name != "update_norm") for name in _NAMES)


def what_was_not(record: Mapping[str, float]) -> str:
    """Returns which of a step's numbers were not finite, as half a sentence."""
    names = ["update_norm"] if only_the_update(record) else list(_NAMES)[:-1]
    bad = [name for name in names if not math.isfinite(record.get(name, 0.0))]
    return " and ".join(f"{_NAMES[name]} is {record[name]}" for name in bad)


class NonFinite:
    """Watches the steps, and says when a run has to stop.

    The step itself changes nothing then (see `make_train_step`). With float16 that is part of how the loss scale is
    found, so it never stops a run by itself; many in a row, or a scale below 1, mean that the fault is elsewhere.

    Args:
      policy: `stop` or `skip`.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self._in_a_row = 0

    def reason_to_stop(self, record: Mapping[str, float]) -> str | None:
        """Returns why the run cannot go on after a step, or None.

        Args:
          record: the step's metrics: `finite`, the loss and the norms, and `loss_scale` if there is one.
        """
        if record["finite"]:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        what = what_was_not(record)
        scale = record.get("loss_scale")
        if self._in_a_row >= MOST_IN_A_ROW:
            return f"{what}, as in the {MOST_IN_A_ROW - 1} steps before"
        if scale is not None:
            return f"{what}, although the loss is only scaled by {scale:g}" if scale < 1 else None
        return what if self.policy == "stop" else None
