"""Opens a model, whoever has written it."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from t5x_lite import config as configuration
from t5x_lite import sharding
from t5x_lite.data.tokenizers import find_tokenizer
from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.errors import InputError
from t5x_lite.interop import checkpoints
from t5x_lite.language_model import LanguageModel
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.quantization import quantize, quantized_axes
from t5x_lite.models.registry import build
from t5x_lite.models.transformer import Transformer
from t5x_lite.training.checkpoints import load_params


def load(
    path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | str | None = None,
    *,
    quantization: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    config: TransformerConfig | None = None,
) -> LanguageModel:
    """Loads a model: one that t5x_lite has trained, or a published one.

    A damaged checkpoint of a run is passed over for the one before, with a warning that names it.

    Args:
      path: a run directory; one of its checkpoints, `run/checkpoints/1000`; a Hugging Face directory, with
        safetensors or `pytorch_model.bin`; or a T5X or Mesh TensorFlow checkpoint of the T5 family.
      dtype: of computation and parameters, float32, bfloat16 or float16.
      mesh: a mesh or its description, such as `model:8`; by default one device.
      quantization: int8 makes the large matrices int8 once they are loaded, see `models.quantization`.
      allow_missing: patterns such as `classifier/*` of parameters that a Hugging Face file may lack; they are drawn
        afresh.
      allow_unused: patterns such as `cls.*` of a Hugging Face file's tensors that the model may leave unread.
      config: of the model, where it is not all that a published checkpoint says, or another head is wanted.

    Raises:
      InputError: nothing there that can be loaded.
      CheckpointMismatch: a published model whose tensors are not exactly the model's parameters.
    """
    if quantization not in (None, "int8"):
        raise InputError(f"quantization must be int8 or None, not {quantization!r}")
    run = configuration.run_directory(path)
    ours = (run / "config.yaml").exists()
    if not ours and not checkpoints.is_foreign(path):
        raise InputError(f"'{path}' is not a run directory (it has no config.yaml), nor {checkpoints.KINDS}")
    if ours and (allow_missing or allow_unused):
        raise InputError(f"allow_missing and allow_unused are for Hugging Face directories; {path} is a run of ours")
    if config is None:
        config = configuration.resolve(run / "config.yaml").config.model if ours else checkpoints.read_config(path)
    model = build(config, dtype)
    if not isinstance(mesh, Mesh):
        mesh = sharding.make_mesh(mesh) if mesh else sharding.make_mesh("data:1", jax.devices()[:1])
    sharding.check_divides(mesh, model.config.sharded_sizes())
    shapes = model.param_shapes()
    layouts = sharding.tree_shardings(mesh, model.logical_axes(), shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=s), shapes, layouts)
    if not ours:
        params = checkpoints.load_params(path, config, abstract, allow_missing=allow_missing, allow_unused=allow_unused)
        try:
            tokenizer = find_tokenizer(path)
        except InputError as error:  # the weights are of use without it
            warnings.warn(f"{path} has a tokenizer that cannot be read, so texts cannot: {error}", stacklevel=2)
            tokenizer = None
        checkpoint = None
    else:
        params, checkpoint, notes = load_params(path, abstract)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        tokenizer = find_tokenizer(run / "tokenizer")
    if quantization:
        params = _quantized(model, params, mesh)
    generation = _generation(run if ours else path, config)
    return LanguageModel(model, params, tokenizer, mesh, checkpoint, generation)


def _quantized(model: Transformer, params: Any, mesh: Mesh) -> Any:
    def run(params: Any) -> Any:
        return quantize(params, model.config)

    axes = quantized_axes(model.logical_axes(), model.config)
    layouts = sharding.tree_shardings(mesh, axes, jax.eval_shape(run, params))
    return jax.jit(run, out_shardings=layouts)(params)


def _generation(directory: str | Path, config: TransformerConfig) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    settings = checkpoints.read_generation(directory, config, known)
    if settings.get("do_sample") and settings.get("num_beams", 1) > 1:
        warnings.warn(f"{directory} asks for sampled beams, which are searched without sampling here", stacklevel=3)
        del settings["do_sample"]
    try:
        GenerationConfig.from_settings({}, settings)
    except InputError as error:  # the weights are of use without them
        warnings.warn(f"the generation settings of {directory} are left out: {error}", stacklevel=3)
        return {}
    return settings
