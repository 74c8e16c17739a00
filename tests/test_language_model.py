"""The friendly face of a trained run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_lite
from t5x_lite import LanguageModel
from t5x_lite.errors import InputError

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
