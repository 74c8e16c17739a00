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
from jax.experimental import mesh_utils
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


_STATE_SHARE = 0.5  # of a device's memory, for parameters, gradients and optimizer state; the rest is for activations


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
    """Builds the mesh that `text` describes (see `parse_mesh`) over `devices`, by default all of them.

    The last axes, which talk most, get neighbouring devices: those of one process, or on a TPU of one ring. Slices,
    between which the network is slow (of TPUs, or GPUs in several machines), differ in the first axes.

    Raises:
      InputError: as `parse_mesh`.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = parse_mesh(text, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    left = len({getattr(device, "slice_index", 0) for device in devices})
    if left == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    between = []
    for size in sizes.values():
        between.append(math.gcd(size, left))
        left //= between[-1]
    within = [size // slices for size, slices in zip(sizes.values(), between, strict=True)]
    # What `jax.make_mesh` refuses to do.
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def default_mesh(
    num_devices: int,
    num_processes: int,
    state_bytes: float,
    memory_bytes: float | None,
    embed_dim: int = 0,
) -> str:
    """Returns the mesh, as the user would write it, of a run that names none.

    Data parallelism alone where a device can hold the whole state; else the state is split over the devices of each
    process, whose connections are fast, with copies in the other processes; else over all devices. What is asked
    of a device is that the state takes no more than half of its memory: the rest is for activations.

    Args:
      num_devices: of all processes.
      num_processes: which have as many devices each.
      state_bytes: of parameters, gradients and optimizer state, whole.
      memory_bytes: of one device; None: unknown, as on a CPU, and then nothing is split.
      embed_dim: D, over which `fsdp` splits parameters, so that its size has to divide it; 0: anything does.
    """
    room = math.inf if memory_bytes is None else memory_bytes * _STATE_SHARE
    ways = 1
    for devices in (1, num_devices // num_processes, num_devices):
        ways = math.gcd(devices, embed_dim)
        if state_bytes <= room * ways:
            break
    sizes = {"data": num_devices // ways, "fsdp": ways}
    return ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1) or "data:1"


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


def check_batch(
    mesh: Mesh | AbstractMesh, batch_size: int, microbatches: int, input_length: int, target_length: int | None
) -> None:
    """Checks that the batches of a run split evenly over the mesh, by the names its configuration has for their sizes.

    Args:
      mesh: the mesh.
      batch_size: rows.
      microbatches: in how many parts they are computed.
      input_length: tokens of a row.
      target_length: tokens of a row of targets; None: they are as long as they come out, and stay whole on `context`
        if that does not divide.

    Raises:
      InputError: the first that does not.
    """
    rows = batch_size // microbatches
    sizes = [
        ("batch", rows, f"train.batch_size {batch_size} / train.microbatches {microbatches} = {rows} rows at a time"),
        ("length", input_length, f"train.input_length {input_length}"),
        ("length", target_length or 0, f"train.target_length {target_length}"),
    ]
    for axis, size, setting in sizes:
        try:
            check_divides(mesh, {axis: size})
        except InputError as error:
            raise InputError(f"{error}; {setting}") from None


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


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Returns which part of a global batch's rows a process feeds, and of how many: `(0, 1)` is all of them.

    Processes whose devices differ in `context` or `model` alone feed the same rows.

    Args:
      mesh: the mesh.
      process: its index; by default this one's.

    Raises:
      InputError: some processes share a part of the rows and not all of it, so that there are no equal parts to feed.
    """
    parts = _parts_of_processes(mesh)
    groups = sorted(set(parts.values()))
    held = [part for group in groups for part in group]
    if len(set(held)) < len(held) or len({len(group) for group in groups}) > 1:
        raise InputError(
            f"mesh {describe(mesh)}: its processes hold the parts {', '.join(str(list(group)) for group in groups)} of"
            " a batch's rows, where each must hold as many, and two of them the same or none in common"
        )
    return groups.index(parts[jax.process_index() if process is None else process]), len(groups)


def _parts_of_processes(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Returns which of the `batch_ways` parts of a batch each process's devices hold, in ascending order."""
    parts: dict[int, set[int]] = {}
    for part, devices in enumerate(mesh.devices.reshape(batch_ways(mesh), -1)):  # the batch's axes come first
        for device in devices:
            parts.setdefault(device.process_index, set()).add(part)
    return {process: tuple(sorted(held)) for process, held in parts.items()}


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Puts a global batch onto the mesh, as `batch_sharding` says.

    This process's rows go to its own devices, whichever parts of the array those hold. These are neighbours, and rows
    keep their places in the global batch, unless the mesh follows the torus of a TPU: there rows may change places,
    which only the draws of dropout can tell.

    Args:
      mesh: the mesh.
      batch: this process's rows (see `batch_share`), of their whole length.
    """
    _, shares = batch_share(mesh)
    held = _parts_of_processes(mesh)[jax.process_index()]

    def put(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(held)  # of a part

        def part(where: Any) -> np.ndarray:
            first = held.index((where[0].start or 0) // size) * size
            return rows[(slice(first, first + size), *where[1:])]

        shape = (len(rows) * shares, *rows.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), part)

    return {key: put(np.asarray(value)) for key, value in batch.items()}


def device_memory() -> int | None:
    """Returns the bytes of memory of this process's smallest device; None where they do not say, as CPUs do not."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    limits = [each.get("bytes_limit") for each in stats if each]
    return min((limit for limit in limits if limit), default=None) if len(limits) == len(stats) else None


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes one device holds of a tree whose leaves carry shape, dtype and sharding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(mesh: Mesh | AbstractMesh) -> str:
    """Returns the mesh as the user writes it: `data:4,model:2`."""
    used = [f"{name}:{size}" for name, size in mesh.shape.items() if size > 1]
    return ",".join(used) or "data:1"
