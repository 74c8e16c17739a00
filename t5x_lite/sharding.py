"""The one place that knows the mesh.

Every array in t5x_lite carries *logical* axis names ("embed", "heads", "batch", ...). Two mappings give each of them a
mesh axis: `PARAMETERS` where an array is kept (parameters, optimizer state), `ACTIVATIONS` where it is computed with.
Everything else follows. The mesh has four axes:

* `data`: every device holds the whole model and a slice of the batch;
* `fsdp`: as `data`, but parameters and optimizer state are split along `embed` too;
* `context`: the rows of the batch are split along their length, for long ones;
* `model`: heads, feed-forward width and vocabulary are split (tensor parallelism).

Layouts are written as `jax.sharding.NamedSharding`s and given to `jax.jit` (what pjit became); XLA inserts the
collectives. A name that is not in the table is an error, never silent replication.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import InputError, nearest

AXES = ("data", "fsdp", "context", "model")

Rule = str | tuple[str, ...] | None
Rules = Mapping[str, Rule]

PARAMETERS: Rules = {
    "layers": None,
    "vocab": "model",
    "embed": "fsdp",
    "features": None,  # the other side of a square kernel
    "heads": "model",  # also the joined `heads * head_dim` columns of the attention kernels
    "kv_heads": "model",  # of grouped-query attention
    "head_dim": None,
    "mlp": "model",
    "buckets": None,
    "positions": None,
    "types": None,
    "labels": None,
}

ACTIVATIONS: Rules = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "slots": None,  # of a cache: any step may need any of them
    "features": None,
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "mlp": "model",
    "vocab": "model",
    "positions": None,
    "types": None,
}


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Reads a mesh description such as `data:4,model:2` into the size of every axis.

    Axes that are left out have size 1, and one axis may be `-1`: whatever devices remain. The empty string is pure
    data parallelism over all devices.

    Raises:
      InputError: unknown axis, size that is not a whole number, or sizes that do not multiply to `num_devices`.
    """
    sizes: dict[str, int] = {}
    for part in (text or "data:-1").split(","):
        name, _, size = (piece.strip() for piece in part.partition(":"))
        if name not in AXES:
            raise InputError(
                f"mesh '{text}': unknown axis '{name}', allowed: {', '.join(AXES)}{nearest(name, AXES)}"
                " (write it as mesh=data:4,model:2)"
            )
        if name in sizes:
            raise InputError(f"mesh '{text}': axis '{name}' is given twice")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise InputError(f"mesh '{text}': axis '{name}' needs a whole number, not '{size}'") from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise InputError(f"mesh '{text}': axis '{name}' needs a size of at least 1, or -1, not {size}")
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(f"mesh '{text}': only one axis may be -1, not {' and '.join(free)}")
    if free and num_devices % known == 0:
        sizes[free[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        raise InputError(f"mesh '{text}' covers {known} devices, but there are {num_devices}: the product must match")
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh that `text` describes (see `parse_mesh`) over `devices`, by default all of them."""
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = parse_mesh(text, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_spec(*names: str | None) -> PartitionSpec:
    """Returns the PartitionSpec that an array with these logical axes is kept in (None: replicated).

    Raises:
      KeyError: a name that `PARAMETERS` does not hold.
    """
    return _spec(PARAMETERS, "PARAMETERS", names)


def activation_spec(*names: str | None) -> PartitionSpec:
    """Returns the PartitionSpec that an array with these logical axes is computed in (None: replicated).

    Raises:
      KeyError: a name that `ACTIVATIONS` does not hold.
    """
    return _spec(ACTIVATIONS, "ACTIVATIONS", names)


def _spec(rules: Rules, table: str, names: Sequence[str | None]) -> PartitionSpec:
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise KeyError(f"logical axis '{unknown[0]}' is not in sharding.{table}: {', '.join(rules)}")
    return PartitionSpec(*(None if name is None else rules[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Fixes the layout of an activation with these logical axes, when a mesh is set; the identity otherwise.

    The mesh is the one of `with jax.set_mesh(mesh):`, so that a model called from plain library code needs none. A
    length that does not divide over `context` stays whole: while decoding there is one token at a time.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    layout = activation_spec(*names)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    whole = [
        name == "length" and size % axis_size(mesh, "context") != 0 for name, size in zip(names, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(*(None if w else rule for w, rule in zip(whole, layout, strict=True)))
    )


def axis_size(mesh: Mesh | AbstractMesh, rule: Rule) -> int:
    """Returns over how many devices a rule's mesh axes split an array axis."""
    names = (rule,) if isinstance(rule, str) else rule or ()
    return math.prod(mesh.shape[name] for name in names)


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Returns over how many devices the rows of a batch are split."""
    return axis_size(mesh, ACTIVATIONS["batch"])


def check_divides(mesh: Mesh | AbstractMesh, sizes: Mapping[str, int]) -> None:
    """Checks that the logical axes of these sizes split evenly over the mesh, before anything is compiled.

    Raises:
      InputError: the first axis that does not, with its size, the mesh axis and the mesh size.
    """
    for name, size in sizes.items():
        rule = PARAMETERS[name] if name in PARAMETERS else ACTIVATIONS[name]
        ways = axis_size(mesh, rule)
        if size % ways:
            where = rule if isinstance(rule, str) else " x ".join(rule or ())
            raise InputError(
                f"axis '{name}' of size {size} does not divide over mesh axis '{where}' of size {ways}"
                f" (mesh {describe(mesh)})"
            )


def tree_shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """Returns the NamedSharding of every leaf of a tree, from its logical axes and shapes.

    Args:
      mesh: the mesh.
      logical_axes: tree of tuples of logical axis names, as `Transformer.logical_axes()` gives it.
      shapes: tree of the same structure with leaves that have a `shape`.

    Raises:
      InputError: an axis does not divide.
    """

    def leaf(names: tuple[str, ...], array: Any) -> NamedSharding:
        check_divides(mesh, dict(zip(names, array.shape, strict=True)))
        return NamedSharding(mesh, parameter_spec(*names))

    return jax.tree.map(leaf, logical_axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


def optimizer_shardings(mesh: Mesh, init: Any, params: Any) -> Any:
    """Returns the NamedSharding of every leaf of the optimizer state that `init(params)` would make.

    Factored moments have fewer axes than their parameter, so no name-by-name rule fits them. Instead `init` is traced
    under an Explicit mesh, where JAX carries the layout of each value in its type, and the layouts are read off. No
    memory is allocated and no device is needed.

    Args:
      mesh: the mesh.
      init: the `init` of an optax transformation.
      params: tree of `jax.ShapeDtypeStruct` with NamedShardings on `mesh`.
    """
    abstract = AbstractMesh(
        tuple(mesh.shape.values()), mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def typed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert isinstance(x.sharding, NamedSharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(abstract, x.sharding.spec))

    with jax.sharding.use_abstract_mesh(abstract):
        state = jax.eval_shape(init, jax.tree.map(typed, params))
    # A leaf that does not derive from a parameter (a step count) has no layout of its own: every device holds it.
    return jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec) if x.sharding else replicated(mesh), state)


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Returns the layout of an array of a batch, `[rows]` or `[rows, length]`: split along both, as activations are.

    A length that does not divide over `context` stays whole, as in `constrain`.
    """
    length = ACTIVATIONS["length"] if len(shape) > 1 and shape[1] % axis_size(mesh, "context") == 0 else None
    return NamedSharding(mesh, PartitionSpec(ACTIVATIONS["batch"], *((length,) if len(shape) > 1 else ())))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of a global batch's rows this process feeds, and of how many: `(0, 1)` is all of them.

    Processes whose devices differ in `context` or `model` alone feed the same rows.

    Raises:
      InputError: the rows of this process's devices are not one of several equal parts in a row.
    """
    ways = batch_ways(mesh)
    layout = NamedSharding(mesh, PartitionSpec(ACTIVATIONS["batch"]))
    mine = sorted({where[0].start or 0 for where in layout.addressable_devices_indices_map((ways,)).values()})
    index, remainder = divmod(mine[0], len(mine))
    if remainder or ways % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))):
        raise InputError(
            f"mesh {describe(mesh)}: the devices of process {jax.process_index()} hold the parts"
            f" {', '.join(map(str, mine))} of {ways} of a batch, which are not one of several equal parts in a row"
        )
    return index, ways // len(mine)


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Puts a global batch onto the mesh, as `batch_sharding` says.

    Args:
      mesh: the mesh.
      batch: this process's rows (see `batch_share`), of their whole length.
    """
    index, parts = batch_share(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        first, shape = index * len(rows), (len(rows) * parts, *rows.shape[1:])

        def part(where: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = where[0].indices(shape[0])
            return rows[(slice(start - first, stop - first), *where[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), part)

    return {key: put(np.asarray(value)) for key, value in batch.items()}


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes one device holds of a tree whose leaves carry shape, dtype and sharding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(mesh: Mesh | AbstractMesh) -> str:
    """Returns the mesh as the user writes it: `data:4,model:2`."""
    used = [f"{name}:{size}" for name, size in mesh.shape.items() if size > 1]
    return ",".join(used) or "data:1"
