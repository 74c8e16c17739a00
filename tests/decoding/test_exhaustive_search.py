"""A search with room for everything there is finds all of it, in its order: the real model and the real loop."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite.decoding import GenerationConfig, generate
from t5x_lite.models import PRESETS, TransformerConfig, build

VOCAB, NEW_TOKENS, EOS = 5, 4, 1
TEXTS = np.array(list(itertools.product(range(VOCAB), repeat=NEW_TOKENS)), np.int32)
PROMPTS = (3, 1, 2)  # tokens of each row's prompt
ROWS = len(PROMPTS)
SIZES = {"vocab_size": VOCAB, "embed_dim": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, "num_decoder_layers": 1}
IDS = {"eos_id": EOS, "decoder_start_id": 0}
CONFIGS = {
    "pair": dataclasses.replace(PRESETS["t5-v1.1-small"], **SIZES, **IDS, num_encoder_layers=1),
    "alone": dataclasses.replace(PRESETS["gpt2"], **SIZES, **IDS, bos_id=None, max_positions=8),
}
SEARCHES = {
    "pair, hf": ("pair", "hf", 1.0),
    "pair, t5": ("pair", "t5", 0.6),
    "alone, hf": ("alone", "hf", 0.6),
    "alone, t5": ("alone", "t5", 1.0),
}

Scores = list[dict[tuple[int, ...], float]]  # for each row, by what is generated, EOS included


@pytest.fixture(scope="module")
def problem(sharp_params: Any) -> Callable[[str], tuple[TransformerConfig, Any, dict[str, np.ndarray]]]:
    """A function `kind -> (config, params, batch)`, the batch with prompts of different lengths."""

    def make(kind: str) -> tuple[TransformerConfig, Any, dict[str, np.ndarray]]:
        rng = np.random.default_rng(4)
        prompts = rng.integers(0, VOCAB, (ROWS, max(PROMPTS))).astype(np.int32)
        prompts[:, 0] = 0
        segments = (np.arange(max(PROMPTS)) < np.array(PROMPTS)[:, None]).astype(np.int32)
        batch = {"decoder_input_tokens": prompts, "decoder_segment_ids": segments}
        if kind == "pair":
            batch["encoder_input_tokens"] = rng.integers(2, VOCAB, (ROWS, 6)).astype(np.int32)
        return CONFIGS[kind], sharp_params(CONFIGS[kind], seed=1), batch

    return make


@pytest.fixture(scope="module")
def log_likelihoods(problem: Any) -> Callable[[str], Scores]:
    """A function `kind -> Scores` without any penalty, by teacher forcing of all texts; those that no EOS ends too."""

    @cache
    def score(kind: str) -> Scores:
        config, params, batch = problem(kind)
        prompts = batch["decoder_input_tokens"]
        inputs = np.zeros((ROWS, len(TEXTS), max(PROMPTS) + NEW_TOKENS), np.int32)
        for row, size in enumerate(PROMPTS):
            inputs[row, :, :size] = prompts[row, :size]
            inputs[row, :, size : size + NEW_TOKENS] = TEXTS
        full = {"decoder_input_tokens": inputs.reshape(-1, inputs.shape[2])}
        full["decoder_segment_ids"] = np.ones_like(full["decoder_input_tokens"])
        if kind == "pair":
            full["encoder_input_tokens"] = np.repeat(batch["encoder_input_tokens"], len(TEXTS), axis=0)
        logits = jax.jit(build(config).apply)({"params": params}, full)
        logs = np.asarray(jax.nn.log_softmax(logits), np.float64).reshape(*inputs.shape, VOCAB)
        found: Scores = []
        for row, size in enumerate(PROMPTS):
            places = np.arange(size - 1, size - 1 + NEW_TOKENS)
            gained = np.take_along_axis(logs[row][:, places], TEXTS[:, :, None], axis=2)[:, :, 0]
            scores = {}
            for text, gains in zip(TEXTS.tolist(), gained, strict=True):
                end = text.index(EOS) + 1 if EOS in text else NEW_TOKENS
                scores[tuple(text[:end])] = float(np.sum(gains[:end]))
            found.append(scores)
        return found

    return score


def penalized(scores: Scores, style: str, exponent: float) -> Scores:
    """Returns what a search of the style ranks by, of the sequences that it may return."""

    def penalty(length: int) -> float:
        return (length if style == "hf" else (5 + length) / 6) ** exponent

    return [
        {text: score / penalty(len(text)) for text, score in row.items() if style == "hf" or text[-1] == EOS}
        for row in scores
    ]


@pytest.mark.parametrize("search", SEARCHES)
def test_as_many_beams_as_there_are_texts_find_all_of_them(search: str, problem: Any, log_likelihoods: Any) -> None:
    kind, style, exponent = SEARCHES[search]
    config, params, batch = problem(kind)
    everything = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        num_beams=len(TEXTS),
        num_return_sequences=len(TEXTS),
        length_penalty=exponent,
        length_penalty_style=style,  # type: ignore[arg-type]
    )
    made = generate(build(config), params, batch, everything)
    tokens = np.asarray(made.tokens).reshape(ROWS, len(TEXTS), NEW_TOKENS)
    lengths, scores = (np.asarray(x).reshape(ROWS, len(TEXTS)) for x in (made.lengths, made.scores))
    wanted = penalized(log_likelihoods(kind), style, exponent)
    count = sum(4**n for n in range(4)) + (4**4 if style == "hf" else 0)
    for row in range(ROWS):
        sizes = lengths[row]
        assert np.all(sizes[:count] > 0)
        assert np.all(sizes[count:] == 0)
        assert np.all(np.isneginf(scores[row, count:]))
        found = {tuple(ids[:n].tolist()): score for ids, n, score in zip(tokens[row], sizes, scores[row], strict=True)}
        found.pop(())
        assert found.keys() == wanted[row].keys()
        # Sums of four float32 log-probabilities of up to 20.
        np.testing.assert_allclose([found[text] - score for text, score in wanted[row].items()], 0.0, atol=2e-5)
        assert np.all(np.diff(scores[row, :count]) <= 0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_few_beams_find_more_than_greedy_decoding(kind: str, problem: Any, log_likelihoods: Any) -> None:
    config, params, batch = problem(kind)
    greedy = generate(build(config), params, batch, GenerationConfig(max_new_tokens=NEW_TOKENS))
    beams = generate(build(config), params, batch, GenerationConfig(max_new_tokens=NEW_TOKENS, num_beams=3))
    optimum = [max(row.values()) for row in penalized(log_likelihoods(kind), "hf", 1.0)]
    average = np.asarray(greedy.scores) / np.asarray(greedy.lengths)
    assert np.all(beams.scores >= average - 1e-6)
    assert np.any(beams.scores > average + 1e-3)
    assert np.all(beams.scores <= np.array(optimum) + 1e-6)
