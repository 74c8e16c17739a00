"""Checkpoints of T5X's T5 models, and of the Mesh-TensorFlow code before it.

What is read, array by array:

* T5X's own form: a directory `checkpoint_<step>/` with an index `checkpoint` (msgpack) that holds small arrays and, for
  the others, the TensorStore description of a zarr directory beside it (`target.encoder.layers_0...`); and its
  ancestor, a single msgpack file that holds everything.
* Orbax directories with the parameters under `target` or `params`: a zarr directory per array or OCDBT, zarr 2 or 3.
* Mesh-TensorFlow's `model.ckpt-<step>.index` and its data shards, without TensorFlow.

T5X has two layouts for one model, and either is read from any of these. `t5x/examples/t5` has a tensor for each layer,
with heads and head size joined: query kernels are `[embed, heads*kv]`. `t5x/examples/scalable_t5` stacks the layers on
axis 1 and keeps heads apart: `[embed, layers, heads, kv]`. `table` says where each of our parameters is in both, as
data; between any two of the three lie a transposition and a reshape, and no arithmetic: attention's scale is folded
into the queries everywhere. Names and axes follow google-research/t5x at commit cc342d4.

Optimizer state, `params_axes` and whatever else lies beside the parameters is skipped, not read.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import ml_dtypes
import msgpack
import numpy as np
import tensorstore

from t5x_lite.errors import CheckpointMismatch, InputError, nearest
from t5x_lite.interop import tensorflow_bundle
from t5x_lite.interop.placement import Index, check_tensors, place
from t5x_lite.models.config import TransformerConfig

ROOTS = ("optimizer/target", "_optimizer/target", "target/params", "target", "params")  # where parameters may be
ITEMS = ("", "state", "default", "pytree")  # where in the directory of a step they are
MARKS = ("token_embedder/embedding", "encoder/encoder_norm/scale", "decoder/decoder_norm/scale")  # one makes it a T5


class Entry(NamedTuple):
    """Where one of our parameters is in T5X.

    Axes are named in their order; `a*b` is a single one, over which `b` runs fastest.

    Attributes:
      ours: our name.
      axes: ours.
      unscanned: name of the tensor with one layer's part, `{}` standing for the layer, or with the whole parameter.
      unscanned_axes: of that tensor in `examples/t5`. Where `scalable_t5` runs without its scan, heads are apart.
      scanned: name of the tensor with the whole parameter.
      scanned_axes: of that tensor.
      layers: the axis over layers, `encoder_layers` or `decoder_layers`; empty: there is none.
    """

    ours: str
    axes: str
    unscanned: str
    unscanned_axes: str
    scanned: str
    scanned_axes: str
    layers: str

    def tensors(self, scanned: bool, sizes: Mapping[str, int]) -> list[str]:
        """Returns the names of the tensors in one layout, in the order of the layers."""
        if scanned:
            return [self.scanned]
        return [self.unscanned.format(layer) for layer in range(sizes[self.layers] if self.layers else 1)]


# A layer's parameters: our name, T5X's in an encoder and in a decoder (empty: it has none), the axes of both.
_LAYER = (
    ("self_attention_norm/scale", "pre_attention_layer_norm/scale", "pre_self_attention_layer_norm/scale", "embed"),
    ("self_attention/query/kernel", "attention/query/kernel", "self_attention/query/kernel", "embed heads*kv"),
    ("self_attention/key/kernel", "attention/key/kernel", "self_attention/key/kernel", "embed heads*kv"),
    ("self_attention/value/kernel", "attention/value/kernel", "self_attention/value/kernel", "embed heads*kv"),
    ("self_attention/out/kernel", "attention/out/kernel", "self_attention/out/kernel", "heads*kv embed"),
    ("cross_attention_norm/scale", "", "pre_cross_attention_layer_norm/scale", "embed"),
    ("cross_attention/query/kernel", "", "encoder_decoder_attention/query/kernel", "embed heads*kv"),
    ("cross_attention/key/kernel", "", "encoder_decoder_attention/key/kernel", "embed heads*kv"),
    ("cross_attention/value/kernel", "", "encoder_decoder_attention/value/kernel", "embed heads*kv"),
    ("cross_attention/out/kernel", "", "encoder_decoder_attention/out/kernel", "heads*kv embed"),
    ("mlp_norm/scale", "pre_mlp_layer_norm/scale", "pre_mlp_layer_norm/scale", "embed"),
)
_MLP = (("mlp/up/kernel", "mlp/wi/kernel", "mlp/wi/kernel", "embed mlp"),)
_GATED_MLP = (
    ("mlp/gate/kernel", "mlp/wi_0/kernel", "mlp/wi_0/kernel", "embed mlp"),  # the one that is activated
    ("mlp/up/kernel", "mlp/wi_1/kernel", "mlp/wi_1/kernel", "embed mlp"),
)
_MLP_OUT = (("mlp/down/kernel", "mlp/wo/kernel", "mlp/wo/kernel", "mlp embed"),)


def table(config: TransformerConfig) -> list[Entry]:
    """Returns where every parameter of a T5 of this configuration is in T5X's two layouts.

    `scalable_t5` has a bias table in every layer, always. For a model that shares one, the scanned layout here has it
    outside the scan, under its unscanned name; `scalable_t5` would want it repeated for each layer.
    """

    def whole(ours: str, axes: str, name: str, t5x_axes: str) -> Entry:
        return Entry(ours, axes, name, t5x_axes, name, t5x_axes, "")

    entries = [whole("embedding/table", "vocab embed", "token_embedder/embedding", "vocab embed")]
    for stack in ("encoder", "decoder"):
        layers = f"{stack}_layers"

        def layered(ours: str, axes: str, name: str, t5x_axes: str, stack: str = stack, layers: str = layers) -> Entry:
            first, *rest = t5x_axes.replace("*", " ").split()
            return Entry(
                f"{stack}/layers/{ours}",
                f"{layers} {axes}",
                f"{stack}/layers_{{}}/{name}",
                t5x_axes,
                f"{stack}/{stack}/{name}",
                " ".join((first, layers, *rest)),
                layers,
            )

        for ours, in_encoder, in_decoder, axes in _LAYER + (_GATED_MLP if config.gated else _MLP) + _MLP_OUT:
            if name := in_encoder if stack == "encoder" else in_decoder:
                entries.append(layered(ours, axes, name, axes))
        bias = ("position_bias/table", "buckets heads", "relpos_bias/rel_embedding", "heads buckets")
        if config.relative_bias_per_layer:
            entries.append(layered(*bias))
        else:
            entries.append(whole(f"{stack}/{bias[0]}", bias[1], f"{stack}/{bias[2]}", bias[3]))
        entries.append(whole(f"{stack}/final_norm/scale", "embed", f"{stack}/{stack}_norm/scale", "embed"))
    if not config.tied_head:
        entries.append(whole("head/kernel", "embed vocab", "decoder/logits_dense/kernel", "embed vocab"))
    return entries


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    """Returns the sizes of the axes that `table` names."""
    return {
        "vocab": config.vocab_size,
        "embed": config.embed_dim,
        "heads": config.num_heads,
        "kv": config.head_dim,
        "mlp": config.mlp_dim,
        "buckets": config.relative_bias_buckets,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
    }


def relayout(array: np.ndarray, axes: str, to: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns `array`, whose axes are `axes`, with the axes `to`: the same numbers in another order."""
    parts, wanted = axes.replace("*", " ").split(), to.replace("*", " ").split()
    apart = array.reshape([sizes[part] for part in parts])
    return apart.transpose([parts.index(part) for part in wanted]).reshape(_shape(to, sizes))


def to_t5x(params: Any, config: TransformerConfig, scanned: bool) -> dict[str, np.ndarray]:
    """Returns parameters as T5X has them.

    Args:
      params: our tree.
      config: of the model.
      scanned: as `examples/scalable_t5` stacks them, or a tensor per layer as in `examples/t5`.

    Returns:
      Arrays by name (`encoder/layers_0/attention/query/kernel`), as they are under T5X's `target`.
    """
    ours, sizes, out = _flat(params), axis_sizes(config), {}
    for entry in table(config):
        array = np.asarray(ours[entry.ours])
        names = entry.tensors(scanned, sizes)
        if scanned or not entry.layers:
            out[names[0]] = relayout(array, entry.axes, entry.scanned_axes, sizes)
        else:
            axes = entry.axes.removeprefix(f"{entry.layers} ")
            for name, layer in zip(names, array, strict=True):
                out[name] = relayout(layer, axes, entry.unscanned_axes, sizes)
    return out


def is_t5x(path: str | Path) -> bool:
    """Whether the parameters of a T5, as T5X or Mesh-TensorFlow wrote them, are at `path`.

    Args:
      path: a file, the directory of a step, or one of several (the latest is meant). Names are looked at, no arrays;
        a single msgpack file is read through.
    """
    try:
        _find(Path(path))
    except InputError:
        return False
    return True


def read_config(path: str | Path, **overrides: Any) -> TransformerConfig:
    """Returns the configuration of the model in a checkpoint, as far as names and shapes tell it.

    Sizes, depths, gates, position biases and whether there is a head are seen. The rest is what all T5 have in common:
    an embedding without a head beside it is scaled (v1.0), blocks with a gate use tanh-gelu and those without use relu,
    biases reach to distance 128, norms add 1e-6, dropout is 0.1, padding is 0 and the end of a sequence 1.

    Args:
      path: as for `is_t5x`.
      **overrides: fields that are known better.

    Raises:
      InputError: there is no such checkpoint, or it is damaged, or there is no such field.
      CheckpointMismatch: it is not one of an encoder-decoder T5.
    """
    known = [field.name for field in fields(TransformerConfig)]
    for name in overrides:
        if name not in known:
            raise InputError(f"a model has no field '{name}'{nearest(name, known)}")
    where, leaves = _find(Path(path))
    scanned = _is_scanned(leaves)

    def shape(name: str) -> tuple[int, ...]:
        if name not in leaves:
            raise CheckpointMismatch(
                f"{where} is not of an encoder-decoder T5: it has no {name}{nearest(name, leaves)}"
            )
        return _open({name: leaves[name]}, where)[name].shape

    def depth(stack: str) -> int:
        if scanned:
            return shape(f"{stack}/{stack}/mlp/wo/kernel")[1]
        found = [re.match(rf"{stack}/layers_(\d+)/", name) for name in leaves]
        return max((int(match[1]) + 1 for match in found if match), default=1)

    first = "encoder/encoder" if scanned else "encoder/layers_0"
    per_layer = f"{first}/relpos_bias/rel_embedding" in leaves
    vocab, embed = shape("token_embedder/embedding")
    heads, *_, buckets = shape(f"{first if per_layer else 'encoder'}/relpos_bias/rel_embedding")
    encoder_layers = depth("encoder")
    joined = math.prod(shape(f"{first}/attention/query/kernel")) // embed // (encoder_layers if scanned else 1)
    gated = f"{first}/mlp/wi_0/kernel" in leaves
    tied = "decoder/logits_dense/kernel" not in leaves
    seen = {
        "family": "t5",
        "vocab_size": vocab,
        "embed_dim": embed,
        "num_heads": heads,
        "head_dim": joined // heads,
        "mlp_dim": shape(f"{first}/mlp/wo/kernel")[0],
        "num_encoder_layers": encoder_layers,
        "num_decoder_layers": depth("decoder"),
        "activation": "gelu_tanh" if gated else "relu",
        "gated": gated,
        "tied_head": tied,
        "scaled_head": tied,
        "relative_bias_buckets": buckets,
        "relative_bias_per_layer": per_layer,
    }
    return TransformerConfig(**{**seen, **overrides})


def load_params(path: str | Path, config: TransformerConfig, abstract: Any) -> Any:
    """Reads a checkpoint's parameters, each straight into its layout and one at a time.

    Args:
      path: as for `is_t5x`.
      config: of the model.
      abstract: our tree of parameters as `jax.ShapeDtypeStruct`s: the dtypes and shardings wanted.

    Raises:
      InputError: there is no such checkpoint, or it is damaged.
      CheckpointMismatch: a parameter is missing, a tensor is left over or a shape differs. Nothing has been read then.
    """
    where, leaves = _find(Path(path))
    arrays, scanned, sizes = _open(leaves, where), _is_scanned(leaves), axis_sizes(config)
    entries = {entry.ours: entry for entry in table(config)}
    _check(where, entries.values(), arrays, scanned, sizes)

    def read(name: str, layouts: tuple[str, ...], to: str) -> np.ndarray:
        array = arrays[name].read()
        axes = next(axes for axes in layouts if array.shape == _shape(axes, sizes))
        return relayout(array, axes, to, sizes)

    def fill(entry: Entry, block: np.ndarray, index: Index) -> None:
        layouts, tensors = _layouts(entry, scanned), entry.tensors(scanned, sizes)
        if scanned or not entry.layers:
            block[...] = read(tensors[0], layouts, entry.axes)[index]
            return
        axes = entry.axes.removeprefix(f"{entry.layers} ")
        for row, tensor in zip(block, tensors[index[0]], strict=True):
            row[...] = read(tensor, layouts, axes)[index[1:]]

    placed = {name: place(leaf, partial(fill, entries[name])) for name, leaf in _flat(abstract).items()}
    return flax.traverse_util.unflatten_dict(placed, sep="/")


def _check(
    where: Path, entries: Iterable[Entry], arrays: Mapping[str, "_Array"], scanned: bool, sizes: Mapping[str, int]
) -> None:
    """Raises CheckpointMismatch unless tensors and parameters are the same, down to their shapes."""
    have = {name: array.shape for name, array in arrays.items()}
    want = {}
    for entry in entries:
        shapes = [_shape(axes, sizes) for axes in _layouts(entry, scanned)]
        for name in entry.tensors(scanned, sizes):
            want[name] = have[name] if have.get(name) in shapes else shapes[0]
    check_tensors(str(where), have, want)


def _layouts(entry: Entry, scanned: bool) -> tuple[str, ...]:
    """Returns the axes that a tensor of the entry may have: heads are joined or apart."""
    if scanned:
        return (entry.scanned_axes,)
    return entry.unscanned_axes, entry.unscanned_axes.replace("*", " ")


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[part] for part in axis.split("*")) for axis in axes.split())


def _flat(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _is_scanned(names: Iterable[str]) -> bool:
    return any(name.startswith(("encoder/encoder/", "decoder/decoder/")) for name in names)


# Finding a checkpoint. A leaf is an array, a tensor of a bundle, or the description by which TensorStore opens one.
_Leaf = np.ndarray | tensorflow_bundle.Tensor | dict[str, Any]


def _find(path: Path) -> tuple[Path, dict[str, _Leaf]]:
    """Returns where the parameters at `path` are, and each by its name in T5X.

    Raises:
      InputError: there are none, or not of a T5.
    """
    path = path.expanduser().absolute()
    if prefix := tensorflow_bundle.find(path):
        where, leaves = prefix, _named_as_in_t5x(tensorflow_bundle.read_index(prefix))
    else:
        where = _latest(path)
        stored = _read_index(where)
        roots = [root for root in ROOTS if any(f"{root}/{mark}" in stored for mark in MARKS)]
        prefix = f"{roots[0]}/" if roots else "/"
        leaves = {name.removeprefix(prefix): leaf for name, leaf in stored.items() if name.startswith(prefix)}
    if not any(mark in leaves for mark in MARKS):
        raise InputError(f"{where} holds no parameters of a T5 as T5X or Mesh-TensorFlow name them")
    return where, leaves


def _latest(path: Path) -> Path:
    """Returns `path` if it is a checkpoint, or else the checkpoint in it with the largest step."""
    if path.is_file():
        return path
    for directory in (path / item for item in ITEMS):
        if any((directory / name).is_file() for name in ("checkpoint", "_METADATA")):
            return directory
    steps = [(int(match[2]), child) for child in _children(path) if (match := _STEP.fullmatch(child.name))]
    if not steps:
        raise InputError(f"{path} {'holds no checkpoint of T5X' if path.is_dir() else 'does not exist'}")
    return _latest(max(steps)[1])


_STEP = re.compile(r"(checkpoint_)?(\d+)")


def _children(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if child.is_dir()] if path.is_dir() else []


def _read_index(path: Path) -> dict[str, _Leaf]:
    """Returns everything in an Orbax directory by name; of a T5X checkpoint what is in its `target`."""
    metadata, index = path / "_METADATA", path / "checkpoint" if path.is_dir() else path
    try:
        if metadata.is_file():
            return _read_metadata(metadata)
        return {name: _decode(leaf, index.parent) for name, leaf in _read_msgpack(index).items()}
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.exceptions.UnpackException) as error:
        raise InputError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error


def _read_metadata(path: Path) -> dict[str, _Leaf]:
    metadata = json.loads(path.read_text())
    out: dict[str, _Leaf] = {}
    for row in metadata["tree_metadata"].values():
        keys = [str(part["key"]) for part in row["key_metadata"]]
        if not row["value_metadata"].get("skip_deserialize", False):
            out["/".join(keys)] = _zarr(path.parent, ".".join(keys), zarr3=metadata.get("use_zarr3", False))
    return out


def _read_msgpack(path: Path) -> dict[str, Any]:
    """Returns the leaves under `target` or `params`; other parts of the file are passed over."""
    spans: list[tuple[str, int, int]] = []
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False, max_buffer_size=0)

        def walk(prefix: str) -> None:
            for _ in range(unpacker.read_map_header()):
                key = prefix + str(unpacker.unpack())
                if key in ("optimizer", "_optimizer"):
                    walk(f"{key}/")
                    continue
                start = unpacker.tell()
                unpacker.skip()
                if key in ROOTS:
                    spans.append((key, start, unpacker.tell()))

        walk("")
        out = {}
        for key, start, end in spans:
            file.seek(start)
            tree = flax.serialization.msgpack_restore(file.read(end - start))
            if isinstance(tree, dict):
                flat = flax.traverse_util.flatten_dict(tree, is_leaf=lambda _, node: "kvstore" in node, sep="/")
                out.update({f"{key}/{name}": leaf for name, leaf in flat.items() if leaf is not None})
    return out


def _decode(leaf: Any, directory: Path) -> _Leaf:
    """Returns what a leaf of a msgpack index stands for."""
    if isinstance(leaf, str):  # Orbax: where the array is
        scheme, _, name = leaf.partition("://")
        if scheme != "PLACEHOLDER":
            raise ValueError(f"'{leaf[:80]}' is not a reference to an array")
        return _zarr(directory, name)
    if isinstance(leaf, dict):  # T5X: how TensorStore is to open it, wherever the checkpoint was written
        name = leaf["kvstore"].get("path") or leaf["path"]
        return _zarr(directory, name.strip("/"))
    return np.asarray(leaf)


def _zarr(directory: Path, name: str, zarr3: bool = False) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{directory}/"}
    kvstore = {"driver": "file", "path": f"{directory / name}/"}
    if (directory / "manifest.ocdbt").is_file():
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    # A chunk that is not there would count as zeros.
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}


class _Array:
    """An array in a checkpoint, of known shape; `read` fetches it."""

    def __init__(self, name: str, leaf: Any, where: Path):
        self._name, self._leaf, self._where = name, leaf, where
        self.shape: tuple[int, ...] = tuple(leaf.shape)

    def read(self) -> np.ndarray:
        try:
            array = self._leaf if isinstance(self._leaf, np.ndarray) else self._leaf.read()
            array = array if isinstance(array, np.ndarray) else array.result()
        except InputError as error:
            raise InputError(f"{self._where}: {self._name} cannot be read: {error}") from error
        except ValueError as error:
            raise _unreadable(self._where, self._name, error) from error
        # Before version 3, T5X wrote bfloat16 as its bits. No parameter is a whole number.
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def _open(leaves: Mapping[str, _Leaf], where: Path) -> dict[str, _Array]:
    opening = {  # all at once
        name: tensorstore.open(leaf, open=True, read=True) for name, leaf in leaves.items() if isinstance(leaf, dict)
    }
    out = {}
    for name, leaf in leaves.items():
        try:
            out[name] = _Array(name, opening[name].result() if name in opening else leaf, where)
        except ValueError as error:
            raise _unreadable(where, name, error) from error
    return out


def _unreadable(where: Path, name: str, error: Exception) -> InputError:
    return InputError(f"{where} is damaged or incomplete: {name} cannot be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# Names of Mesh-TensorFlow, per stack: what the norms before and the layers after them are in T5X.
_NORMS = {
    "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
    "decoder": ("pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"),
}
_ATTENTION = {
    ("encoder", "SelfAttention"): "attention",
    ("decoder", "SelfAttention"): "self_attention",
    ("decoder", "EncDecAttention"): "encoder_decoder_attention",
}
_PROJECTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_NOT_A_PARAMETER = re.compile(r"global_step|.*_slot_\w+|.*/adam_[mv]")
_BIAS = "layer_000/SelfAttention/relative_attention_bias"


def _named_as_in_t5x(tensors: Mapping[str, tensorflow_bundle.Tensor]) -> dict[str, _Leaf]:
    """Returns the parameters of a Mesh-TensorFlow checkpoint by their unscanned names; axes are the same."""
    biases = {name.split("/")[1] for name in tensors if name.endswith(_BIAS)}
    return {
        _in_t5x(name, shared_bias=biases == {"block_000"}): tensor
        for name, tensor in tensors.items()
        if not _NOT_A_PARAMETER.fullmatch(name)
    }


def _in_t5x(name: str, shared_bias: bool) -> str:
    """Returns T5X's name of a tensor, or its own if it is not a T5's: then it is left over, and that is reported."""
    if name == "shared/embedding":
        return "token_embedder/embedding"
    if name == "decoder/logits/kernel":
        return "decoder/logits_dense/kernel"
    if match := re.fullmatch(r"(encoder|decoder)/(?:final_layer|rms)_norm/scale", name):
        return f"{match[1]}/{match[1]}_norm/scale"
    block = re.fullmatch(r"(encoder|decoder)/block_(\d+)/(layer_(\d+)/(.+))", name)
    if not block:
        return name
    stack, layer, sublayer, rest = block[1], f"{block[1]}/layers_{int(block[2])}", int(block[4]), block[5]
    if block[3] == _BIAS:
        return f"{stack if shared_bias else layer}/relpos_bias/rel_embedding"
    if re.fullmatch(r"(layer|rms)_norm/scale", rest) and sublayer < len(_NORMS[stack]):
        return f"{layer}/{_NORMS[stack][sublayer]}/scale"
    if (match := re.fullmatch(r"(\w+)/([qkvo])", rest)) and (stack, match[1]) in _ATTENTION:
        return f"{layer}/{_ATTENTION[stack, match[1]]}/{_PROJECTION[match[2]]}/kernel"
    if match := re.fullmatch(r"DenseReluDense/(wi|wi_0|wi_1|wo)/kernel", rest):
        return f"{layer}/mlp/{match[1]}/kernel"
    return name
