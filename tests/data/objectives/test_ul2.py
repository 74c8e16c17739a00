import dataclasses

import numpy as np
import pytest

from t5x_lite.data.objectives import DENOISERS, UL2, Denoiser, PrefixLM, SpanCorruption
from t5x_lite.errors import InputError

N = 10_000
TOKENS = np.arange(10, 130)
# Of 120 tokens: mode, noise tokens, spans; a span of 64 tokens on average is one. Of the last the noise is drawn.
EXPECTED = {
    (890, 18, 6): 1,
    (890, 18, 2): 1,
    (891, 60, 20): 1,
    (891, 60, 8): 1,
    (891, 18, 1): 1,
    (891, 60, 1): 1,
    (892, None, 0): 1,
}


def kind(example):
    spans = int((example.targets >= 900).sum())
    noise = len(example.targets) - 1 - spans if spans else None
    return int(example.inputs[0]), noise, spans


def test_the_denoisers_of_the_paper():
    spans = [(d.mode, d.objective.noise_density, d.objective.mean_span_length) for d in DENOISERS[:6]]
    assert spans == [
        *(("R", 0.15, 3.0), ("R", 0.15, 8.0)),
        *(("X", 0.5, 3.0), ("X", 0.5, 8.0), ("X", 0.15, 64.0), ("X", 0.5, 64.0)),
    ]
    assert DENOISERS[6] == Denoiser("S", PrefixLM(0.25))


def test_each_denoiser_is_drawn_as_often_as_it_should(vocabulary, draws, fits):
    examples = [UL2()(TOKENS, draws(i), vocabulary) for i in range(N)]
    kinds = [kind(example) for example in examples]
    assert set(kinds) == set(EXPECTED)
    assert fits([kinds.count(key) for key in EXPECTED], 1)
    # The sequential denoiser says from 1 to 60 tokens, uniformly.
    said = [len(e.targets) - 1 for e, (mode, *_) in zip(examples, kinds, strict=True) if mode == 892]
    assert fits(np.bincount(said, minlength=61)[1:].reshape(12, 5).sum(axis=1), 1)
    rates = (0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2)
    mixture = UL2(tuple(dataclasses.replace(d, rate=rate) for d, rate in zip(DENOISERS, rates, strict=True)))
    kinds = [kind(mixture(TOKENS, draws(i), vocabulary)) for i in range(N)]
    assert fits([kinds.count(key) for key in EXPECTED], rates)


def test_by_hand(vocabulary, draws):
    one = UL2((Denoiser("S", PrefixLM(0.25)),))
    example = one(np.arange(10, 13), draws(0), vocabulary)  # the point is before or after the middle
    length = len(example.inputs)
    assert example.inputs.tolist() == [892, 893, *range(10, 10 + length - 3), 1]
    assert example.targets.tolist() == [*range(10 + length - 3, 13), 1]
    # A text of two tokens has one mask: its last.
    one = UL2((Denoiser("X", SpanCorruption(0.5, 3.0)),))
    example = one(np.array([10, 11]), draws(0), vocabulary)
    assert example.inputs.tolist() == [891, 10, 999, 1]
    assert example.targets.tolist() == [999, 11, 1]
    decoder = dataclasses.replace(one, sides="decoder")(np.array([10, 11]), draws(0), vocabulary)
    assert decoder.inputs is None
    assert decoder.targets.tolist() == [891, 10, 999, 1, 999, 11, 1]
    assert decoder.target_weights.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_mode_tokens(vocabulary, draws):
    without = dataclasses.replace(vocabulary, modes={"[NLX]": (890,)})
    with pytest.raises(InputError, match=r"no '\[NLU\]', the name of mode R.*or mode_tokens=None.*'\[NLX\]'"):
        UL2().check(100, without)
    nameless = UL2(mode_tokens=None)
    nameless.check(100, without)
    assert all(nameless(TOKENS, draws(i), without).inputs[0] in (10, 999) for i in range(100))
    named = UL2(mode_tokens={"R": "[NLX]", "X": "[NLX]", "S": "[NLX]"})
    assert all(named(TOKENS, draws(i), without).inputs[0] == 890 for i in range(50))


def test_windows_fit_every_denoiser(vocabulary):
    # The prefix and EOS behind two ids of the mode: one token of the text less.
    assert UL2().window(512, 512, vocabulary) == 510
    # Half noise in spans of 3: 256 = 192 + 63 + 1 from 383 tokens on, and 382 that do not exceed it.
    extreme = UL2((Denoiser("X", SpanCorruption(0.5, 3.0)),), mode_tokens=None)
    assert extreme.window(512, 256, vocabulary) == SpanCorruption(0.5, 3.0).window(512, 256, vocabulary)
    assert extreme.sizes(extreme.window(512, 256, vocabulary), vocabulary)[1] <= 256


def test_errors(vocabulary):
    with pytest.raises(InputError, match="at least one must have a rate above 0"):
        UL2(())
    with pytest.raises(InputError, match="mode 'Q': allowed are R, X, S"):
        Denoiser("Q", SpanCorruption())
    with pytest.raises(InputError, match="mode_tokens has no name for mode X"):
        UL2(mode_tokens={"R": "[NLU]", "S": "[S2S]"})
    with pytest.raises(InputError, match="sides='encoder_decoder'"):
        Denoiser("S", PrefixLM(sides="decoder"))
    with pytest.raises(InputError, match="spans but the tokenizer has 100 sentinels"):
        UL2().check(1000, vocabulary)
    with pytest.raises(InputError, match="target_length None: must be at least"):
        UL2(sides="decoder").window(0, None, vocabulary)
