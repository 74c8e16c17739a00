"""Model families on one Transformer core: `preset` gives a published configuration, `build` the Flax module."""

from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import PRESETS, build, count_parameters, preset

__all__ = ["PRESETS", "TransformerConfig", "build", "count_parameters", "preset"]
