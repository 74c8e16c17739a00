"""Decoding: from a prompt to new tokens, in one compiled loop."""

from t5x_lite.decoding.generate import Generated, generate
from t5x_lite.decoding.generation_config import GenerationConfig

__all__ = ["Generated", "GenerationConfig", "generate"]
