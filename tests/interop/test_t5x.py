import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from t5x_lite.errors import CheckpointMismatch, InputError
from t5x_lite.interop import t5x
from t5x_lite.models import TransformerConfig, build
from t5x_lite.sharding import make_mesh, tree_shardings

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "weights" / "t5x-native-testdata"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="T5X's own test data is not here")

Arrays = dict[str, np.ndarray]


def nested(arrays: Arrays) -> Any:
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def assert_same(actual: Any, expected: Any) -> None:
    """Same names, dtypes and bits."""
    actual, expected = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(np.asarray(actual[name]), np.asarray(array), err_msg=name)


def abstract(config: TransformerConfig, mesh: str | None = None, dtype: Any = None) -> Any:
    model = build(config)
    shapes = model.param_shapes()
    if dtype is not None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    if mesh is None:
        return shapes
    layouts = tree_shardings(make_mesh(mesh), model.logical_axes(), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layouts)


# Writers: `target` as the forms have it, with or without Adafactor's slots.


def slots(target: Arrays) -> Arrays:
    return {f"{name}/{slot}": np.ones(3, np.float32) for name in target for slot in ("v_row", "v_col")}


def write_zarr(path: Path, array: np.ndarray) -> None:
    metadata = {"compressor": {"id": "gzip"}, "shape": array.shape, "chunks": [-(-n // 2) for n in array.shape]}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}
    tensorstore.open({**spec, "dtype": array.dtype.name}, create=True, open=True).result().write(array).result()


def zarr_spec(name: str, array: np.ndarray, older: bool = False) -> dict[str, Any]:
    path = name.replace("/", ".")
    spec = {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "gfile", "path": f"{path}/"},
        "metadata": {"shape": list(array.shape), "chunks": list(array.shape), "compressor": {"id": "gzip", "level": 1}},
    }
    if older:  # TensorStore before 0.1.14, on a bucket
        spec |= {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": path}
    return spec


def write_native(directory: Path, target: Arrays, optimizer: bool, older: bool = False) -> Path:
    directory.mkdir(parents=True)
    index: dict[str, Any] = {}
    for name, array in target.items():
        if array.ndim == 1:
            index[f"target/{name}"] = array
        else:
            index[f"target/{name}"] = zarr_spec(f"target/{name}", array, older)
            write_zarr(directory / f"target.{name.replace('/', '.')}", array)
    if optimizer:  # in directories that are not there: nothing may look
        index |= {
            f"state/param_states/{name}": zarr_spec(f"state/param_states/{name}", array)
            for name, array in slots(target).items()
        }
        index["state/step"] = np.int32(7)
    contents = {"version": 3, "optimizer": nested(index)}
    (directory / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return directory


def write_older_native(directory: Path, target: Arrays, optimizer: bool) -> Path:
    return write_native(directory, target, optimizer, older=True)


def write_single_file(path: Path, target: Arrays, optimizer: bool) -> Path:
    state = {"step": np.int32(7), "param_states": nested(slots(target))} if optimizer else {}
    contents = {"version": 3, "optimizer": {"state": state, "target": nested(target)}}
    path.write_bytes(flax.serialization.msgpack_serialize(contents))
    return path


def write_placeholders(directory: Path, target: Arrays, optimizer: bool) -> Path:
    """As the first releases of Orbax did, in a directory of steps."""
    step = directory / "12"
    step.mkdir(parents=True)
    index: dict[str, Any] = {}
    for name, array in target.items():
        dots = f"_optimizer.target.{name.replace('/', '.')}"
        index[f"_optimizer/target/{name}"] = f"PLACEHOLDER://{dots}"
        write_zarr(step / dots, array)
    if optimizer:
        index |= {f"_optimizer/state/{name}": f"PLACEHOLDER://_optimizer.state.{name}" for name in slots(target)}
    contents = {**nested(index), "flax_mutables": None, "params_axes": None}
    (step / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return directory


def orbax_tree(target: Arrays, optimizer: bool, root: str = "target") -> Any:
    tree: dict[str, Any] = {root: nested(target)}
    if optimizer:
        tree |= {"state": {"step": np.int32(7), "param_states": nested(slots(target))}, "params_axes": None}
    return tree


def write_orbax(directory: Path, target: Arrays, optimizer: bool) -> Path:
    ocp.PyTreeCheckpointer().save(directory, orbax_tree(target, optimizer))
    return directory


def write_orbax_plain(directory: Path, target: Arrays, optimizer: bool) -> Path:
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(directory, orbax_tree(target, optimizer))
    return directory


def write_orbax_zarr3(directory: Path, target: Arrays, optimizer: bool) -> Path:
    tree = orbax_tree(target, optimizer, root="params")
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)).save(directory, tree)
    return directory


def write_orbax_manager(directory: Path, target: Arrays, optimizer: bool) -> Path:
    with ocp.CheckpointManager(directory, item_names=("state",)) as manager:
        for step, arrays in ((9, {name: 0 * array for name, array in target.items()}), (10, target)):
            args = ocp.args.Composite(state=ocp.args.StandardSave(orbax_tree(arrays, optimizer)))
            manager.save(step, args=args)
    return directory


WRITERS: list[Callable[[Path, Arrays, bool], Path]] = [
    write_native,
    write_older_native,
    write_single_file,
    write_placeholders,
    write_orbax,
    write_orbax_plain,
    write_orbax_zarr3,
    write_orbax_manager,
]


@pytest.fixture(params=["tiny_config", "v1_0_config", "umt5_config"])
def config(request: pytest.FixtureRequest) -> TransformerConfig:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_every_form_gives_the_same_parameters(
    write: Any, scanned: bool, optimizer: bool, tiny_config: Any, random_params: Any, tmp_path: Path
) -> None:
    params = random_params(tiny_config)
    path = write(tmp_path / "there", t5x.to_t5x(params, tiny_config, scanned), optimizer)
    assert t5x.is_t5x(path)
    assert t5x.read_config(path) == tiny_config
    assert_same(t5x.load_params(path, tiny_config, abstract(tiny_config)), params)


@pytest.mark.parametrize("scanned", [False, True])
def test_layouts_hold_the_same_numbers(config: Any, scanned: bool, random_params: Any, tmp_path: Path) -> None:
    params = random_params(config)
    theirs = t5x.to_t5x(params, config, scanned)
    assert sum(array.size for array in theirs.values()) == sum(array.size for array in jax.tree.leaves(params))
    path = write_single_file(tmp_path / "checkpoint_7", theirs, optimizer=False)
    assert t5x.read_config(path) == config
    assert_same(t5x.load_params(path, config, abstract(config)), params)


@pytest.mark.parametrize("mesh", ["data:4,model:2", "fsdp:4,model:2"])
@pytest.mark.parametrize("scanned", [False, True])
def test_arrays_go_straight_to_a_mesh(
    mesh: str, scanned: bool, config: Any, random_params: Any, tmp_path: Path
) -> None:
    params = random_params(config)
    path = write_native(tmp_path / "there", t5x.to_t5x(params, config, scanned), optimizer=True)
    wanted = abstract(config, mesh)
    loaded = t5x.load_params(path, config, wanted)
    assert_same(loaded, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, w: x.sharding == w.sharding, loaded, wanted)))
    query = loaded["encoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.size * (2 if mesh.startswith("data") else 8) == query.size


def test_numbers_are_cast_to_the_dtype_asked_for(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    params = random_params(tiny_config)
    path = write_single_file(tmp_path / "file", t5x.to_t5x(params, tiny_config, scanned=True), optimizer=False)
    loaded = t5x.load_params(path, tiny_config, abstract(tiny_config, dtype=jnp.bfloat16))
    assert_same(loaded, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))


def test_bfloat16_is_read_as_itself_and_as_the_bits_that_version_2_wrote(
    tiny_config: Any, random_params: Any, tmp_path: Path
) -> None:
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), random_params(tiny_config))
    target = t5x.to_t5x(params, tiny_config, scanned=False)
    bits = {name: array.view(np.uint16) for name, array in target.items()}
    for number, arrays in enumerate((target, bits)):
        for path in (
            write_native(tmp_path / f"{number}", arrays, optimizer=False),
            write_single_file(tmp_path / f"{number}.checkpoint", arrays, optimizer=False),
        ):
            assert_same(t5x.load_params(path, tiny_config, abstract(tiny_config, dtype=jnp.bfloat16)), params)


def test_large_arrays_that_msgpack_holds_in_pieces(
    tiny_config: Any, random_params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    params = random_params(tiny_config)
    path = write_single_file(tmp_path / "file", t5x.to_t5x(params, tiny_config, scanned=False), optimizer=True)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    assert_same(t5x.load_params(path, tiny_config, abstract(tiny_config)), params)


# What T5X itself computed.


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("v1_0", {"activation": "relu", "gated": False, "tied_head": True, "scaled_head": True}),
        ("v1_1", {}),
        ("scanned", {"relative_bias_per_layer": True}),
        ("unrolled", {"relative_bias_per_layer": True}),
    ],
)
def test_logits_of_t5x_networks(model: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with np.load(FIXTURES / "t5x" / f"{model}.npz") as stored:
        arrays = dict(stored)
    target = {name.removeprefix("target/"): arrays[name] for name in arrays if name.startswith("target/")}
    path = write_single_file(tmp_path / "file", target, optimizer=False)
    config = t5x.read_config(path)
    assert config == TransformerConfig(
        vocab_size=40,
        embed_dim=8,
        num_heads=2,
        head_dim=3,
        mlp_dim=10,
        num_encoder_layers=2,
        num_decoder_layers=3,
        **{"activation": "gelu_tanh", "gated": True, "tied_head": False, "scaled_head": False, **changes},
    )
    params = t5x.load_params(path, config, abstract(config))
    assert largest_difference(config, params, arrays) < 5e-5  # logits are up to 4.4, and 6e-6 was seen
    if model != "unrolled":  # which keeps heads apart
        assert_same(nested(t5x.to_t5x(params, config, scanned=model == "scanned")), nested(target))


def largest_difference(config: TransformerConfig, params: Any, arrays: Arrays) -> float:
    batch = {name: arrays[name] for name in ("encoder_input_tokens", "decoder_input_tokens")}
    logits = jax.jit(build(config).apply)({"params": params}, batch)
    real = arrays["decoder_target_tokens"] > 0
    return float(np.abs(np.asarray(logits) - arrays["logits"])[real].max())


@pytest.mark.parametrize("model", ["v1_0", "v1_1"])
def test_mesh_tensorflow_checkpoints(model: str) -> None:
    path = FIXTURES / "mesh_tensorflow" / model
    with np.load(FIXTURES / "t5x" / f"{model}.npz") as stored:
        arrays = dict(stored)
    target = {name.removeprefix("target/"): arrays[name] for name in arrays if name.startswith("target/")}
    assert t5x.is_t5x(path)
    config = t5x.read_config(path)
    assert config.gated == (model == "v1_1")
    dtype = np.float32 if model == "v1_0" else ml_dtypes.bfloat16
    params = t5x.load_params(path, config, abstract(config, dtype=dtype))
    expected = {name: array.astype(dtype) for name, array in target.items()}
    assert_same(nested(t5x.to_t5x(params, config, scanned=False)), nested(expected))
    if model == "v1_0":
        assert largest_difference(config, params, arrays) < 5e-5  # logits are up to 4.4, and 6e-6 was seen


@needs_shared
def test_mesh_tensorflow_index_of_t5x() -> None:
    path = SHARED / "mtf_tiny_t5"
    config = t5x.read_config(path, num_decoder_layers=2)
    sizes = (config.vocab_size, config.embed_dim, config.num_heads, config.head_dim, config.mlp_dim)
    assert sizes == (32128, 32, 2, 64, 64)
    assert config.gated
    with pytest.raises(InputError, match=r"data shard .* is missing$"):  # after every name and shape has passed
        t5x.load_params(path, config, abstract(config))


@needs_shared
def test_single_file_of_t5x() -> None:
    """The reference is Hugging Face's conversion, whose embedding is the head of the checkpoint, not its embedding."""
    path = SHARED / "test_t5_tiny.checkpoint_0"
    config = t5x.read_config(path)
    params = t5x.load_params(path, config, abstract(config))
    with np.load(SHARED / "test_t5_tiny_target.npz") as target:
        assert_same(nested(t5x.to_t5x(params, config, scanned=False)), nested(dict(target)))
    params["embedding"] = {"table": params.pop("head")["kernel"].T}
    with np.load(SHARED / "ref.npz") as ref:
        batch = {
            "encoder_input_tokens": ref["input_ids"].astype(np.int32),
            "decoder_input_tokens": ref["decoder_input_ids"].astype(np.int32),
        }
        expected = ref["logits"]
    tied = dataclasses.replace(config, tied_head=True, scaled_head=False)
    logits = jax.jit(build(tied).apply)({"params": params}, batch)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-5, rtol=0)


@needs_shared
@pytest.mark.parametrize("path", ["tiny_t5/checkpoint_1", "tiny_orbax/1"])
def test_arrays_of_t5x(path: str, tmp_path: Path) -> None:
    """Two parameters' optimizer state, no model. `.zarray`, which the copies have lost, is written anew."""
    index = flax.serialization.msgpack_restore((SHARED / path / "checkpoint").read_bytes())
    states = index.get("optimizer", index.get("_optimizer"))["state"]["param_states"]
    shapes = {"kernel": ([10, 5], "<f8"), "bias": ([5], "<f4"), "step": ([], "<i4")}
    for name, (shape, dtype) in shapes.items():
        source = next((SHARED / path).glob(f"*state.param_states.{name}"))
        directory = tmp_path / source.name
        directory.mkdir()
        for chunk in source.iterdir():
            (directory / chunk.name).write_bytes(chunk.read_bytes())
        compressor = {"id": "gzip" if "tiny_t5" in path else "zstd", "level": 1}
        metadata = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": dtype, "order": "C"}
        metadata |= {"compressor": compressor, "fill_value": None, "filters": None}
        (directory / ".zarray").write_text(json.dumps(metadata))
    leaves = {name: t5x._decode(states[name], tmp_path) for name in shapes}
    arrays = {name: array.read() for name, array in t5x._open(leaves, tmp_path).items()}
    assert {name: list(array.shape) for name, array in arrays.items()} == {name: s for name, (s, _) in shapes.items()}
    np.testing.assert_array_equal(arrays["bias"], np.ones(5))
    assert int(arrays["step"]) == 1
    assert 0 < arrays["kernel"].min() < arrays["kernel"].max() < 1
    assert not t5x.is_t5x(SHARED / path)


# Strictness.


@pytest.mark.parametrize("scanned", [False, True])
def test_a_tensor_missing_left_over_or_of_another_shape_is_named(
    scanned: bool, tiny_config: Any, random_params: Any, tmp_path: Path
) -> None:
    good = t5x.to_t5x(random_params(tiny_config), tiny_config, scanned)
    layer = "decoder/decoder" if scanned else "decoder/layers_2"
    out, wo = f"{layer}/encoder_decoder_attention/out/kernel", f"{layer}/mlp/wo/kernel"
    bad = {
        **{name: array for name, array in good.items() if name != out},
        "decoder/logits_dense/bias": np.zeros(256, np.float32),
        wo: np.zeros((63, *good[wo].shape[1:]), np.float32),
    }
    for write in (write_single_file, write_native, write_orbax):
        path = write(tmp_path / write.__name__, bad, False)
        with pytest.raises(CheckpointMismatch) as raised:
            t5x.load_params(path, tiny_config, abstract(tiny_config))
        first, *lines = str(raised.value).splitlines()
        assert first == f"{path} does not fit the model, 3 differences:"
        assert lines[0] == f"  {wo}: {bad[wo].shape} there, {good[wo].shape} in the model"
        assert lines[1].startswith(f"  {out} {good[out].shape} is missing")
        assert lines[2].startswith("  decoder/logits_dense/bias (256,) is not used")
        assert len(lines) == 3


def test_a_misspelt_tensor_is_found_again(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    theirs = t5x.to_t5x(random_params(tiny_config), tiny_config, scanned=False)
    theirs["encoder/encoder_norm/scales"] = theirs.pop("encoder/encoder_norm/scale")
    path = write_single_file(tmp_path / "file", theirs, optimizer=False)
    with pytest.raises(CheckpointMismatch, match=r"encoder_norm/scale \(32,\) is missing; nearest: .*/scales"):
        t5x.load_params(path, tiny_config, abstract(tiny_config))


def test_a_checkpoint_of_another_model(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    path = write_single_file(
        tmp_path / "file", t5x.to_t5x(random_params(tiny_config), tiny_config, scanned=False), optimizer=False
    )
    for changes, message in (
        ({"gated": False, "activation": "relu"}, r"decoder/layers_0/mlp/wi/kernel \(32, 64\) is missing"),
        ({"num_decoder_layers": 2}, "decoder/layers_2/.* is not used"),
        ({"relative_bias_per_layer": True}, "encoder/layers_1/relpos_bias/rel_embedding .* is missing"),
        ({"tied_head": True}, "decoder/logits_dense/kernel .* is not used"),
        ({"num_heads": 4, "head_dim": 12}, r"rel_embedding: \(8, 32\) there, \(4, 32\) in the model"),
    ):
        other = dataclasses.replace(tiny_config, **changes)
        with pytest.raises(CheckpointMismatch, match=message):
            t5x.load_params(path, other, abstract(other))


def test_long_lists_are_cut(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    theirs = t5x.to_t5x(random_params(tiny_config), tiny_config, scanned=False)
    path = write_single_file(tmp_path / "file", theirs, optimizer=False)
    deeper = dataclasses.replace(tiny_config, num_decoder_layers=8)
    with pytest.raises(CheckpointMismatch) as raised:
        t5x.load_params(path, deeper, abstract(deeper))
    assert str(raised.value).endswith(f"and {5 * 14 - 40} more")


def test_a_decoder_alone_is_refused(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    theirs = t5x.to_t5x(random_params(tiny_config), tiny_config, scanned=False)
    decoder = {name: array for name, array in theirs.items() if not name.startswith("encoder/")}
    path = write_single_file(tmp_path / "file", decoder, optimizer=False)
    with pytest.raises(CheckpointMismatch, match="is not of an encoder-decoder T5: it has no encoder/"):
        t5x.read_config(path)


# Finding, and damage.


def test_overrides(tmp_path: Path, tiny_config: Any, random_params: Any) -> None:
    theirs = t5x.to_t5x(random_params(tiny_config), tiny_config, scanned=False)
    path = write_single_file(tmp_path / "file", theirs, optimizer=False)
    assert t5x.read_config(path, dropout_rate=0.0) == dataclasses.replace(tiny_config, dropout_rate=0.0)
    with pytest.raises(InputError, match="did you mean 'dropout_rate'"):
        t5x.read_config(path, dropout_rat=0.0)


def test_the_latest_step_is_meant(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    for step in (9, 10):
        theirs = t5x.to_t5x(random_params(tiny_config, seed=step), tiny_config, scanned=True)
        write_native(tmp_path / f"checkpoint_{step}", theirs, optimizer=True)
    write_native(tmp_path / "checkpoint_11.tmp-1700000000", theirs, optimizer=True)
    for path in (tmp_path, tmp_path / "checkpoint_10", tmp_path / "checkpoint_10" / "checkpoint"):
        assert_same(t5x.load_params(path, tiny_config, abstract(tiny_config)), random_params(tiny_config, seed=10))


def test_what_is_not_a_t5x_checkpoint(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    ours = tmp_path / "checkpoints" / "1"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(ours / "params", random_params(tiny_config))
    (tmp_path / "text").write_text("model_checkpoint_path: nothing")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "numbers").write_bytes(b"\x93\x01\x02\x03")
    for path in (ours, ours.parent, ours / "params", tmp_path, tmp_path / "absent", *tmp_path.glob("[tne]*")):
        assert not t5x.is_t5x(path), path
        with pytest.raises(InputError):
            t5x.read_config(path)


def test_a_file_cut_short_is_refused(tiny_config: Any, random_params: Any, tmp_path: Path) -> None:
    theirs = t5x.to_t5x(random_params(tiny_config), tiny_config, scanned=False)
    path = write_single_file(tmp_path / "file", theirs, optimizer=True)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        t5x.load_params(path, tiny_config, abstract(tiny_config))


@pytest.mark.parametrize("damage", ["chunk missing", "chunk damaged", "array missing"])
@pytest.mark.parametrize("write", [write_native, write_orbax_plain])
def test_damaged_arrays_are_refused(
    write: Any, damage: str, tiny_config: Any, random_params: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "there", t5x.to_t5x(random_params(tiny_config), tiny_config, scanned=True), True)
    directory = path / "target.encoder.encoder.mlp.wi_0.kernel"
    chunk = directory / "0.0.0"
    if damage == "chunk missing":
        chunk.unlink()
    elif damage == "chunk damaged":
        chunk.write_bytes(chunk.read_bytes()[:-20])
    else:
        for file in directory.iterdir():
            file.unlink()
    with pytest.raises(InputError, match=r"encoder/encoder/mlp/wi_0/kernel cannot be read: .+"):
        t5x.load_params(path, tiny_config, abstract(tiny_config))
