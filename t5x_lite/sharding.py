"""The one place that knows the mesh.

Every array in t5x_lite carries *logical* axis names ("embed", "heads", "batch", ...). `RULES` maps each of them to a
mesh axis, and everything else follows: the layout of parameters, optimizer state, batch and activations. The mesh has
three axes:

* `data`: every device holds the whole model and a slice of the batch;
* `fsdp`: as `data`, but parameters and optimizer state are split along `embed` too;
* `model`: heads, feed-forward width and vocabulary are split (tensor parallelism).

Layouts are written as `jax.sharding.NamedSharding`s and given to `jax.jit` (what pjit became); XLA inserts the
collectives. A name that is not in the table is an error, never silent replication.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import InputError, nearest

AXES = ("data", "fsdp", "model")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # Parameters.
    "layers": None,
    "vocab": "model",
    "embed": "fsdp",
    "heads": "model",  # also the joined `heads * head_dim` columns of the attention kernels
    "kv_heads": "model",  # of grouped-query attention
    "mlp": "model",
    "buckets": None,
    "positions": None,
    "types": None,
    "labels": None,
    # Activations (with "heads", "mlp" and "vocab" from above).
    "batch": ("data", "fsdp"),
    "length": None,
    "features": None,
    "head_dim": None,
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


def spec(*names: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axis names (None: replicated).

    Raises:
      KeyError: a name that `RULES` does not hold.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise KeyError(f"logical axis '{unknown[0]}' is not in sharding.RULES: {', '.join(RULES)}")
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Fixes the layout of an activation with these logical axes, when a mesh is set; the identity otherwise.

    The mesh is the one of `with jax.set_mesh(mesh):`, so that a model called from plain library code needs none.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    layout = spec(*names)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, layout)


def axis_size(mesh: Mesh | AbstractMesh, rule: str | tuple[str, ...] | None) -> int:
    """Returns over how many devices a rule's mesh axes split an array axis."""
    names = (rule,) if isinstance(rule, str) else rule or ()
    return math.prod(mesh.shape[name] for name in names)


def check_divides(mesh: Mesh | AbstractMesh, sizes: Mapping[str, int]) -> None:
    """Checks that the logical axes of these sizes split evenly over the mesh, before anything is compiled.

    Raises:
      InputError: the first axis that does not, with its size, the mesh axis and the mesh size.
    """
    for name, size in sizes.items():
        rule = RULES[name]
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
        return NamedSharding(mesh, spec(*names))

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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch's arrays: rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Puts this process's rows of a global batch onto the mesh, rows split as `batch_sharding` says."""
    layout = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(layout, value) for key, value in batch.items()}


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes one device holds of a tree whose leaves carry shape, dtype and sharding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(mesh: Mesh | AbstractMesh) -> str:
    """Returns the mesh as the user writes it: `data:4,model:2`."""
    used = [f"{name}:{size}" for name, size in mesh.shape.items() if size > 1]
    return ",".join(used) or "data:1"
