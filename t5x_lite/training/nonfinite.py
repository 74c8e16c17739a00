"""What follows a step whose loss or gradient is not finite."""

from collections.abc import Mapping

MOST_IN_A_ROW = 20


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
          record: the step's metrics: `finite`, `loss`, `gradient_norm`, and `loss_scale` if there is one.
        """
        if record["finite"]:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        what = f"the loss is {record['loss']} and the gradient norm {record['gradient_norm']}"
        scale = record.get("loss_scale")
        if self._in_a_row >= MOST_IN_A_ROW:
            return f"{what}, as in the {MOST_IN_A_ROW - 1} steps before"
        if scale is not None:
            return f"{what}, although they are only scaled by {scale:g}" if scale < 1 else None
        return what if self.policy == "stop" else None
