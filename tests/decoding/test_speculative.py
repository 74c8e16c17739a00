import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from t5x_lite.decoding import Generated, GenerationConfig, generate, speculative
from t5x_lite.decoding.sampling import probabilities, warpers
from t5x_lite.decoding.speculative import Acceptance
from t5x_lite.errors import InputError
from t5x_lite.models import PRESETS, TransformerConfig, build
from t5x_lite.models.transformer import Transformer

SIZES = (5, 2, 4, 1)  # tokens of each row's prompt
WIDTH, NEW, PROPOSED = 6, 14, 3  # a place more than the longest prompt needs
CONFIG = dataclasses.replace(
    PRESETS["gpt2"],
    vocab_size=31,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_decoder_layers=2,
    tied_head=False,  # a tied one of random numbers says the same token for ever
    # Not one too many: what stands at a position that the table does not have is NaN.
    max_positions=max(SIZES) + NEW - 1,
    bos_id=None,
    eos_id=None,
    decoder_start_id=0,
)
GREEDY = GenerationConfig(max_new_tokens=NEW, num_assistant_tokens=PROPOSED)


def prompts() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(2).integers(0, 31, (len(SIZES), WIDTH)).astype(np.int32)
    segments = (np.arange(WIDTH)[None, :] < np.array(SIZES)[:, None]).astype(np.int32)
    return {"decoder_input_tokens": tokens, "decoder_segment_ids": segments}


def near(params: Any, size: float) -> Any:
    """Parameters of a model that agrees with another one now and then."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + (size * rng.normal(size=x.shape)).astype(np.float32), params)


@pytest.fixture(scope="module")
def drafts(sharp_params: Any) -> dict[str, Any]:
    """Drafts of the model's own shape; the first is the model itself."""
    params = sharp_params(CONFIG)
    return {"the same": params, "near": near(params, 0.1), "another": sharp_params(CONFIG, 1)}


def decode(params: Any, draft_params: Any, config: GenerationConfig, **kwargs: Any) -> tuple[Generated, Acceptance]:
    model = build(CONFIG)
    return speculative.generate(model, params, model, draft_params, prompts(), config, **kwargs)


def assert_equal(out: Generated, wanted: Generated) -> None:
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_array_equal(out.lengths, wanted.lengths)
    np.testing.assert_allclose(out.scores, wanted.scores, rtol=1e-5)  # sums of a dozen floats, in passes of other sizes


# --- greedy ---------------------------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_model_alone(drafts: dict[str, Any]) -> None:
    params = drafts["the same"]
    wanted = generate(build(CONFIG), params, prompts(), GREEDY)
    assert len({tuple(row) for row in np.asarray(wanted.tokens).tolist()}) == len(SIZES)
    rounds = {}
    for name, draft_params in drafts.items():
        out, acceptance = decode(params, draft_params, GREEDY)
        assert_equal(out, wanted)
        # What is not the draft's is the one token that the model adds in each round but a last one that is cut short.
        added = np.asarray(out.lengths - acceptance.accepted)
        assert np.all((added == acceptance.rounds) | (added == acceptance.rounds - 1))
        rounds[name] = np.asarray(acceptance.rounds)
    # Three proposals and one more token in every round, so that even the cache of what was proposed last is right.
    np.testing.assert_array_equal(rounds["the same"], [-(-NEW // (PROPOSED + 1))] * len(SIZES))
    assert len(set(rounds["near"])) > 1  # rows do not advance together
    assert np.all(rounds["another"] > rounds["the same"])


def test_an_encoder_and_a_draft_of_another_shape(tiny_config: TransformerConfig, random_params: Any) -> None:
    config = dataclasses.replace(tiny_config, num_encoder_layers=1, num_decoder_layers=2)
    params = random_params(config)
    params["decoder"]["layers"]["cross_attention"]["out"]["kernel"] *= 20  # what is said depends on the input
    tokens = np.random.default_rng(0).integers(2, 256, (4, 9)).astype(np.int32)
    tokens[1, 5:] = 0
    batch = {"encoder_input_tokens": tokens}
    # Its first layer, so that it is right at times.
    few = jax.tree.map(lambda x: x[:1], params["decoder"]["layers"])
    draft_params = {**params, "decoder": {**params["decoder"], "layers": few}}
    draft = build(dataclasses.replace(config, num_decoder_layers=1))
    out, acceptance = speculative.generate(build(config), params, draft, draft_params, batch, GREEDY)
    assert_equal(out, generate(build(config), params, batch, GREEDY))
    assert 0 < np.sum(acceptance.accepted) < np.sum(out.lengths)


def test_processors_see_the_history_of_each_row_and_place(drafts: dict[str, Any]) -> None:
    params = drafts["the same"]
    config = dataclasses.replace(
        GREEDY,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        bad_words_ids=((25, 13), (16,)),
        begin_suppress_tokens=(23, 27),
        forced_bos_token_id=5,
        forced_eos_token_id=6,
        eos_token_id=(4, 15, 21),
        min_new_tokens=3,
    )
    wanted = generate(build(CONFIG), params, prompts(), config, vocab_size=30)
    assert len(set(np.asarray(wanted.lengths))) > 1
    for name, draft_params in drafts.items():
        out, acceptance = decode(params, draft_params, config, vocab_size=30)
        assert_equal(out, wanted)
        if name == "the same":  # the draft's proposals went through the same
            np.testing.assert_array_equal(acceptance.rounds, -(-out.lengths // (PROPOSED + 1)))


# --- the end --------------------------------------------------------------------------------------------------------


def test_a_row_ends_within_a_round(drafts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    apply = Transformer.apply

    def counting(self: Transformer, variables: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["method"] == "decode" and batch["decoder_input_tokens"].shape[1] == PROPOSED + 1:
            jax.debug.callback(lambda: passes.append(1))
        return apply(self, variables, batch, *args, **kwargs)

    monkeypatch.setattr(Transformer, "apply", counting)
    params = drafts["the same"]
    endless = np.asarray(generate(build(CONFIG), params, prompts(), GREEDY).tokens)
    # One row ends with a token, and another one with a pair of tokens.
    eos, pair = int(endless[0, 5]), endless[2, 6:8]
    table = np.zeros((1, 31, 3), np.int32)
    table[0, pair[0], :2], table[0, pair[1], 1], table[0, :, 2] = 1, 2, 2
    config = dataclasses.replace(GREEDY, eos_token_id=eos, stop_strings=("a text",))
    wanted = generate(build(CONFIG), params, prompts(), config, stop_table=jnp.asarray(table))
    assert len(set(np.asarray(wanted.lengths))) > 2
    for draft_params in drafts.values():
        passes.clear()
        out, acceptance = decode(params, draft_params, config, stop_table=jnp.asarray(table))
        assert_equal(out, wanted)
        jax.effects_barrier()
        assert len(passes) == np.max(acceptance.rounds)  # nothing is decoded when all rows have ended


# --- sampling -------------------------------------------------------------------------------------------------------

VOCAB, PLACES, ROWS = 6, 3, 10_000
DICE = dataclasses.replace(CONFIG, num_decoder_layers=1, vocab_size=VOCAB, max_positions=2 + PLACES - 1)
SAMPLE = GenerationConfig(max_new_tokens=PLACES, do_sample=True, temperature=0.8, top_k=5, num_assistant_tokens=2)


def sample(params: Any, draft_params: Any, seed: int = 7, **kwargs: Any) -> tuple[Generated, Acceptance]:
    batch = {"decoder_input_tokens": np.tile(np.array([[1, 2]], np.int32), (ROWS, 1))}
    model, config = build(DICE), dataclasses.replace(SAMPLE, seed=seed)
    return speculative.generate(model, params, model, draft_params, batch, config, **kwargs)


def distributions(params: Any) -> np.ndarray:
    """The probability of each token `[216, 3, 6]` after each start of each sequence of three."""
    sequences = np.stack(np.unravel_index(np.arange(VOCAB**PLACES), (VOCAB,) * PLACES), axis=1)
    tokens = np.concatenate([np.tile([[1, 2]], (len(sequences), 1)), sequences[:, :-1]], axis=1).astype(np.int32)
    logits = jax.jit(build(DICE).apply)({"params": params}, {"decoder_input_tokens": tokens})[:, 1:]
    return np.asarray(probabilities(logits.reshape(-1, VOCAB), warpers(SAMPLE))).reshape(-1, PLACES, VOCAB)


def test_the_distribution_is_the_model_s(sharp_params: Any) -> None:
    params, draft_params = sharp_params(DICE), sharp_params(DICE, 1)
    p, q = distributions(params), distributions(draft_params)
    assert 0.2 < np.sum(np.minimum(p, q)[0, 0]) < 0.7  # the draft is often wrong, and not always
    out, acceptance = sample(params, draft_params)
    sequences = np.ravel_multi_index(tuple(np.asarray(out.tokens).T), (VOCAB,) * PLACES)
    counts = np.bincount(sequences, minlength=VOCAB**PLACES)
    places = np.stack(np.unravel_index(np.arange(VOCAB**PLACES), (VOCAB,) * PLACES), axis=1)
    wanted = ROWS * np.prod(np.take_along_axis(p, places[..., None], axis=-1)[..., 0], axis=1, dtype=np.float64)
    assert np.all(counts[wanted == 0] == 0)
    rare = wanted < 5  # the test wants some of everything: these count as one
    observed, expected = (np.append(x[~rare], np.sum(x[rare])) for x in (counts, wanted))
    assert stats.chisquare(observed, expected * ROWS / np.sum(expected)).pvalue > 0.001
    assert np.sum(~rare) > 30
    # A proposal is accepted as often as p and q can agree (Leviathan et al. 2023, theorem 3.5): one round if both are.
    agreed = np.minimum(p, q)
    share = np.sum(agreed[0, 0] * np.sum(agreed[:: VOCAB**2, 1], axis=-1), dtype=np.float64)
    once = np.mean(np.asarray(acceptance.rounds) == 1)
    assert abs(once - share) < 4 * np.sqrt(share * (1 - share) / ROWS)


def test_a_draft_that_is_the_model_is_always_right(sharp_params: Any) -> None:
    params = sharp_params(DICE)
    out, acceptance = sample(params, params)
    assert len(np.unique(np.asarray(out.tokens), axis=0)) > 50
    np.testing.assert_array_equal(acceptance.rounds, 1)
    np.testing.assert_array_equal(acceptance.accepted, 2)


def test_what_is_sampled_depends_on_row_and_seed_alone(sharp_params: Any) -> None:
    params, draft_params = sharp_params(DICE), sharp_params(DICE, 1)
    tokens = np.asarray(sample(params, draft_params)[0].tokens)
    # The first half of the rows moves to the end, and others take its place.
    ids = np.roll(np.arange(ROWS), ROWS // 2)
    ids[: ROWS // 2] += 5 * ROWS
    moved = np.asarray(sample(params, draft_params, row_ids=jnp.asarray(ids))[0].tokens)
    np.testing.assert_array_equal(moved[ROWS // 2 :], tokens[: ROWS // 2])
    other = np.asarray(sample(params, draft_params, row_ids=jnp.arange(ROWS) + ROWS)[0].tokens)
    seed = np.asarray(sample(params, draft_params, seed=8)[0].tokens)
    for different in (other, seed):
        assert np.mean(np.all(different == tokens, axis=1)) < 0.5


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({"num_beams": 3}, "not 3 and 1"), ({"do_sample": True, "num_return_sequences": 2}, "not 1 and 2")],
)
def test_one_sequence_an_example(settings: dict[str, Any], numbers: str, drafts: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"needs num_beams 1 and num_return_sequences 1, {numbers}"):
        decode(drafts["the same"], drafts["near"], GenerationConfig(**settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 32}, "must have 31 tokens and no encoder as the model has, not 32 tokens and no encoder"),
        (
            {"num_encoder_layers": 2},
            "must have 31 tokens and no encoder as the model has, not 31 tokens and an encoder",
        ),
        (
            {"max_positions": 16},
            "prompt of 5 tokens and max_new_tokens 14 take 18 positions, but the draft model has 16",
        ),
    ],
)
def test_a_draft_that_does_not_fit(changes: dict[str, Any], message: str, drafts: dict[str, Any]) -> None:
    params = drafts["the same"]
    draft = build(dataclasses.replace(CONFIG, **changes))
    batch = {"decoder_input_tokens": prompts()["decoder_input_tokens"][:, :5]}
    with pytest.raises(InputError, match=message):
        speculative.generate(build(CONFIG), params, draft, params, batch, GREEDY)
