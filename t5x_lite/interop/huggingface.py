"""Hugging Face checkpoints: read into our parameters and written back, tensor by tensor, without transformers.

Strict both ways. Every tensor in the file has its place, every parameter is set, and nothing is reshaped to fit; what
a name means is the family's table, `weights` in `models/`.
"""

import dataclasses
import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_lite.errors import CheckpointMismatch, InputError
from t5x_lite.interop.placement import Index, Shape, check_tensors, place
from t5x_lite.interop.tensor_files import WEIGHT_FILES, TensorFiles, open_tensors, write_safetensors
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import build, module_for, module_for_model_type
from t5x_lite.models.weights import Stored

_ROWS = 1 << 22  # numbers that are compared at a time


def is_huggingface(path: str | Path) -> bool:
    """Returns whether `path` is a directory with a Hugging Face `config.json`."""
    return (Path(path).expanduser() / "config.json").is_file()


def read_config(directory: str | Path) -> TransformerConfig:
    """Returns the shape of the model in a Hugging Face directory, in the spelling of transformers 4 or 5.

    Heads, and whether the output head is tied, are told by the tensors: transformers' own flags have changed meaning.

    Raises:
      InputError: not a configuration, a model type we do not have, or a setting we cannot do.
    """
    return _Checkpoint(Path(directory).expanduser()).config


def load_params(
    directory: str | Path,
    config: TransformerConfig,
    abstract: Any,
    *,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> Any:
    """Reads the parameters of a Hugging Face directory, one tensor at a time, straight to their layout.

    Host memory at its peak is what this host keeps plus one tensor.

    Args:
      directory: with `config.json` and safetensors or `pytorch_model.bin`, in one file or in shards.
      config: of the model; usually `read_config(directory)`.
      abstract: tree of `jax.ShapeDtypeStruct`s with the layouts wanted; values are cast to their dtypes.
      allow_missing: patterns such as `classifier/*` of our parameters that the file may lack; those that it lacks are
        drawn afresh.
      allow_unused: patterns such as `cls.*` of tensors that the model may leave unread.

    Raises:
      CheckpointMismatch: a tensor is missing, not used, of another shape, or stored twice with different values.
      InputError: the files cannot be read, or a pattern fits no parameter.
    """
    checkpoint = _Checkpoint(Path(directory).expanduser())
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {_path(keys): leaf for keys, leaf in leaves}
    absent = checkpoint.check(config, {path: leaf.shape for path, leaf in wanted.items()}, allow_missing, allow_unused)
    fresh = _fresh(config, abstract, absent)
    table = module_for(config).weights(config)
    read = [
        fresh[path] if path in fresh else place(leaf, partial(checkpoint.fill, table[path], leaf.shape))
        for path, leaf in wanted.items()
    ]
    return jax.tree.unflatten(tree, read)


def save(
    params: Any, config: TransformerConfig, directory: str | Path, generation: Mapping[str, Any] | None = None
) -> None:
    """Writes `config.json`, `generation_config.json` and `model.safetensors`, which transformers loads.

    Args:
      params: our parameters, NumPy or JAX arrays on this host.
      config: of the model.
      directory: created if it is missing; must not hold a model yet.
      generation: settings for `generation_config.json`, beside the token ids.

    Raises:
      InputError: the family's class in transformers cannot do what the model does, or the directory is taken.
    """
    settings = module_for(config).to_huggingface(config)
    directory = new_directory(directory)
    arrays = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    table = module_for(config).weights(config)
    dtype = {leaf.dtype.name for leaf in arrays.values()}
    write_safetensors(directory / "model.safetensors", _stored_tensors(arrays, table))
    ids = {
        name: settings[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
                     "forced_eos_token_id")
        if settings.get(name) is not None
    }  # fmt: skip
    if config.num_decoder_layers:
        _write_json(directory / "generation_config.json", {**(generation or {}), **ids})
    # Last: its presence is what makes the directory a model.
    _write_json(directory / "config.json", {**settings, "torch_dtype": dtype.pop() if len(dtype) == 1 else "float32"})


def new_directory(path: str | Path) -> Path:
    """Returns `path`, as a directory that holds no model yet.

    Raises:
      InputError: it holds one, or cannot be a directory.
    """
    directory = Path(path).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{directory}' cannot be a directory: {error.strerror}") from None
    taken = [name for name in ("config.json", *WEIGHT_FILES) if (directory / name).exists()]
    if taken:
        raise InputError(f"'{directory}' holds a model already ({taken[0]}); name another directory")
    return directory


class _Checkpoint:
    """A Hugging Face directory: its configuration, and its tensors under the names of the family's table."""

    def __init__(self, directory: Path):
        self.directory = directory
        settings = _settings(directory)
        model_type = settings["model_type"]
        try:
            self.module = module_for_model_type(model_type)
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None
        self.files: TensorFiles = open_tensors(directory)
        prefix = self.module.PREFIX[model_type]
        names = self.files.shapes
        # With the prefix of the base model or without it, whichever class has written the file.
        config = self._configuration(settings, {*names, *(prefix + name for name in names)})
        tables = [self.module.weights(dataclasses.replace(config, tied_head=tied)) for tied in (True, False)]
        known = {name for table in tables for stored in table.values() for name in _all_names(stored, config)}
        buffers = [re.compile(pattern) for pattern in self.module.BUFFERS]
        self.names: dict[str, str] = {}
        for name in names:
            full = prefix + name
            spelling = full if name not in known and full in known and full not in names else name
            if spelling in known or not any(pattern.fullmatch(name) for pattern in buffers):
                self.names[spelling] = name
        self.config = dataclasses.replace(config, tied_head=self._is_tied(config, tables[1]))

    def _configuration(self, settings: Mapping[str, Any], names: Collection[str]) -> TransformerConfig:
        try:
            return self.module.from_huggingface(settings, names)
        except InputError as error:
            raise InputError(f"{self.directory}: {error}") from None
        except (TypeError, ValueError, AttributeError) as error:  # null where a number should be, and the like
            line = " ".join(str(error).split())
            raise InputError(f"{self.directory / 'config.json'} has a value of the wrong kind: {line}") from error

    @property
    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of the tensors."""
        return {name: self.files.shapes[original] for name, original in self.names.items()}

    def check(
        self,
        config: TransformerConfig,
        ours: Mapping[str, Shape],
        allow_missing: Sequence[str],
        allow_unused: Sequence[str],
    ) -> set[str]:
        """Compares all tensors with the model's; returns our parameters that are absent and may be.

        Raises:
          CheckpointMismatch: something is missing, left over, of another shape, or stored twice and not equal.
          InputError: a pattern that fits nothing.
        """
        _check_patterns("allow_missing", allow_missing, ours)
        _check_patterns("allow_unused", allow_unused, self.names)
        have, want, copies = self.shapes, {}, []
        needed_by: dict[str, set[str]] = {}  # tensors that are missing, and the parameters that they are missing for
        for path, stored in self.module.weights(config).items():
            for layer in range(ours[path][0]) if "{}" in stored.name else (0,):
                names = _names(stored, layer)
                present = [name for name in names if name in have]
                want.update(dict.fromkeys(present or names[:1], _their_shape(stored, ours[path])))
                copies.append(present)
                needed_by.setdefault(names[0], set()).update([] if present else [path])
        absent = self._absent(config, ours, allow_missing)
        optional = [name for name, paths in needed_by.items() if paths and paths <= absent]
        for name in [name for name in have if name not in want and _fits(name, allow_unused)]:
            del have[name]
        check_tensors(str(self.directory), have, want, optional)
        for first, *others in filter(None, copies):
            for other in others:
                if not self._equal(first, other):
                    raise CheckpointMismatch(f"{self.directory}: {first} and {other} should be the same, and differ")
        return absent

    def _absent(self, config: TransformerConfig, ours: Mapping[str, Shape], patterns: Sequence[str]) -> set[str]:
        """Returns the parameters that the patterns allow to be missing and that the file has no part of."""

        def is_absent(path: str, stored: Stored) -> bool:
            layers = range(ours[path][0]) if "{}" in stored.name else (0,)
            return not any(name in self.names for layer in layers for name in _names(stored, layer))

        table = self.module.weights(config)
        return {path for path, stored in table.items() if _fits(path, patterns) and is_absent(path, stored)}

    def fill(self, stored: Stored, shape: Shape, block: np.ndarray, index: Index) -> None:
        """Reads the part `index` of our parameter of that shape into `block`."""
        if "{}" not in stored.name:
            block[...] = self._read(stored, 0, shape, index)
            return
        for row, layer in enumerate(range(index[0].start, index[0].stop)):
            block[row] = self._read(stored, layer, shape[1:], index[1:])

    def _read(self, stored: Stored, layer: int, shape: Shape, index: Index) -> np.ndarray:
        name = next(self.names[name] for name in _names(stored, layer) if name in self.names)
        if stored.part:
            offset = stored.part[0] * shape[-1]
            index = (*index[:-1], slice(index[-1].start + offset, index[-1].stop + offset))
        if stored.transposed:
            return self.files.read(name, index[::-1]).T
        if stored.row:
            return self.files.read(name, (slice(0, 1), *index))[0]
        return self.files.read(name, index)

    def _is_tied(self, config: TransformerConfig, untied: Mapping[str, Stored]) -> bool:
        head = untied.get("head/kernel")
        if head is None or head.name not in self.names:
            return config.tied_head  # as the flag says: a head that should be there is missing
        table = next((name for name in _names(untied["embedding/table"]) if name in self.names), None)
        return table is not None and self._equal(head.name, table)

    def _equal(self, one: str, other: str) -> bool:
        shape = self.shapes[one]
        if shape != self.shapes[other]:
            return False
        rows = max(1, _ROWS // max(1, int(np.prod(shape[1:], dtype=np.int64))))
        parts = (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)) if shape else ()
        return all(
            np.array_equal(self.files.read(self.names[one], (part,)), self.files.read(self.names[other], (part,)))
            for part in parts
        )


def _names(stored: Stored, layer: int = 0) -> list[str]:
    return [name.format(layer) for name in (stored.name, *stored.also)]


def _all_names(stored: Stored, config: TransformerConfig) -> set[str]:
    layers = max(config.num_encoder_layers, config.num_decoder_layers)
    return {name for layer in range(layers) for name in _names(stored, layer)}


# What transformers 5 writes to generation_config.json alone, and 4 to config.json too.
_GENERATION = ("decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id")


def _settings(directory: Path) -> dict[str, Any]:
    """Returns `config.json` with its model type, and what `generation_config.json` has of the token ids."""
    settings = read_json(directory / "config.json")
    if (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")
        settings |= {name: generation[name] for name in _GENERATION if generation.get(name) is not None}
    return {**settings, "model_type": _model_type(settings, directory)}


def _model_type(settings: Mapping[str, Any], directory: Path) -> str:
    if "model_type" in settings:
        return str(settings["model_type"])
    # google/umt5-small, for one, has only its class: UMT5ForConditionalGeneration.
    architectures = settings.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise InputError(f"{directory / 'config.json'} has neither a model_type nor architectures")
    architecture = architectures[0]
    name = re.sub(r"(For[A-Z].*|LMHeadModel|Model)$", "", architecture).lower()
    return {"openaigpt": "openai-gpt", "xlmroberta": "xlm-roberta"}.get(name, name)


def _check_patterns(option: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"{option} '{pattern}' fits none of {', '.join(sorted(names))}")


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _their_shape(stored: Stored, shape: Shape) -> Shape:
    """Returns the shape of a tensor in the file, from that of our parameter."""
    if "{}" in stored.name:
        shape = shape[1:]
    if stored.part:
        return (*shape[:-1], shape[-1] * stored.part[1])
    if stored.transposed:
        return shape[::-1]
    return (1, *shape) if stored.row else shape


def _stored_tensors(arrays: Mapping[str, Any], table: Mapping[str, Stored]) -> Iterator[Any]:
    """Yields the tensors as `write_safetensors` takes them; the parts of a fused one come together."""
    fused: dict[str, list[tuple[Stored, Any]]] = {}
    for path, stored in table.items():
        fused.setdefault(stored.name, []).append((stored, arrays[path]))
    for name, parts in fused.items():
        parts.sort(key=lambda item: (item[0].part or (0, 1))[0])
        stored, first = parts[0]
        shape = _their_shape(stored, first.shape)
        for layer in range(first.shape[0]) if "{}" in name else (None,):
            yield (
                name if layer is None else name.format(layer),
                shape,
                np.dtype(first.dtype),
                partial(_assemble, [array for _, array in parts], layer, stored),
            )


def _assemble(arrays: Iterable[Any], layer: int | None, stored: Stored) -> np.ndarray:
    parts = [np.asarray(array if layer is None else array[layer]) for array in arrays]
    whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    if stored.transposed:
        return np.ascontiguousarray(whole.T)
    return whole[None] if stored.row else whole


def _fresh(config: TransformerConfig, abstract: Any, absent: set[str]) -> dict[str, jax.Array]:
    if not absent:
        return {}

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        drawn = jax.tree_util.tree_flatten_with_path(build(config).init_params(key))[0]
        return {_path(keys): leaf.astype(leaves[_path(keys)].dtype) for keys, leaf in drawn if _path(keys) in absent}

    leaves = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    return jax.jit(draw, out_shardings={path: leaves[path].sharding for path in absent})(jax.random.key(0))


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises InputError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial_file = path.with_name(f"{path.name}.partial")
    partial_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial_file.rename(path)
