"""What every objective promises: sizes that hold, windows that fit, and examples that follow from the draws alone."""

import dataclasses
import pickle

import numpy as np
import pytest

from t5x_lite.data.objectives import (
    UL2,
    Bart,
    CausalLM,
    Chat,
    Denoiser,
    DocumentRotation,
    IidDenoising,
    MaskedLM,
    Masking,
    NextSentence,
    PrefixLM,
    SentencePermutation,
    SpanCorruption,
    TextInfilling,
    TextToText,
    TokenDeletion,
    TokenMasking,
)

OF_TEXT = {
    "spans": SpanCorruption(),
    "spans of 8": SpanCorruption(0.15, 8.0),
    "half in spans": SpanCorruption(0.5, 3.0),
    "nearly all": SpanCorruption(0.9, 2.0),
    "rolled": SpanCorruption(random_roll=True),
    "half rolled": SpanCorruption(0.5, 2.0, random_roll=True),
    "independent": IidDenoising(0.5),
    "causal": CausalLM(),
    "prefix": PrefixLM(),
    "short suffix": PrefixLM(0.2),
    "decoder's prefix": PrefixLM(sides="decoder"),
    "bart": Bart(),
    "masking": Bart((TokenMasking(0.3),)),
    "deletion": Bart((TokenDeletion(0.0), DocumentRotation())),
    "infilling": Bart((TextInfilling(0.5, 0.5),)),
    "all noises": Bart((TextInfilling(0.2), DocumentRotation(), TokenMasking(0.1, True), SentencePermutation())),
    "masked": MaskedLM(),
    "masked words": MaskedLM(Masking(0.4, whole_words=True)),
    "masked by chance": MaskedLM(Masking(style="huggingface")),
    "pairs": NextSentence(),
    "ul2": UL2(),
    "nameless": UL2(mode_tokens=None),
    "decoder's ul2": UL2(sides="decoder"),
    "sequential": UL2((Denoiser("S", PrefixLM(0.25)),), sides="decoder"),
    "one denoiser": UL2((Denoiser("X", SpanCorruption(0.5, 4.0)),), sides="decoder"),
}
OF_RECORDS = {
    "pairs of texts": TextToText(20, 10),
    "decoder's pairs": TextToText(20, 40, "decoder"),
    "chat": Chat(20, 40),
    "encoder-decoder's chat": Chat(20, 10, "encoder_decoder"),
}
TOKENS = np.random.default_rng(0).integers(6, 300, 3000).astype(np.uint16)
TOKENS[np.random.default_rng(1).random(3000) < 0.2] = 5
TOKENS.flags.writeable = False  # as a memory-mapped cache is


def make(objective, length, rng, vocabulary):
    arrays = {
        "tokens": TOKENS[:length],
        "other": TOKENS[1000:1300],
        "inputs": TOKENS[:length],
        "targets": TOKENS[1000 : 1000 + length // 3],
        "answer": np.arange(length) % 7 > 3,
    }
    return objective(*(arrays[name] for name in objective.arrays), rng, vocabulary)


def lengths(example):
    return tuple(0 if side is None else len(side) for side in (example.inputs, example.targets))


@pytest.mark.parametrize("name", OF_TEXT)
def test_sizes_are_reached_and_never_exceeded(name, vocabulary, draws):
    objective = OF_TEXT[name]
    for length in (1, 2, 3, 5, 10):
        made = [lengths(make(objective, length, draws(i), vocabulary)) for i in range(300)]
        assert tuple(map(max, zip(*made, strict=True))) == objective.sizes(length, vocabulary)
    for length in range(11, 300, 13):
        most = objective.sizes(length, vocabulary)
        for i in range(5):
            made = lengths(make(objective, length, draws(i), vocabulary))
            assert made[0] <= most[0]
            assert made[1] <= most[1]


@pytest.mark.parametrize("name", OF_TEXT)
def test_windows_fit_and_longer_ones_would_not(name, vocabulary):
    objective = OF_TEXT[name]
    if objective.sides == "encoder_decoder":
        rows = [(64, None), (65, 65), (200, 30), (31, 200), (512, 114), (300, 300)]
    else:
        rows = [(length, length) for length in (20, 64, 65, 200)]
    for inputs, targets in rows:
        raw = objective.window(inputs, targets, vocabulary)
        for length in range(1, raw + 1):
            most = objective.sizes(length, vocabulary)
            assert most[0] <= inputs
            assert targets is None or most[1] <= targets
        more = objective.sizes(raw + 1, vocabulary)
        # T5 keeps the targets no longer than the inputs where half of the tokens are noise.
        is_half = getattr(objective, "noise_density", None) == 0.5
        is_half |= any(d.objective.noise_density == 0.5 and d.mode == "X" for d in getattr(objective, "denoisers", ()))
        assert more[0] > inputs or (targets is not None and more[1] > targets) or (is_half and more[1] > more[0])


@pytest.mark.parametrize("name", [*OF_TEXT, *OF_RECORDS])
def test_examples_follow_from_the_draws_alone(name, vocabulary, draws):
    objective = (OF_TEXT | OF_RECORDS)[name]
    again, words = pickle.loads(pickle.dumps((objective, vocabulary)))
    assert again == objective
    different = 0
    for i in range(20):
        one, other = make(objective, 150, draws(i), vocabulary), make(again, 150, draws(i), words)
        third = make(objective, 150, draws(i, seed=1), vocabulary)
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            np.testing.assert_array_equal(value, getattr(other, field.name))
            different += not np.array_equal(value, getattr(third, field.name))
            if isinstance(value, np.ndarray):
                assert value.dtype == (np.float32 if field.name.endswith("weights") else np.int32)
        assert (one.inputs is None) == (objective.sides == "decoder")
        assert (one.targets is None) == (objective.sides == "encoder")
        assert (one.input_targets is None) == (objective.sides != "encoder")
    is_drawn = not isinstance(objective, CausalLM | TextToText | Chat)
    assert different == 0 if not is_drawn else different >= 15


@pytest.mark.parametrize("name", OF_TEXT)
def test_nothing_of_a_text_is_lost_or_made_up(name, vocabulary, draws):
    objective = OF_TEXT[name]
    objective.check(100, vocabulary)
    known = {*TOKENS[:100].tolist(), *range(890, 1000), 1, 3, 4}
    for i in range(50):
        example = make(objective, 100, draws(i), vocabulary)
        sides = [side for side in (example.inputs, example.targets, example.input_targets) if side is not None]
        if objective.sides != "encoder":
            assert set(np.concatenate(sides).tolist()) <= known
            assert set(TOKENS[:100].tolist()) <= set(np.concatenate(sides).tolist())
        assert all(side.min() > 0 for side in sides)
