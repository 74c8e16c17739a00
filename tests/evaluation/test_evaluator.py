"""The evaluator: token-weighted, padding left out, bytes counted on the text."""

import math

import numpy as np
import pytest

from t5x_lite import sharding
from t5x_lite.data.objectives import SpanCorruption
from t5x_lite.data.pipeline import text_dataset, text_to_text_dataset
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError
from t5x_lite.evaluation.evaluator import evaluate, generation_metrics, target_texts
from t5x_lite.models.config import TransformerConfig
from t5x_lite.training.losses import LossSums


def eval_step(params: float, batch) -> LossSums:
    """A model that pays `params` nats for every target token and gets the first of each row right."""
    weight = float(batch["decoder_loss_weights"].sum())
    correct = float((batch["decoder_loss_weights"].sum(axis=1) > 0).sum())
    return LossSums(params * weight, 0.0, correct, weight, 0.0)  # type: ignore[arg-type]


def test_totals_over_batches_and_padded_rows() -> None:
    pairs = [("a", "xy"), ("b", "é"), ("c", "z")]
    dataset = text_to_text_dataset(pairs, ByteTokenizer(), 8, 8, batch_size=2, seed=0)
    mesh = sharding.make_mesh("data:1", sharding.jax.devices()[:1])
    metrics = evaluate(eval_step, 2.0, dataset.eval_batches(), ByteTokenizer(), mesh)
    tokens = 3 + 3 + 2  # bytes and EOS of every target
    assert metrics["target_tokens"] == tokens
    assert metrics["loss"] == pytest.approx(2.0)
    assert metrics["perplexity"] == pytest.approx(math.exp(2.0))
    assert metrics["accuracy"] == pytest.approx(3 / tokens)
    # Of the 8 target tokens 3 are EOS, and the 5 bytes are all different.
    assert metrics["unigram_entropy"] == pytest.approx(3 / 8 * math.log(8 / 3) + 5 / 8 * math.log(8))
    assert metrics["bits_per_byte"] == pytest.approx(2.0 * tokens / math.log(2) / 5)
    first = evaluate(eval_step, 2.0, dataset.eval_batches(), ByteTokenizer(), mesh, limit=1)
    assert first["target_tokens"] == 6


def test_sentinels_are_no_text() -> None:
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    dataset = text_dataset([text], ByteTokenizer(), SpanCorruption(), 32, None, 1, 0)
    batch = next(iter(dataset.eval_batches()))
    (with_sentinels,) = target_texts(batch, ByteTokenizer())
    (without,) = target_texts(batch, ByteTokenizer(), sentinels=False)
    assert "<extra_id_0>" in with_sentinels
    assert set(without) <= set(text)
    assert len(without) == round(len(text) * 0.15)
    assert np.sum(batch["decoder_loss_weights"]) > len(without)


def test_nothing_to_evaluate_is_an_error() -> None:
    mesh = sharding.make_mesh("data:1", sharding.jax.devices()[:1])
    with pytest.raises(InputError, match="no examples to evaluate"):
        evaluate(eval_step, 1.0, [], ByteTokenizer(), mesh)


def test_exact_match_is_of_what_the_tokenizer_can_write() -> None:
    class Echo:
        """Answers with its input; its tokenizer knows no upper case."""

        class Lower(ByteTokenizer):
            def encode(self, text: str) -> list[int]:
                return super().encode(text.lower())

        def require_tokenizer(self) -> ByteTokenizer:
            return self.Lower()

        def __init__(self, layers: int = 1) -> None:
            self.config = TransformerConfig(num_encoder_layers=layers)

        def generate(
            self, texts: list[str], *, max_new_tokens: int, batch_size: int, max_input_tokens: int | None
        ) -> list[str]:
            self.asked = max_new_tokens, max_input_tokens
            return texts

    pairs = [("yes", "Yes"), ("no", "no"), ("maybe", "never"), ("x", "X")]
    examples = [(pair, {"inputs": pair[0], "targets": pair[1]}) for pair in pairs]
    assert generation_metrics(Echo(), examples, max_new_tokens=5) == {"exact_match": 0.75}
    # What a task measures is of the text as it is.
    assert generation_metrics(Echo(), examples, 5, ["accuracy"]) == {"exact_match": 0.75, "accuracy": 0.25}
    with pytest.raises(InputError, match="bleu"):
        generation_metrics(Echo(), examples, 5, ["bleu"])
    # As long as rows and targets need: "never" and EOS are 6 tokens.
    for layers, most, asked in ((1, 9, (6, 9)), (0, 9, (6, 4)), (0, 3, (6, 1)), (0, None, (6, None))):
        lm = Echo(layers)
        generation_metrics(lm, examples, max_new_tokens=50, max_input_tokens=most)
        assert lm.asked == asked
