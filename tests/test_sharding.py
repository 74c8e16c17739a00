import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite import sharding
from t5x_lite.errors import InputError
from t5x_lite.models import build
from t5x_lite.sharding import activation_spec, make_mesh, parameter_spec, parse_mesh
from t5x_lite.training import optimizers
from t5x_lite.training.state import abstract_state, init_state, state_bytes

OPTIMIZERS = ("adafactor", "adamw")


def optimizer(name: str, model: Any) -> Any:
    return optimizers.make_optimizer(name, 1e-3, model.logical_axes(), clip_norm=1.0, weight_decay=0.01)


# --- the mesh -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", (8, 1, 1, 1)),
        ("data:8", (8, 1, 1, 1)),
        ("data:4,model:2", (4, 1, 1, 2)),
        (" model:2 , data:4 ", (4, 1, 1, 2)),
        ("model:8", (1, 1, 1, 8)),
        ("fsdp:-1", (1, 8, 1, 1)),
        ("data:-1,model:2", (4, 1, 1, 2)),
        ("data:2,fsdp:2,model:-1", (2, 2, 1, 2)),
        ("data:8,model:-1", (8, 1, 1, 1)),
        ("context:4,data:2", (2, 1, 4, 1)),
    ],
)
def test_parse_mesh(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_mesh(text, 8) == dict(zip(("data", "fsdp", "context", "model"), sizes, strict=True))
    assert dict(make_mesh(text).shape) == parse_mesh(text, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle:2", ["unknown axis 'modle'", "data, fsdp, context, model", "did you mean 'model'"]),
        ("data:4,", ["unknown axis ''"]),
        ("data:2,data:4", ["'data'", "twice"]),
        ("data:two", ["'data'", "whole number", "'two'"]),
        ("data", ["'data'", "whole number", "''"]),
        ("data:0", ["'data'", "at least 1", "0"]),
        ("data:-2", ["'data'", "at least 1", "-2"]),
        ("data:-1,model:-1", ["only one axis may be -1", "data and model"]),
        ("data:4", ["'data:4'", "covers 4 devices", "there are 8"]),
        ("data:-1,model:3", ["'data:-1,model:3'", "3 devices", "there are 8"]),
        ("data:16", ["covers 16 devices", "there are 8"]),
    ],
)
def test_parse_mesh_names_what_is_wrong(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_mesh(text, 8)
    for word in [text, *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_describe_is_what_the_user_writes() -> None:
    for text in ("data:8", "fsdp:4,model:2", "data:2,fsdp:2,model:2"):
        assert sharding.describe(make_mesh(text)) == text
    assert sharding.describe(make_mesh(devices=jax.devices()[:1])) == "data:1"


# --- names and rules ------------------------------------------------------------------------------------------------


def test_a_name_without_a_rule_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"'embedd' is not in sharding.PARAMETERS"):
        parameter_spec("layers", "embedd")
    with pytest.raises(KeyError, match="'time'"):  # even where there is no mesh that could split it
        sharding.constrain(jnp.ones((2, 3)), "batch", "time")
    with pytest.raises(ValueError, match="2 axis names"):
        sharding.constrain(jnp.ones((2, 3, 4)), "batch", "length")


def test_spec() -> None:
    assert parameter_spec("layers", "embed", "heads") == PartitionSpec(None, "fsdp", "model")
    assert parameter_spec("vocab", None) == PartitionSpec("model", None)
    assert activation_spec("batch", "length", "vocab") == PartitionSpec(("data", "fsdp"), "context", "model")
    assert activation_spec("batch", "slots", "features") == PartitionSpec(("data", "fsdp"), None, None)


@pytest.mark.parametrize(
    ("mesh", "changes", "words"),
    [
        ("model:8", {"num_heads": 6}, ["'heads'", "size 6", "'model'", "size 8"]),
        ("data:2,model:4", {"vocab_size": 258}, ["'vocab'", "size 258", "'model'", "size 4"]),
        ("data:2,model:4", {"mlp_dim": 70}, ["'mlp'", "size 70", "'model'", "size 4"]),
        ("fsdp:8", {"embed_dim": 36}, ["'embed'", "size 36", "'fsdp'", "size 8"]),
    ],
)
def test_an_axis_that_does_not_divide_fails_before_anything_is_compiled(
    tiny_config: Any, mesh: str, changes: dict[str, int], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dataclasses.replace(tiny_config, **changes))
    tx = optimizer("adafactor", model)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("jitted something before the check")

    monkeypatch.setattr(jax, "jit", compiled)
    with pytest.raises(InputError) as caught:
        init_state(model, tx, make_mesh(mesh), seed=0)
    for word in [mesh, *words]:
        assert word in str(caught.value)


def test_a_leaf_that_does_not_divide_is_named_too() -> None:
    with pytest.raises(InputError, match="axis 'embed' of size 12 does not divide over mesh axis 'fsdp' of size 8"):
        sharding.tree_shardings(make_mesh("fsdp:8"), {"a": ("embed",)}, {"a": np.zeros(12)})
    with pytest.raises(InputError, match=r"axis 'batch' of size 6 .* 'data x fsdp' of size 8"):
        sharding.check_divides(make_mesh("data:4,fsdp:2"), {"batch": 6})


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        (
            "data:2,fsdp:4",
            (16, 4, 30, None),
            "axis 'batch' of size 4 does not divide over mesh axis 'data x fsdp' of size 8 (mesh data:2,fsdp:4);"
            " train.batch_size 16 / train.microbatches 4 = 4 rows at a time",
        ),
        (
            "data:2,context:4",
            (16, 4, 30, None),
            "axis 'length' of size 30 does not divide over mesh axis 'context' of size 4 (mesh data:2,context:4);"
            " train.input_length 30",
        ),
        (
            "data:2,context:4",
            (16, 4, 32, 114),
            "axis 'length' of size 114 does not divide over mesh axis 'context' of size 4 (mesh data:2,context:4);"
            " train.target_length 114",
        ),
    ],
)
def test_a_batch_that_does_not_divide_is_named_by_its_settings(mesh: str, batch: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        sharding.check_batch(make_mesh(mesh), *batch)
    assert str(caught.value) == message
    sharding.check_batch(make_mesh("data:8"), 16, 2, 30, 114)
    sharding.check_batch(make_mesh("data:2,context:4"), 16, 2, 32, None)


# --- the state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mesh_text", ["data:8", "fsdp:8", "model:8", "fsdp:4,model:2"])
def test_state_lies_on_the_mesh(name: str, mesh_text: str, tiny_config: Any, random_params: Any) -> None:
    model = build(tiny_config)
    mesh = make_mesh(mesh_text)
    tx = optimizer(name, model)
    abstract = abstract_state(model, tx, mesh)
    state = init_state(model, tx, mesh, seed=0, params=random_params(tiny_config))

    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for promised, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert isinstance(array.sharding, NamedSharding)
        assert array.sharding.mesh == mesh
        assert (promised.shape, promised.dtype) == (array.shape, array.dtype)
        assert array.sharding.is_equivalent_to(promised.sharding, array.ndim)
        assert array.addressable_shards[0].data.shape == promised.sharding.shard_shape(array.shape)

    axes = jax.tree.leaves(model.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    for names, array in zip(axes, jax.tree.leaves(state.params), strict=True):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, parameter_spec(*names)), array.ndim)

    # What is not split (by fsdp: bias tables and step counts; by model: norm scales too) is a few hundred numbers; the
    # rest of parameters and optimizer state alike has to shrink with the number of devices.
    ways = 1 if mesh_text == "data:8" else 8
    for tree in (state.params, state.opt_state):
        total = sum(array.nbytes for array in jax.tree.leaves(tree))
        held = sharding.bytes_per_device(tree)
        assert held == sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))
        assert 0.85 * ways < total / held <= ways
        matrices = [array for array in jax.tree.leaves(tree) if array.size > 1000]
        assert len(matrices) >= len([names for names in axes if len(names) > 2])
        for array in matrices:
            assert array.sharding.is_fully_replicated == (ways == 1), array.shape


def test_factored_moments_follow_the_axis_that_they_keep(tiny_config: Any) -> None:
    # Adafactor factors kernels of 128 and more on both sides. Of one with axes (layers, embed, mlp) the row means keep
    # embed, which fsdp splits, and the column means mlp, which model does.
    model = build(dataclasses.replace(tiny_config, embed_dim=128, mlp_dim=256))
    state = abstract_state(model, optimizer("adafactor", model), make_mesh("fsdp:4,model:2"))
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    found = {}
    for path, leaf in leaves:
        text = jax.tree_util.keystr(path)
        if "'encoder'" in text and "'up'" in text:
            for what in ("v_row", "v_col"):
                if what in text:
                    found[what] = leaf
    assert {what: leaf.shape for what, leaf in found.items()} == {"v_row": (2, 128), "v_col": (2, 256)}
    assert found["v_row"].sharding.shard_shape((2, 128)) == (2, 32)
    assert found["v_col"].sharding.shard_shape((2, 256)) == (2, 128)


def test_fresh_parameters_do_not_depend_on_the_mesh(tiny_config: Any) -> None:
    config = dataclasses.replace(tiny_config, num_encoder_layers=1, num_decoder_layers=1)
    model = build(config)
    tx = optimizer("adamw", model)
    alone, spread = (
        init_state(model, tx, mesh, seed=5).params
        for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh("data:2,fsdp:2,model:2"))
    )
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        # The random bits are equal; what is made of them is a few float32 operations, fused as each program likes.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_bytes_of_a_state(tiny_config: Any) -> None:
    model = build(tiny_config)
    params = sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes()))
    # Two moments of AdamW and a few counts; parameters and gradients; a running mean.
    assert 0 <= state_bytes(model, optimizer("adamw", model)) - 4 * 4 * params < 64
    assert 0 <= state_bytes(model, optimizer("adamw", model), ema=True) - 5 * 4 * params < 64


def test_cpus_do_not_say_how_much_memory_they_have() -> None:
    assert sharding.device_memory() is None


# --- activations and batches ----------------------------------------------------------------------------------------


def test_constrain_without_a_mesh_is_the_identity() -> None:
    x = jnp.ones((8, 4, 16))
    assert sharding.constrain(x, "batch", "length", "mlp") is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: sharding.constrain(x, "batch", "length", "mlp"))(x))


def test_constrain_within_a_mesh_decides_the_layout() -> None:
    mesh = make_mesh("data:2,fsdp:2,model:2")
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(lambda x: sharding.constrain(x + 1, "batch", "length", "mlp")).lower(jnp.ones((8, 4, 16))).compile()
        )
    wanted = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "model"))
    assert compiled.output_shardings.is_equivalent_to(wanted, 3)
    assert compiled(jnp.ones((8, 4, 16))).addressable_shards[0].data.shape == (2, 4, 8)


def test_batches_are_split_along_their_rows() -> None:
    mesh = make_mesh("data:2,fsdp:2,model:2")
    batch = {"tokens": np.arange(16 * 5, dtype=np.int32).reshape(16, 5), "weights": np.ones((16, 3), np.float32)}
    put = sharding.put_batch(mesh, batch)
    for name, value in batch.items():
        np.testing.assert_array_equal(put[name], value)
        assert put[name].dtype == value.dtype
        assert put[name].sharding.is_equivalent_to(sharding.batch_sharding(mesh, value.shape), 2)
        assert {shard.data.shape for shard in put[name].addressable_shards} == {(4, value.shape[1])}
    assert len({str(shard.index) for shard in put["tokens"].addressable_shards}) == 4


# --- processes ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What `make_mesh` looks at in a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "invented"


def devices_of(processes: int, each: int = 4, slices: int = 1) -> list[Any]:
    return [
        FakeDevice(id=index, process_index=index // each, slice_index=index * slices // (processes * each))
        for index in range(processes * each)
    ]


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("data:16", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("data:4,fsdp:4", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("data:4,model:4", [(0, 4), (1, 4), (2, 4), (3, 4)]),  # tensor parallelism within a process
        ("data:2,fsdp:4,context:2", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("data:2,model:8", [(0, 2), (0, 2), (1, 2), (1, 2)]),  # a row's heads are those of two processes
        ("fsdp:2,context:4,model:2", [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ("model:16", [(0, 1)] * 4),
        ("context:16", [(0, 1)] * 4),
    ],
)
def test_which_rows_each_of_four_processes_feeds(text: str, shares: list[tuple[int, int]]) -> None:
    mesh = make_mesh(text, devices_of(4))
    assert [sharding.batch_share(mesh, process) for process in range(4)] == shares


def test_inner_axes_stay_within_a_process() -> None:
    grid = np.vectorize(lambda device: device.process_index)(make_mesh("data:2,fsdp:2,model:4", devices_of(4)).devices)
    assert (grid == grid[..., :1]).all()
    assert grid[:, :, 0, 0].tolist() == [[0, 1], [2, 3]]


def grid_of(processes: Any) -> Any:
    """A mesh of `data` and `fsdp`, of devices that belong to these processes."""
    owners = np.array(processes)
    devices = np.vectorize(lambda owner: FakeDevice(0, int(owner)))(owners)
    sizes = dict(zip(sharding.AXES, (*owners.shape, 1, 1), strict=True))
    return SimpleNamespace(devices=devices.reshape(*owners.shape, 1, 1), shape=sizes)


def test_the_rows_of_a_process_need_not_be_neighbours() -> None:
    # The order that `jax.make_mesh` gives a TPU v5e of 4 x 4 chips, four a process: a ring through all of them, and
    # rings of four.
    ring = grid_of([[0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0]])
    square = grid_of([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    for mesh in (ring, square):
        assert [sharding.batch_share(mesh, process) for process in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("processes", [[[0, 0, 1, 2]], [[0, 0, 0, 1]]])
def test_rows_that_cannot_be_fed_in_equal_parts(processes: Any) -> None:
    with pytest.raises(InputError, match=r"mesh fsdp:4: its processes hold the parts \[0, 1(, 2)?\], .* of a batch's"):
        sharding.batch_share(grid_of(processes), 0)


def test_processes_that_share_some_of_their_rows_are_refused() -> None:
    mesh = SimpleNamespace(
        devices=np.array([FakeDevice(0, owner) for owner in (0, 0, 0, 1, 1, 1)]).reshape(3, 1, 1, 2),
        shape={"data": 3, "fsdp": 1, "context": 1, "model": 2},
    )
    with pytest.raises(InputError, match=r"mesh data:3,model:2: .* parts \[0, 1\], \[1, 2\] of"):
        sharding.batch_share(mesh, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
        ("data:4,model:4", [0, 1, 2, 3]),
        ("fsdp:8,model:2", [0, 0, 1, 1, 2, 2, 3, 3]),
        ("data:2,fsdp:8", [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
        ("data:2,fsdp:2,model:4", [0, 1, 2, 3]),
        ("model:16", [0]),  # slow, but as it was asked for
    ],
)
def test_slices_differ_in_the_first_axes(text: str, wanted: list[int]) -> None:
    mesh = make_mesh(text, devices_of(4, slices=4))
    grid = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(len(wanted), -1)
    assert grid[:, 0].tolist() == wanted
    assert text == "model:16" or (grid == grid[:, :1]).all()
    assert {device.id for device in mesh.devices.flat} == set(range(16))


@pytest.mark.parametrize(
    ("devices", "processes", "state", "memory", "embed", "mesh"),
    [
        (8, 1, 1e12, None, 512, "data:8"),  # a CPU says nothing of its memory
        (1, 1, 1e9, 16e9, 512, "data:1"),
        (8, 1, 8e9, 16e9, 512, "data:8"),
        (8, 1, 9e9, 16e9, 512, "fsdp:8"),
        (8, 2, 9e9, 16e9, 512, "data:2,fsdp:4"),
        (16, 4, 32e9, 16e9, 512, "data:4,fsdp:4"),
        (16, 4, 33e9, 16e9, 512, "fsdp:16"),
        (16, 4, 1e15, 16e9, 512, "fsdp:16"),  # which does not fit either
        (16, 16, 9e9, 16e9, 512, "fsdp:16"),  # one device a process
        (12, 1, 9e9, 16e9, 512, "data:3,fsdp:4"),  # what divides the width of the model
        (12, 2, 60e9, 16e9, 516, "fsdp:12"),
        (6, 1, 9e9, 16e9, 0, "fsdp:6"),
    ],
)
def test_default_mesh(devices: int, processes: int, state: float, memory: float | None, embed: int, mesh: str) -> None:
    assert sharding.default_mesh(devices, processes, state, memory, embed) == mesh
    parse_mesh(mesh, devices)
