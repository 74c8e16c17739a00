"""Where in the model the first number that is not finite comes from, once a step has had one."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5x_lite.models.transformer import Batch, Transformer
from t5x_lite.training.norms import module_of
from t5x_lite.training.step import batch_loss, loss_gradients

Kind = Literal["batch", "parameter", "activation", "loss", "gradient", "update", "nothing"]


@dataclass(frozen=True)
class Finding:
    """What `diagnose` found first.

    Attributes:
      kind: where: a value of the batch, a parameter, the output of a module, the loss, a gradient, what the optimizer
        made of it; or nothing, when the step is finite once it is repeated.
      name: of the value, parameter or module, such as `encoder/layers/mlp/up`; empty for loss and nothing.
      layer: of the stack that `name` is in, counted from 0; None outside of one.
      value: what stands there: `inf` (an overflow, or one in what it follows from), `nan`, or a token's id.
    """

    kind: Kind
    name: str = ""
    layer: int | None = None
    value: str = ""

    def __str__(self) -> str:
        """Returns half a sentence for a message."""
        where = self.name if self.layer is None else f"{self.name}, layer {self.layer} (counted from 0),"
        return {
            "batch": f"the batch's {self.name} holds {self.value}",
            "parameter": f"parameter {where} holds {self.value}",
            "activation": f"the first output to be {self.value} is that of {where} in the forward pass",
            "loss": f"the model's outputs are finite, and their loss is {self.value}",
            "gradient": f"the forward pass is finite, and the first gradient to be {self.value} is that of {where}",
            "update": f"loss and gradients are finite, and the norm of the update of {where} is {self.value}",
            "nothing": "repeated, the step is finite",
        }[self.kind].rstrip(",")

    def as_details(self) -> dict[str, Any]:
        """Returns the fields for an event."""
        layer = {} if self.layer is None else {"layer": self.layer}
        return {"kind": self.kind, "module": self.name, **layer, "value": self.value}


def diagnose(
    model: Transformer, params: Any, batch: Batch, key: jax.Array, *, mesh: Mesh, microbatches: int = 1, **settings: Any
) -> Finding:
    """Repeats a step that was not finite, and returns where the first number comes from that is not.

    The batch and the parameters are looked at first; then the forward pass is made once more, with the output of every
    module looked at, in the order in which they are computed; and if all of it is finite the gradients are, from the
    head downwards. The numbers are those of the step, dropout included, as long as the parameters are. It compiles
    two programs, so it is for when something has happened. Where there are several processes, all of them call it.

    Args:
      model: the model.
      params: its parameters at the beginning of the step, on the mesh.
      batch: the global batch of the step, on the mesh.
      key: the step's dropout key (see `step.dropout_key`).
      mesh: where they lie.
      microbatches: as the step had them.
      settings: what else the step gave to `loss_gradients`: `settings`, `scale`, ...
    """
    if found := _in_batch(model, batch) or _in_parameters(params, mesh):
        return found
    with jax.set_mesh(mesh):
        for index in range(microbatches):
            if found := _in_forward_pass(model, params, batch, key, index, microbatches):
                return found
    return _in_gradients(model, params, batch, key, mesh, microbatches=microbatches, **settings) or Finding("nothing")


def first_update(metrics: Mapping[str, float]) -> Finding:
    """Returns the module that the optimizer led too far, when loss and gradients were finite.

    Args:
      metrics: of the step, with an `update_norm/MODULE` for each module, some of which is not finite. If it is only all
        of them together, the largest is returned.
    """
    norms = {name.partition("/")[2]: float(norm) for name, norm in metrics.items() if name.startswith("update_norm/")}
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    name = min(bad, key=lambda name: _place((name, 0, False))) if bad else max(norms, key=lambda name: norms[name])
    return Finding("update", name, value=_text(math.isinf(norms[name])) if bad else f"{norms[name]:g}")


def _in_batch(model: Transformer, batch: Batch) -> Finding | None:
    vocabulary = model.config.vocab_size
    for name, values in batch.items():
        # Processes hold rows of their own, and all have to come to the same answer: so it is the devices that look.
        if jnp.issubdtype(values.dtype, jnp.floating):
            bad, infinite = jax.device_get(_flags(values))
            if bad:
                return Finding("batch", name, value=_text(infinite))
        elif name.endswith("_tokens"):
            low, high = int(jnp.min(values)), int(jnp.max(values))
            if low < 0 or high >= vocabulary:
                return Finding("batch", name, value=f"{min(low, 0) or high}, which is no token of {vocabulary:,}")
    return None


# --- parameters and gradients ---------------------------------------------------------------------------------------


def _in_parameters(params: Any, mesh: Mesh) -> Finding | None:
    found = _flagged(params, mesh)
    if not found:
        return None
    name, layer, infinite = min(found, key=_place)
    return Finding("parameter", name, layer, _text(infinite))


def _in_gradients(
    model: Transformer, params: Any, batch: Batch, key: jax.Array, mesh: Mesh, **settings: Any
) -> Finding | None:
    with jax.set_mesh(mesh):
        gradients, sums = jax.jit(lambda p, b, k: loss_gradients(model, p, b, key=k, **settings))(params, batch, key)
    loss = float(sums.cross_entropy)
    if not math.isfinite(loss):
        return Finding("loss", value=_text(math.isinf(loss)))
    found = _flagged(gradients, mesh)
    if not found:
        return None
    # Backwards, what comes last is computed first, and whatever it spoils lies before it.
    name, layer, infinite = max(found, key=_place)
    return Finding("gradient", module_of(name), layer, _text(infinite))


def _flagged(tree: Any, mesh: Mesh) -> list[tuple[str, int | None, bool]]:
    """Returns name, layer, and whether there is an infinity (else only NaNs), of all that is not finite."""

    def look(tree: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        flags = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            axes = tuple(range(1, leaf.ndim)) if "/layers/" in name else None
            flags[name] = _flags(leaf, axes)
        return flags

    with jax.set_mesh(mesh):
        flags = jax.device_get(jax.jit(look)(tree))
    return [
        (name, index if np.ndim(bad) else None, bool(np.atleast_1d(infinite)[index]))
        for name, (bad, infinite) in flags.items()
        for index in np.flatnonzero(np.atleast_1d(bad)).tolist()
    ]


def _place(found: tuple[str, int | None, bool]) -> tuple[Any, ...]:
    """Returns where a parameter has its place in the forward pass, to sort by."""
    name, layer, _ = found
    parts = name.split("/")
    stack = {"embedding": 0, "encoder": 1, "decoder": 2}.get(parts[0], 3)
    if stack not in (1, 2):
        return stack, _HEADS.index(parts[0]) if parts[0] in _HEADS else len(_HEADS), 0, 0, name
    if parts[1] != "layers":
        return stack, {"final_norm": 2}.get(parts[1], 0), 0, 0, name
    return stack, 1, layer, _SUBLAYERS.index(parts[2]) if parts[2] in _SUBLAYERS else 0, name


_HEADS = ("prediction_transform", "prediction_norm", "pooler", "classifier", "next_sentence_head", "head")
_SUBLAYERS = ("self_attention_norm", "self_attention", "cross_attention_norm", "cross_attention", "mlp_norm", "mlp")


def _flags(x: jax.Array, axes: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns whether there is anything that is not finite, and whether an infinity."""
    return jnp.any(~jnp.isfinite(x), axis=axes), jnp.any(jnp.isinf(x), axis=axes)


def _text(infinite: bool) -> str:
    # An overflow soon makes NaNs beside its infinities; NaNs alone come from something else.
    return "inf" if infinite else "nan"


# --- the forward pass -----------------------------------------------------------------------------------------------


def _in_forward_pass(
    model: Transformer, params: Any, batch: Batch, key: jax.Array, index: int, microbatches: int
) -> Finding | None:
    """Returns the first module whose output is not finite, in the `index`-th of the microbatches."""
    order: list[str] = []

    def look(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and (outputs := list(_floating(y))):
            path = "/".join(context.module.path)
            if path not in order:  # a loop's body may be traced more than once
                order.append(path)
            flags = [jnp.stack(_flags(output)) for output in outputs]
            context.module.sow("intermediates", _FLAGS, jnp.any(jnp.stack(flags), axis=0))
        return y

    def forward(params: Any, batch: Batch, key: jax.Array) -> Any:
        part = {name: x.reshape(-1, microbatches, *x.shape[1:])[:, index] for name, x in batch.items()}
        with nn.intercept_methods(look):
            apply = _Apply(model.clone(remat="none"))
            batch_loss(apply, params, part, dropout_key=jax.random.fold_in(key, index))  # type: ignore[arg-type]
        return apply.seen

    seen = jax.device_get(jax.jit(forward)(params, batch, key))
    for path, layer, flags in _in_order(order, seen):
        if flags[0]:
            return Finding("activation", path or "the model", layer, _text(bool(flags[1])))
    return None


_FLAGS = "not_finite_and_infinite"


class _Apply:
    """A model that keeps what its modules `sow`, for functions that only want its outputs."""

    def __init__(self, model: Transformer):
        self.config = model.config
        self.seen: Any = {}
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        changed: Any
        y, changed = self._model.apply(variables, *args, mutable=["intermediates"], **kwargs)
        self.seen = {**self.seen, **changed.get("intermediates", {})}  # the head is applied apart
        return y


def _floating(y: Any) -> Iterator[jax.Array]:
    for leaf in jax.tree.leaves(y):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating):
            yield leaf


def _in_order(order: list[str], seen: Any) -> Iterator[tuple[str, int | None, Any]]:
    """Yields each module's path, layer and flags in the order of the forward pass: layer by layer within a stack."""
    place = 0
    while place < len(order):
        stack = _stack_of(order[place])
        end = place + 1
        while stack and end < len(order) and _stack_of(order[end]) == stack:
            end += 1
        group = [(path, _at(seen, path)) for path in order[place:end]]
        if stack:
            for layer in range(len(group[0][1])):
                for path, flags in group:
                    yield path, layer, flags[layer]
        else:
            yield group[0][0], None, group[0][1]
        place = end


def _stack_of(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[1:2] == ["layers"] else ""


def _at(seen: Any, path: str) -> Any:
    for name in path.split("/") if path else ():
        seen = seen[name]
    # A module that is called more than once keeps each call's: any of them counts.
    calls: Mapping[str, Any] = seen
    return np.any(np.stack(calls[_FLAGS]), axis=0)
