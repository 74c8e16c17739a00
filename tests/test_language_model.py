"""The friendly face of a trained run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_lite
from t5x_lite import LanguageModel
from t5x_lite.errors import InputError
from t5x_lite.language_model import _log_likelihood
from t5x_lite.models import build, preset
from t5x_lite.models.t5 import tokens_in_use
from t5x_lite.sharding import make_mesh

TEXTS = ["the cat <extra_id_0> the letters in winter.", "nobody <extra_id_0> at night.", "every student <extra_id_0>"]


@pytest.fixture(scope="module")
def lm(trained_run: Path) -> LanguageModel:
    return t5x_lite.load(trained_run)


def test_an_answer_does_not_depend_on_its_batch(lm: LanguageModel) -> None:
    together = lm.generate(TEXTS, max_new_tokens=8)
    assert together == [lm.generate([text], max_new_tokens=8)[0] for text in TEXTS]
    assert together == lm.generate(TEXTS, max_new_tokens=8, batch_size=2)
    assert lm.generate([], max_new_tokens=8) == []


def test_scores_equal_the_model_s_log_likelihood(lm: LanguageModel) -> None:
    targets = ["<extra_id_0> reads", "<extra_id_0> paints a green lamp", "<extra_id_0>"]
    scores = lm.score(TEXTS, targets)
    tokenizer = lm.require_tokenizer()
    for index, (source, target) in enumerate(zip(TEXTS, targets, strict=True)):
        inputs, outputs = ([*tokenizer.encode(text), 1] for text in (source, target))
        batch = {
            "encoder_input_tokens": jnp.array([inputs]),
            "decoder_input_tokens": jnp.array([[0, *outputs[:-1]]]),
            "decoder_segment_ids": jnp.ones((1, len(outputs)), jnp.int32),
        }
        logits = jax.nn.log_softmax(jax.jit(lm.model.apply)({"params": lm.params}, batch))[0]
        expected = sum(float(logits[position, token]) for position, token in enumerate(outputs))
        assert scores.num_tokens[index] == len(outputs)
        # Sums of a dozen float32 log-probabilities of size 5, in another order.
        assert scores.log_likelihood[index] == pytest.approx(expected, abs=1e-4)


def test_scoring_never_holds_all_logits() -> None:
    sizes = {"embed_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 128, "num_decoder_layers": 1}
    model = build(dataclasses.replace(preset("gpt2"), **sizes))
    batch = {f"decoder_{what}": jnp.zeros((8, 1024), jnp.int32) for what in ("input_tokens", "target_tokens")}
    batch["decoder_loss_weights"] = jnp.ones((8, 1024))
    compiled = _log_likelihood.lower(model, model.param_shapes(), batch).compile()
    # All of them are 1.6 GB of float32. A 16th is 103 MB, and on a CPU there is a transposed copy of it.
    assert compiled.memory_analysis().temp_size_in_bytes < 250e6


def test_embeddings_of_a_text_do_not_depend_on_padding(lm: LanguageModel) -> None:
    together = lm.embed(TEXTS)
    for text, embedding in zip(TEXTS, together, strict=True):
        assert embedding.shape == (len(lm.require_tokenizer().encode(text)) + 1, 32)
        np.testing.assert_allclose(lm.embed([text])[0], embedding, atol=1e-5)


def test_a_mesh_gives_the_same_answers(lm: LanguageModel, trained_run: Path) -> None:
    sharded = t5x_lite.load(trained_run, mesh="data:2,model:4")
    kernel = sharded.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 4
    assert sharded.generate(TEXTS, max_new_tokens=8) == lm.generate(TEXTS, max_new_tokens=8)


def test_loads_in_bfloat16(lm: LanguageModel, trained_run: Path) -> None:
    half = t5x_lite.load(trained_run, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    expected = lm.score(TEXTS, ["<extra_id_0> reads"] * 3).log_likelihood
    # bfloat16 has 8 bits of mantissa: 3 decimal digits, on sums of about 10 nats.
    np.testing.assert_allclose(half.score(TEXTS, ["<extra_id_0> reads"] * 3).log_likelihood, expected, rtol=0.03)


def test_never_emits_an_id_the_tokenizer_does_not_know(lm: LanguageModel) -> None:
    params = jax.tree.map(lambda x: x, lm.params)
    assert lm.require_tokenizer().vocab_size == 384  # as many as the model: ask for fewer
    batch = {"encoder_input_tokens": np.full((2, 5), 7, np.int32)}
    tokens = t5x_lite.decoding.generate(
        lm.model, params, batch, t5x_lite.GenerationConfig(max_new_tokens=8), vocab_size=200
    ).tokens
    free = lm.generate_tokens(batch, t5x_lite.GenerationConfig(max_new_tokens=8)).tokens
    assert int(tokens.max()) < 200 <= int(free.max())  # sentinels, ids 284 and up, are what it would rather say


def test_what_is_padding_in_a_published_vocabulary() -> None:
    sizes = {"flan-t5-small": 32100, "mt5-small": 250100, "umt5-small": 256300, "byt5-small": None, "gpt2": None}
    assert {name: tokens_in_use(preset(name)) for name in sizes} == sizes


def test_the_padding_of_t5_s_vocabulary_is_never_generated(tiny_config: Any, random_params: Any) -> None:
    batch = {"encoder_input_tokens": np.full((2, 5), 7, np.int32)}
    few = t5x_lite.GenerationConfig(max_new_tokens=3)
    for size, family, least in ((32128, "t5", 0), (32127, "t5", 32100), (32128, "bart", 32100)):
        config = dataclasses.replace(
            tiny_config, vocab_size=size, family=family, num_encoder_layers=1, num_decoder_layers=1
        )
        params = random_params(config)
        params["head"]["kernel"][:, 32100:] *= 100.0  # what it would say if it might
        tokens = (
            LanguageModel(build(config), params, None, make_mesh("data:1", jax.devices()[:1]))
            .generate_tokens(batch, few)
            .tokens
        )
        assert least <= int(tokens.min()) <= int(tokens.max()) < (size if least else 32100)


def test_errors(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        t5x_lite.load(tmp_path)
    with pytest.raises(InputError, match="2 inputs for 1 targets"):
        lm.score(["a", "b"], ["c"])
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, not 0"):
        lm.generate(["a"], max_new_tokens=0)
    bare = LanguageModel(lm.model, lm.params, None, lm.mesh)
    with pytest.raises(InputError, match="no tokenizer"):
        bare.generate(["a"])


# --- generation: settings, buckets, pieces --------------------------------------------------------------------------


def with_defaults(lm: LanguageModel, **generation: Any) -> LanguageModel:
    """The same model, published with these settings."""
    return LanguageModel(lm.model, lm.params, lm.tokenizer, lm.mesh, generation=generation)


def test_compiles_once_for_each_bucket(lm: LanguageModel) -> None:
    fresh = with_defaults(lm)
    vocabulary = lm.require_tokenizer()
    short, long = "the cat", "the letters in winter " * 4
    lengths = [len(vocabulary.encode(text)) + 1 for text in (short, long)]
    assert lengths[0] <= 16 < 64 < lengths[1] <= 128
    for texts in ([short], [short[:3]], [short] * 3, [short[:5]] * 4, [long] * 3, [short, long, short], [short] * 2):
        fresh.generate(texts, max_new_tokens=4)
    # (1, 16), (4, 16), (4, 128), (2, 16); a seed and a caller's own arrays of any such shape compile nothing.
    assert fresh.compilations == 4
    fresh.generate_tokens({"encoder_input_tokens": np.full((3, 11), 7)}, t5x_lite.GenerationConfig(max_new_tokens=4))
    fresh.generate([short], max_new_tokens=4, seed=5)
    assert fresh.compilations == 4
    fresh.generate([short], max_new_tokens=5)
    assert fresh.compilations == 5


def test_the_checkpoint_s_own_settings_are_defaults(lm: LanguageModel) -> None:
    beams = with_defaults(lm, num_beams=3, length_penalty=2.0, max_new_tokens=8)
    assert beams.generate(TEXTS) == lm.generate(TEXTS, num_beams=3, length_penalty=2.0, max_new_tokens=8)
    assert beams.generate(TEXTS, num_beams=1) == lm.generate(TEXTS, max_new_tokens=8)
    batch = {"encoder_input_tokens": np.full((2, 5), 7, np.int32)}
    wanted = lm.generate_tokens(batch, beams.generation_config())
    np.testing.assert_array_equal(beams.generate_tokens(batch).tokens, wanted.tokens)


def test_new_parameters_take_effect(lm: LanguageModel) -> None:
    other = with_defaults(lm)
    before = other.generate(TEXTS, max_new_tokens=8)
    other.params = jax.tree.map(lambda x: x[..., ::-1], lm.params)
    assert other.generate(TEXTS, max_new_tokens=8) != before


def test_samples_depend_on_the_seed_and_the_number_of_the_text_alone(lm: LanguageModel) -> None:
    settings = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5}
    together = lm.generate_scored(TEXTS, **settings)
    apart = [lm.generate_scored([text], row_ids=[n], **settings)[0] for n, text in enumerate(TEXTS)]
    assert [a[0].text for a in together] == [a[0].text for a in apart]
    # Float32 sums over a batch of another shape.
    np.testing.assert_allclose([a[0].score for a in together], [a[0].score for a in apart], atol=1e-4)
    assert lm.generate(TEXTS, batch_size=1, **settings) == lm.generate(TEXTS, **settings)
    assert lm.generate(TEXTS, seed=1, **settings) != lm.generate(TEXTS, **settings)
    same = lm.generate([TEXTS[0]] * 3, **settings)
    assert len(set(same)) == 3  # whoever asks for one text three times wants three answers


def test_several_answers_to_each_text(lm: LanguageModel) -> None:
    several = lm.generate_scored(TEXTS, max_new_tokens=6, num_beams=4, num_return_sequences=3)
    assert [len(answers) for answers in several] == [3, 3, 3]
    flat = lm.generate(TEXTS, max_new_tokens=6, num_beams=4, num_return_sequences=3)
    assert flat == [answer.text for answers in several for answer in answers]
    best = lm.generate_scored(TEXTS, max_new_tokens=6, num_beams=4)
    for answers, (one,) in zip(several, best, strict=True):
        assert answers[0].text == one.text
        assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
        assert 1 <= one.num_tokens <= 6


@pytest.mark.parametrize("tokens_at_once", [1, 3, 100])
def test_streamed_pieces_are_the_answer(lm: LanguageModel, tokens_at_once: int) -> None:
    for text in TEXTS:
        pieces = list(lm.stream(text, max_new_tokens=8, tokens_at_once=tokens_at_once))
        assert "".join(pieces) == lm.generate([text], max_new_tokens=8)[0]
        assert all(pieces)
        assert len(pieces) > 1 or tokens_at_once > 1
    sampled = {"max_new_tokens": 6, "do_sample": True}
    assert "".join(lm.stream(TEXTS[0], **sampled)) == lm.generate(TEXTS[:1], **sampled)[0]


def test_a_stop_string_ends_the_answer(lm: LanguageModel) -> None:
    whole = lm.generate(TEXTS, max_new_tokens=8)
    # Two characters that stand in the middle of an answer, over the border of two tokens or not.
    index, text = next((n, text) for n, text in enumerate(whole) if len(text.strip()) > 6)
    stop = text[3:5]
    stopped = lm.generate(TEXTS, max_new_tokens=8, stop_strings=[stop])
    assert stop in stopped[index]
    assert len(stopped[index]) < len(text)
    assert all(full.startswith(short) for short, full in zip(stopped, whole, strict=True))


def test_what_cannot_be_generated_is_said_in_one_line(lm: LanguageModel) -> None:
    for settings, message in (
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"temperature": 0.0, "do_sample": True}, "temperature must be 1e-30 to 1e30"),
        ({"temperature": 0.5}, "temperature 0.5 needs do_sample=True"),
        ({"num_beams": 4, "do_sample": True}, "num_beams 4 and do_sample=True exclude each other"),
        ({"num_beam": 4}, "'num_beam' is unknown; did you mean 'num_beams'"),
    ):
        with pytest.raises(InputError, match=message):
            lm.generate(TEXTS, **settings)
    with pytest.raises(InputError, match="num_beams 2 cannot be streamed"):
        lm.stream(TEXTS[0], num_beams=2)
    with pytest.raises(InputError, match="tokens_at_once must be at least 1, not 0"):
        lm.stream(TEXTS[0], tokens_at_once=0)
    for token in (384, -1):
        with pytest.raises(InputError, match=f"token id {token}: the model has embeddings for 384"):
            lm.generate_tokens({"encoder_input_tokens": np.array([[5, token]])})
    lm.check_input(TEXTS[0])


def test_one_token(lm: LanguageModel) -> None:
    for settings in ({}, {"num_beams": 3}, {"do_sample": True}):
        answers = lm.generate_scored(TEXTS, max_new_tokens=1, **settings)
        assert [answer.num_tokens for (answer,) in answers] == [1, 1, 1]
    assert "".join(lm.stream(TEXTS[0], max_new_tokens=1)) == lm.generate(TEXTS[:1], max_new_tokens=1)[0]


def test_bad_calls_are_refused_in_one_line(lm: LanguageModel) -> None:
    tokens = np.full((2, 5), 7, np.int32)
    start, none = np.zeros((2, 1), np.int32), np.array([[1], [0]])
    for batch, message in (
        ({}, "the batch needs encoder_input_tokens, it has nothing"),
        ({"decoder_input_tokens": start}, "the batch needs encoder_input_tokens, it has decoder_input_tokens"),
        (
            {"encoder_input_tokens": tokens, "decoder_input_tokens": start, "decoder_segment_ids": none},
            "the prompt of row 1 is empty",
        ),
    ):
        with pytest.raises(InputError, match=message):
            lm.generate_tokens(batch)
    for given, message in (
        ([tokens], "a batch must be a dict of arrays, not a list"),
        (
            {"encoder_input_token": tokens},
            r"the batch has 'encoder_input_token', allowed: .*mean 'encoder_input_tokens",
        ),
        (
            {"encoder_segment_ids": tokens[:, :4]},
            r"encoder_segment_ids .* encoder_input_tokens, \[2, 5\], not \[2, 4\]",
        ),
        ({"encoder_segment_ids": tokens[:1]}, r"encoder_segment_ids .* encoder_input_tokens, \[2, 5\], not \[1, 5\]"),
        ({"decoder_segment_ids": tokens}, "decoder_segment_ids needs decoder_input_tokens, which the batch has not"),
        ({"decoder_input_tokens": start[:1]}, "decoder_input_tokens has 1 rows, but encoder_input_tokens has 2"),
        ({"decoder_input_tokens": start[:, :0]}, r"decoder_input_tokens .* both at least 1, not \[2, 0\]"),
        ({"encoder_input_tokens": tokens[:0]}, r"encoder_input_tokens .* both at least 1, not \[0, 5\]"),
        ({"encoder_input_tokens": tokens[0]}, r"encoder_input_tokens must be \[rows, length\], .* not \[5\]"),
        ({"encoder_input_tokens": tokens[None]}, r"encoder_input_tokens must be .* not \[1, 2, 5\]"),
        ({"encoder_input_tokens": [[5, 6], [7]]}, r"encoder_input_tokens must be .* its rows have different lengths"),
        ({"encoder_input_tokens": tokens * 1.0}, "encoder_input_tokens must be whole numbers, not float64"),
    ):
        with pytest.raises(InputError, match=message) as error:
            lm.generate_tokens({"encoder_input_tokens": tokens} | given if isinstance(given, dict) else given)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(InputError, match=r"config must be a GenerationConfig, not {'num_beams': 2} \(dict\)"):
        lm.generate_tokens({"encoder_input_tokens": tokens}, {"num_beams": 2})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"draft must be a LanguageModel, not a run \(str\)"):
        lm.generate_tokens({"encoder_input_tokens": tokens}, draft="a run")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="row_ids must be 2 numbers, one for each row, not 3"):
        lm.generate_tokens({"encoder_input_tokens": tokens}, row_ids=[0, 1, 2])
    for name in ("decoder_start_token_id", "eos_token_id", "forced_bos_token_id"):
        with pytest.raises(InputError, match="token id 100000: the model has embeddings for 384"):
            lm.generate(TEXTS, **{name: 100000})
        with pytest.raises(InputError, match="token id 100000: the model has embeddings for 384"):
            lm.stream(TEXTS[0], **{name: 100000})
    every: Any = [*range(384)]
    for settings in ({"suppress_tokens": every}, {"suppress_tokens": every[5:], "begin_suppress_tokens": every[:5]}):
        with pytest.raises(InputError, match="suppress_tokens and begin_suppress_tokens leave none of the 384 ids"):
            lm.generate(TEXTS, **settings)
        with pytest.raises(InputError, match="leave none of the 384 ids"):
            lm.generate_tokens({"encoder_input_tokens": tokens}, t5x_lite.GenerationConfig(**settings))
    for size in (0, -1):
        for call in (lm.generate, lm.embed, lambda texts, batch_size: lm.score(texts, texts, batch_size=batch_size)):
            with pytest.raises(InputError, match=f"batch_size must be at least 1, not {size}"):
                call(TEXTS, batch_size=size)
    with pytest.raises(InputError, match=r"generate takes texts, not None \(NoneType\)"):
        lm.generate([None])


# --- drafts and int8 ------------------------------------------------------------------------------------------------


def test_a_draft_changes_nothing_but_the_time(lm: LanguageModel, trained_run: Path) -> None:
    draft = t5x_lite.load(trained_run / "checkpoints" / "4")  # the same model, eight steps earlier
    assert lm.generate(TEXTS, max_new_tokens=8, draft=draft) == lm.generate(TEXTS, max_new_tokens=8)
    with pytest.raises(InputError, match="num_beams 1 and num_return_sequences 1, not 2 and 1"):
        lm.generate(TEXTS, max_new_tokens=8, draft=draft, num_beams=2)
    elsewhere = t5x_lite.load(trained_run, mesh="model:8")
    with pytest.raises(InputError, match=r"the draft model is on mesh .*model:8.*, the model on"):
        lm.generate(TEXTS, draft=elsewhere)


def test_loads_in_int8(lm: LanguageModel, trained_run: Path) -> None:
    small = t5x_lite.load(trained_run, quantization="int8")
    spread = t5x_lite.load(trained_run, quantization="int8", mesh="data:2,model:4")
    kernel = small.params["decoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert kernel.dtype == jnp.int8
    assert small.params["decoder"]["layers"]["mlp"]["down"]["kernel"].dtype == jnp.float32
    targets = ["<extra_id_0> reads", "<extra_id_0> paints a green lamp", "<extra_id_0>"]
    exact = lm.score(TEXTS, targets).log_likelihood
    # A weight is off by 1/254 of the largest in its column at most; errors of many weights average out.
    np.testing.assert_allclose(small.score(TEXTS, targets).log_likelihood, exact, rtol=0.01)
    np.testing.assert_allclose(
        spread.score(TEXTS, targets).log_likelihood, small.score(TEXTS, targets).log_likelihood, rtol=1e-5
    )
    assert len(small.generate(TEXTS, max_new_tokens=4)) == 3
    with pytest.raises(InputError, match="quantization must be int8 or None, not 'int4'"):
        t5x_lite.load(trained_run, quantization="int4")
