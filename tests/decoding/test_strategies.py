"""Every way to choose tokens, through the real model and the real loop: scores, company, seeds, meshes."""

import dataclasses
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite.decoding import Generated, GenerationConfig, generate
from t5x_lite.decoding.stopping import stop_table
from t5x_lite.models import PRESETS, TransformerConfig, build
from t5x_lite.sharding import make_mesh, put_batch, tree_shardings

loop = importlib.import_module("t5x_lite.decoding.generate")  # whose name the function has taken

PROMPTS = (1, 5, 2, 5)  # tokens of each row's prompt
ROWS, WIDTH, NEW_TOKENS = len(PROMPTS), max(PROMPTS), 8
ENDS = (1, 20, 40)  # some sequences end, and some do not
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=ENDS)
SAMPLING = dataclasses.replace(GREEDY, do_sample=True, num_return_sequences=3, temperature=0.9, top_p=0.95)
BEAMS = dataclasses.replace(GREEDY, num_beams=4, num_return_sequences=3, length_penalty=0.6)
SETTINGS = {
    "greedy": GREEDY,
    "greedy, int8": dataclasses.replace(GREEDY, cache_dtype="int8"),
    "sampling": SAMPLING,
    "beams": BEAMS,
    "t5 beams": dataclasses.replace(BEAMS, length_penalty_style="t5", length_penalty=1.5),
}

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its parameters, and rows to be continued."""

    config: TransformerConfig
    params: Any
    batch: Batch

    def run(self, config: GenerationConfig, batch: Batch | None = None, **kwargs: Any) -> Generated:
        made = generate(build(self.config), self.params, self.batch if batch is None else batch, config, **kwargs)
        return jax.tree.map(np.asarray, made)


@pytest.fixture(scope="module")
def problem(tiny_config: TransformerConfig, random_params: Any, sharp_params: Any) -> Callable[[str], Problem]:
    """A function `kind -> Problem`, with an encoder ("pair") or a decoder alone ("alone"); prompts differ in length."""
    sizes = {"vocab_size": 64, "embed_dim": 32, "num_heads": 8, "head_dim": 4, "mlp_dim": 64, "num_decoder_layers": 2}
    configs = {
        "pair": dataclasses.replace(tiny_config, vocab_size=64, num_encoder_layers=1, num_decoder_layers=2),
        # Not one position too many: whatever reads a row that the table does not have gives NaN.
        "alone": dataclasses.replace(
            PRESETS["gpt2"],
            **sizes,
            max_positions=WIDTH + NEW_TOKENS - 1,
            tied_head=False,  # a tied head of random numbers says one and the same token again and again
            bos_id=None,
            eos_id=1,
            decoder_start_id=0,
        ),
    }

    @cache
    def make(kind: str) -> Problem:
        rng = np.random.default_rng(0)
        segments = (np.arange(WIDTH) < np.array(PROMPTS)[:, None]).astype(np.int32)
        prompts = rng.integers(2, 64, (ROWS, WIDTH)).astype(np.int32)  # and in their padding
        prompts[:, 0] = 0
        batch = {"decoder_input_tokens": prompts, "decoder_segment_ids": segments}
        if kind == "pair":
            inputs = rng.integers(2, 64, (ROWS, 9)).astype(np.int32)
            inputs[1, 5:] = 0
            batch["encoder_input_tokens"] = inputs
        draw = random_params if kind == "pair" else sharp_params
        return Problem(configs[kind], draw(configs[kind]), batch)

    return make


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("pair", "greedy"),
        ("pair", "sampling"),
        ("pair", "beams"),
        ("pair", "t5 beams"),
        ("alone", "sampling"),
        ("alone", "beams"),
        ("alone", "t5 beams"),
    ],
)
def test_scores_are_what_the_model_says_of_the_whole_text(kind: str, setting: str, problem: Any) -> None:
    case, config = problem(kind), SETTINGS[setting]
    made = case.run(config)
    several = config.num_return_sequences
    assert made.tokens.shape == (ROWS * several, NEW_TOKENS)
    assert len({*made.lengths.tolist()}) > 1
    assert len({tuple(row) for row in made.tokens.tolist()}) > ROWS * several / 2

    def repeated(array: np.ndarray) -> np.ndarray:
        return np.tile(np.repeat(array, several, axis=0), (3 // several, *(1,) * (array.ndim - 1)))

    # The same shapes for all settings, and so one program.
    tokens, lengths = (
        np.tile(array, (3 // several, *(1,) * (array.ndim - 1))) for array in (made.tokens, made.lengths)
    )
    prompts, sizes = repeated(case.batch["decoder_input_tokens"]), repeated(np.array(PROMPTS))
    inputs = np.zeros((3 * ROWS, WIDTH + NEW_TOKENS - 1), np.int32)
    for row, (prompt, size, new) in enumerate(zip(prompts, sizes, tokens, strict=True)):
        inputs[row, :size] = prompt[:size]
        inputs[row, size : size + NEW_TOKENS - 1] = new[:-1]
    batch = {"decoder_input_tokens": inputs, "decoder_segment_ids": np.ones_like(inputs)}
    if kind == "pair":
        batch["encoder_input_tokens"] = repeated(case.batch["encoder_input_tokens"])
    logs = np.asarray(jax.nn.log_softmax(jax.jit(build(case.config).apply)({"params": case.params}, batch)))
    places = np.arange(NEW_TOKENS)
    gained = logs[np.arange(3 * ROWS)[:, None], sizes[:, None] - 1 + places, tokens]
    wanted = np.sum(gained * (places < lengths[:, None]), axis=1)[: ROWS * several]
    if setting == "beams":
        wanted /= made.lengths**0.6
    if setting == "t5 beams":
        # What was cut off counts where nothing has ended, and is not penalised.
        ended = np.isin(made.tokens[np.arange(ROWS * several), made.lengths - 1], ENDS)
        assert 0 < np.sum(made.lengths == 0) < ROWS * several / 2
        wanted = np.where(ended, wanted / ((5 + made.lengths) / 6) ** 1.5, wanted)
        wanted = np.where(made.lengths == 0, -np.inf, wanted)
    np.testing.assert_allclose(made.scores, wanted, rtol=1e-4)  # sums of eight floats
    if config.num_beams > 1:
        ranked = made.scores.reshape(ROWS, several)
        assert np.all(ranked[:, :-1] >= ranked[:, 1:])


def test_the_cache_has_the_numbers_that_it_is_asked_for(problem: Any) -> None:
    exact, rough = (problem("pair").run(SETTINGS[setting]) for setting in ("greedy", "greedy, int8"))
    off = np.abs(rough.scores / exact.scores - 1.0)
    assert np.array_equal(rough.tokens, exact.tokens)
    # Rounding keys and values moves a logit by some hundredths: see test_cached_families.py.
    assert 1e-4 < np.max(off) < 0.02


# --- company --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["sampling", "beams"])
@pytest.mark.parametrize("kind", ["pair", "alone"])
def test_a_row_is_the_same_alone_and_in_any_company(kind: str, setting: str, problem: Any) -> None:
    case, config = problem(kind), SETTINGS[setting]
    together = case.run(config, row_ids=np.array([8, 3, 5, 0]))
    tokens = together.tokens.reshape(ROWS, -1, NEW_TOKENS)
    scores = together.scores.reshape(ROWS, -1)

    alone = {name: array[2:3] for name, array in case.batch.items()}
    alone |= {name: alone[name][:, : PROMPTS[2]] for name in ("decoder_input_tokens", "decoder_segment_ids")}
    alone_made = case.run(config, alone, row_ids=np.array([5]))
    np.testing.assert_array_equal(alone_made.tokens, tokens[2])
    np.testing.assert_allclose(alone_made.scores, scores[2], rtol=1e-4)

    # Other places in the batch, and other neighbours.
    order = np.array([2, 0, 0, 1])
    moved = case.run(config, {name: array[order] for name, array in case.batch.items()}, row_ids=np.array([5, 8, 9, 3]))
    moved_tokens = moved.tokens.reshape(tokens.shape)
    for place in (0, 1, 3):
        np.testing.assert_array_equal(moved_tokens[place], tokens[order[place]])
    # The same text with another number is drawn anew.
    assert np.array_equal(moved_tokens[1], moved_tokens[2]) == (setting == "beams")


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_a_seed_says_what_is_drawn_and_compiles_nothing(problem: Any) -> None:
    case = problem("alone")
    first = case.run(SAMPLING)
    programs = loop._generate._cache_size()
    again = case.run(dataclasses.replace(SAMPLING, seed=0))
    others = [case.run(dataclasses.replace(SAMPLING, seed=seed)).tokens for seed in (1, 2, 2**32 - 1)]
    assert loop._generate._cache_size() == programs
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.scores, again.scores)
    drawn = {tokens.tobytes() for tokens in (first.tokens, *others)}
    assert len(drawn) == 4
    # And the sequences of a row are drawn independently.
    assert len({tuple(row) for row in first.tokens.tolist()}) > 2 * ROWS


def test_several_sequences_are_those_that_would_be_drawn_one_by_one(
    problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem("alone")
    together = case.run(dataclasses.replace(SAMPLING, seed=9)).tokens.reshape(ROWS, 3, NEW_TOKENS)

    def keys(seed: jax.Array, row_ids: jax.Array, sequences: int) -> jax.Array:
        def one(row_id: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row_id % 100), row_id // 100)

        assert sequences == 1
        return jax.vmap(one)(row_ids)

    monkeypatch.setattr(loop, "row_keys", keys)
    # A number of tokens that no other test asks for, so that this is compiled anew.
    single = dataclasses.replace(SAMPLING, seed=9, num_return_sequences=1, max_new_tokens=NEW_TOKENS - 1)
    for number in range(3):
        made = case.run(single, row_ids=np.arange(ROWS) + 100 * number)
        np.testing.assert_array_equal(made.tokens, together[:, number, :-1])


# --- stop strings ---------------------------------------------------------------------------------------------------

PIECES = [f"<{token}>".encode() for token in range(64)]


def text_of(tokens: np.ndarray) -> bytes:
    return b"".join(PIECES[token] for token in tokens)


@pytest.mark.parametrize("setting", ["greedy", "beams"])
def test_a_stop_string_ends_a_sequence_wherever_it_is(setting: str, problem: Any) -> None:
    case = problem("pair")
    # Of beams, short ones win then.
    config = dataclasses.replace(SETTINGS[setting], **({"length_penalty": 0.0} if setting == "beams" else {}))
    free = case.run(SETTINGS["greedy"])
    first, second = (free.tokens[row] for row in np.flatnonzero(free.lengths == NEW_TOKENS)[:2])
    # One begins and ends in the middle of a token, the other ends with one and is longer.
    stops = (text_of(first[2:4])[1:-1].decode(), text_of(second[1:4])[2:].decode())
    made = case.run(dataclasses.replace(config, stop_strings=stops), stop_table=stop_table(stops, PIECES))

    def stopped(tokens: np.ndarray) -> bool:
        return any(stop.encode() in text_of(tokens) for stop in stops)

    by_text = 0
    for tokens, length in zip(made.tokens, made.lengths, strict=True):
        assert not stopped(tokens[: length - 1])
        assert length == NEW_TOKENS or stopped(tokens[:length]) or tokens[length - 1] in ENDS
        assert np.all(tokens[length:] == case.config.pad_id)
        by_text += stopped(tokens[:length])
    assert by_text >= 2
    if setting == "greedy":
        for tokens, length, whole in zip(made.tokens, made.lengths, free.tokens, strict=True):
            np.testing.assert_array_equal(tokens[:length], whole[:length])


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mesh_text", "setting"),
    [
        ("pair", "data:4,model:2", "greedy"),
        ("pair", "data:2,model:4", "greedy, int8"),
        *(
            (kind, mesh_text, setting)
            for kind in ("pair", "alone")
            for setting in ("beams", "sampling")
            for mesh_text in ("data:4,model:2", "data:2,model:4")
        ),
        ("alone", "data:4,model:2", "greedy"),
        ("alone", "data:2,model:4", "greedy"),
    ],
)
def test_a_mesh_generates_the_same(kind: str, mesh_text: str, setting: str, problem: Any) -> None:
    case, config = problem(kind), SETTINGS[setting]
    wanted = case.run(config)
    mesh = make_mesh(mesh_text)
    model = build(case.config)
    spread = jax.device_put(case.params, tree_shardings(mesh, model.logical_axes(), case.params))
    with jax.set_mesh(mesh):
        got = generate(model, spread, put_batch(mesh, case.batch), config)
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.lengths, wanted.lengths)
    np.testing.assert_allclose(got.scores, wanted.scores, rtol=1e-4)  # sums over devices, in another order


def test_layers_of_their_own_decode_the_same(problem: Any) -> None:
    case = problem("alone")
    stacked = case.run(BEAMS)
    unstacked = build(case.config).unstacked(case.params)
    assert isinstance(unstacked["decoder"]["layers"], tuple)
    split = dataclasses.replace(case, params=unstacked).run(BEAMS)
    np.testing.assert_array_equal(split.tokens, stacked.tokens)
    np.testing.assert_array_equal(split.lengths, stacked.lengths)
    # Kernels turned ahead of the compiled function need not be summed in the same order as those turned inside it.
    np.testing.assert_allclose(split.scores, stacked.scores, rtol=1e-6)
