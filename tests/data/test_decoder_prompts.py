"""A decoder alone is asked with the very tokens that it was trained on: prompt, special tokens, and nothing else."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite import LanguageModel
from t5x_lite.data.encoders import ChatEncoder
from t5x_lite.data.examples import InMemory, Records
from t5x_lite.data.objectives import Chat, Objective, TextToText, Vocabulary
from t5x_lite.data.packing import Batch
from t5x_lite.data.pipeline import Component, Dataset, plan_rows
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.data.tokens import tokenize
from t5x_lite.models import build
from t5x_lite.sharding import make_mesh
from t5x_lite.training.step import batch_loss

PROMPT, ANSWER = "two and two", " is four"


class Prefixed(ByteTokenizer):
    def __init__(self, prefix: tuple[int, ...]) -> None:
        super().__init__()
        self.prefix_ids = prefix


@pytest.fixture(params=[(), (258,), (258, 257)])
def lm(request, tiny_config, sharp_params) -> LanguageModel:
    config = dataclasses.replace(
        tiny_config, num_encoder_layers=0, num_decoder_layers=2, vocab_size=384, decoder_start_id=258
    )
    return LanguageModel(build(config), sharp_params(config), Prefixed(request.param), make_mesh(""))


def batch_of(lm: LanguageModel, objective: Objective, *texts: Any, packed: bool = False) -> Batch:
    tokenizer = lm.require_tokenizer()
    source = InMemory({name: tokenize(side, tokenizer) for name, side in zip(objective.arrays, texts, strict=True)})
    vocabulary = Vocabulary.of(tokenizer)
    _, layout = plan_rows(objective, 64, None, vocabulary, lm.config.decoder_start_id)
    examples = Records(source, np.arange(len(texts[0])), objective, vocabulary)
    return Dataset((Component(examples),), layout, 1, 0, packed).batch(0)


def loss_without_eos(lm: LanguageModel, batch: Batch) -> float:
    weights = batch["decoder_loss_weights"] * (batch["decoder_target_tokens"] != lm.config.eos_id)
    sums = jax.jit(lambda params, batch: batch_loss(lm.model, params, batch))(
        lm.params, {**batch, "decoder_loss_weights": weights}
    )
    return float(sums.cross_entropy)


@pytest.mark.parametrize("prompt", [PROMPT, ""])
@pytest.mark.parametrize("packed", [False, True])
def test_the_score_of_a_pair_is_its_training_loss(lm: LanguageModel, prompt: str, packed: bool) -> None:
    copies = 2 if packed else 1
    batch = batch_of(lm, TextToText(64, 64, "decoder"), [prompt] * copies, [ANSWER] * copies, packed=packed)
    assert batch["decoder_segment_ids"].max() == copies
    # Sums of some twenty float32 logarithms, in rows of another length.
    score = lm.score([prompt], [ANSWER]).log_likelihood[0]
    assert score * copies == pytest.approx(-loss_without_eos(lm, batch), rel=1e-5)


def test_a_chat_goes_on_as_it_was_learnt(lm: LanguageModel) -> None:
    encoder = ChatEncoder(lm.require_tokenizer())
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    (encoded,) = encoder([("f:1", {"messages": messages})])
    vocabulary = Vocabulary.of(lm.require_tokenizer())
    example = Chat(64, 64)(*map(np.array, encoded.features), None, vocabulary)
    _, layout = plan_rows(Chat(64, 64), 64, None, vocabulary, lm.config.decoder_start_id)
    batch = layout([[example]])
    first = int(np.flatnonzero(batch["decoder_loss_weights"][0])[0])
    assert batch["decoder_input_tokens"][0, : first + 1].tolist() == encoder.prompt(messages[:1])
    (text,) = [f"User:\n{PROMPT}\nAssistant:\n"]
    assert loss_without_eos(lm, batch) == pytest.approx(-lm.score([text], [ANSWER]).log_likelihood[0], rel=1e-5)
