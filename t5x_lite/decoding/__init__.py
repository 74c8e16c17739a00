"""Decoding: from a prompt to new tokens, in one compiled loop."""

from t5x_lite.decoding.generate import Generated, GenerationConfig, generate

__all__ = ["Generated", "GenerationConfig", "generate"]
