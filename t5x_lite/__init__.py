"""t5x_lite: train, evaluate and use Transformer language models in JAX, from a laptop to a TPU pod."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5x_lite.decoding.generation_config import GenerationConfig
    from t5x_lite.errors import InputError
    from t5x_lite.language_model import LanguageModel
    from t5x_lite.loading import load

__version__ = "0.1.0"

__all__ = ["GenerationConfig", "InputError", "LanguageModel", "__version__", "load"]

# Looked up when first used: `t5x-lite config show` or a wrong column name should not wait for JAX to be imported.
_HOMES = {
    "GenerationConfig": "decoding.generation_config",
    "InputError": "errors",
    "LanguageModel": "language_model",
    "load": "loading",
}
_ROOMS = ("config", "data", "decoding", "evaluation", "interop", "models", "nn", "sharding", "training")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"t5x_lite.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"t5x_lite.{name}")
    raise AttributeError(f"module 't5x_lite' has no attribute '{name}'")
