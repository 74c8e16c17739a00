"""How the processes of a run agree on what happened to a checkpoint, with a deadline on every wait.

They talk through the key-value store of `jax.distributed`, not through the devices: so they can do so in a thread that
writes while the devices train, and a process that is gone is named instead of waited for.
"""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from t5x_lite.errors import InputError
from t5x_lite.training.integrity import UnreadableCheckpoint

T = TypeVar("T")

_KINDS = {kind.__name__: kind for kind in (InputError, UnreadableCheckpoint, TimeoutError)}
_numbers = itertools.count()


class Agreement:
    """A sequence of exchanges between all processes, which all make in the same order.

    Args:
      timeout: seconds that an exchange waits for the others.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.index, self.count = jax.process_index(), jax.process_count()
        self._name = f"t5x_lite/agreement/{next(_numbers)}"
        self._round = itertools.count()
        self._previous = ""

    def exchange(self, label: str, value: str) -> list[str]:
        """Returns what every process gave, by their index; nobody returns before all have given something.

        Raises:
          TimeoutError: some have not; the message names them.
        """
        if self.count == 1:
            return [value]
        client = _client()
        key = f"{self._name}/{next(self._round)}-{label}"
        client.key_value_set(f"{key}/{self.index}", value)
        end = time.monotonic() + self.timeout
        found: dict[int, str] = {self.index: value}
        for process in range(self.count):
            if process not in found:
                wait = max(1, int(1000 * (end - time.monotonic())))
                try:
                    found[process] = client.blocking_key_value_get(f"{key}/{process}", wait)
                except Exception as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise
        missing = [str(process) for process in range(self.count) if process not in found]
        if missing:
            raise TimeoutError(
                f"process {', '.join(missing)} of {self.count} did not get to '{label}' within {self.timeout:g} s"
            )
        # Whoever is here has all of the exchange before.
        if self._previous:
            client.key_value_delete(f"{self._previous}/{self.index}")
        self._previous = key
        return [found[process] for process in range(self.count)]

    def together(self, label: str, work: Callable[[], T]) -> list[T]:
        """Runs `work` in every process, and returns all results; they go through JSON.

        Raises:
          Exception: what `work` raised in the first process in which it did; all raise it.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self.count == 1:
            if failure:
                raise failure
            return [result]
        own = {"result": result} if failure is None else {"kind": type(failure).__name__, "text": str(failure)}
        answers = [json.loads(text) for text in self.exchange(label, json.dumps(own))]
        for process, answer in enumerate(answers):
            if "kind" in answer:
                if process == self.index and failure:
                    raise failure
                raise _KINDS.get(answer["kind"], RuntimeError)(f"process {process}: {answer['text']}")
        return [answer["result"] for answer in answers]

    def first(self, label: str, work: Callable[[], T]) -> T:
        """Runs `work` in process 0 alone, and returns its result, or raises its error, in all."""
        return self.together(label, work if self.index == 0 else lambda: None)[0]  # type: ignore[return-value]


def _client() -> Any:
    from jax._src import distributed  # as Orbax does: there is no public way to the store

    client = distributed.global_state.client
    assert client is not None, "several processes, but jax.distributed was not initialised"
    return client
