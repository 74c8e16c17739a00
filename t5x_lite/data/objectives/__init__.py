"""Training objectives: what is asked of the model, as token ids in and an `Example` out."""

from t5x_lite.data.objectives.bart import (
    Bart,
    DocumentRotation,
    SentencePermutation,
    TextInfilling,
    TokenDeletion,
    TokenMasking,
)
from t5x_lite.data.objectives.example import Example, Objective, Sides, append_eos, frame
from t5x_lite.data.objectives.language_modelling import CausalLM, PrefixLM
from t5x_lite.data.objectives.masked_lm import MaskedLM, Masking
from t5x_lite.data.objectives.next_sentence import NextSentence
from t5x_lite.data.objectives.sentences import sentence_bounds, sentence_windows
from t5x_lite.data.objectives.span_corruption import IidDenoising, SpanCorruption, check_sentinels, mask_from_starts
from t5x_lite.data.objectives.supervised import Chat, TextToText
from t5x_lite.data.objectives.ul2 import DENOISERS, MODE_TOKENS, UL2, Denoiser
from t5x_lite.data.objectives.vocabulary import Vocabulary

__all__ = [
    "DENOISERS",
    "MODE_TOKENS",
    "UL2",
    "Bart",
    "CausalLM",
    "Chat",
    "Denoiser",
    "DocumentRotation",
    "Example",
    "IidDenoising",
    "MaskedLM",
    "Masking",
    "NextSentence",
    "Objective",
    "PrefixLM",
    "SentencePermutation",
    "Sides",
    "SpanCorruption",
    "TextInfilling",
    "TextToText",
    "TokenDeletion",
    "TokenMasking",
    "Vocabulary",
    "append_eos",
    "check_sentinels",
    "frame",
    "mask_from_starts",
    "sentence_bounds",
    "sentence_windows",
]
