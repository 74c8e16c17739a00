"""Training objectives: what is asked of the model, as token ids in and an `Example` out."""

from t5x_lite.data.objectives.example import Example, Objective, Sides, append_eos, frame
from t5x_lite.data.objectives.language_modelling import CausalLM, PrefixLM
from t5x_lite.data.objectives.span_corruption import IidDenoising, SpanCorruption, check_sentinels, mask_from_starts
from t5x_lite.data.objectives.supervised import Chat, TextToText
from t5x_lite.data.objectives.vocabulary import Vocabulary

__all__ = [
    "CausalLM",
    "Chat",
    "Example",
    "IidDenoising",
    "Objective",
    "PrefixLM",
    "Sides",
    "SpanCorruption",
    "TextToText",
    "Vocabulary",
    "append_eos",
    "check_sentinels",
    "frame",
    "mask_from_starts",
]
