"""What the tests of Hugging Face checkpoints share: every fixture loaded once, and every model compiled once."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite.interop import huggingface
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import build
from t5x_lite.models.transformer import Transformer
from t5x_lite.training.step import batch_loss

FIXTURES = Path(__file__).parents[1] / "fixtures" / "huggingface"

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder of `tests/fixtures/huggingface`: a model, its inputs, and what transformers made of them."""

    name: str
    directory: Path  # `hf/` of the folder that has the weights
    config: TransformerConfig
    model: Transformer
    abstract: Any
    params: Any
    batch: Arrays
    reference: Arrays
    notes: dict[str, Any]

    @property
    def sides(self) -> list[str]:
        """The stacks that the model has."""
        return [side for side in ("encoder", "decoder") if f"{side}_input_tokens" in self.batch]

    @property
    def real(self) -> np.ndarray:
        """Bool `[B, T]`: the positions at which the reference is compared."""
        return self.batch[f"{self.sides[-1]}_segment_ids"] > 0

    def atol(self, name: str) -> float:
        """Returns the tolerance of an output."""
        return self.notes["suggested_atol"].get(name, 1e-4)

    def difference(self, name: str, value: Any) -> float:
        """Returns the largest difference between an output and the reference, at real positions."""
        expected = self.reference[name]
        difference = np.abs(np.asarray(value) - expected)
        assert difference.shape == expected.shape
        if difference.ndim == 3:
            inputs = name == "encoder_last_hidden_state"
            difference = difference[self.batch["encoder_segment_ids"] > 0 if inputs else self.real]
        return float(np.max(difference))

    def distance(self, outputs: Arrays) -> float:
        """Returns the largest difference of all of a model's outputs, in tolerances: above 1, they do not agree."""
        names = outputs.keys() & self.reference.keys() - {"loss"}
        return max(self.difference(name, outputs[name]) / self.atol(name) for name in names)


@pytest.fixture(scope="session")
def huggingface_case() -> Callable[[str], Case]:
    """A function `name -> Case`, whose parameters are whole on the first device."""
    layout = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    @cache
    def load(name: str) -> Case:
        notes = json.loads((FIXTURES / name / "ref.json").read_text())
        with np.load(FIXTURES / name / "ref.npz") as file:
            reference = dict(file)
        if "weights" in notes:
            other = load(notes["weights"])
            batch = _batch(other.config, reference)
            return dataclasses.replace(other, name=name, batch=batch, reference=_expected(reference), notes=notes)
        directory = FIXTURES / name / "hf"
        config = huggingface.read_config(directory)
        if "attention_window" in notes:  # GPT-3's: no class of transformers has it
            config = dataclasses.replace(config, attention_window=notes["attention_window"], alternating_window=True)
        model = build(config)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), model.param_shapes()
        )
        params = huggingface.load_params(directory, config, abstract)
        batch = _batch(config, reference)
        return Case(name, directory, config, model, abstract, params, batch, _expected(reference), notes)

    return load


@pytest.fixture(scope="session")
def outputs() -> Callable[[Transformer, Any, Arrays], Arrays]:
    """A function `(model, params, batch) -> outputs` by the names of the references; one program for each model."""

    @cache
    def program(model: Transformer) -> Any:
        def run(params: Any, batch: Arrays) -> dict[str, jax.Array]:
            config, once = model.config, _Once(model)
            made = {}
            if config.num_encoder_layers:
                made["encoder_last_hidden_state"] = once.apply({"params": params}, batch, method="encode")
            if config.pooler:
                made["pooled_output"] = once.apply({"params": params}, batch, method="pool")
            if config.head == "pretraining":
                made["logits"], made["nsp_logits"] = once.apply({"params": params}, batch, method="pretrain")
            elif config.head or config.num_decoder_layers:
                made["logits"] = once.apply({"params": params}, batch)
            if "logits" in made:
                sums = batch_loss(once, params, batch)
                made["loss"] = sums.cross_entropy / sums.weight
                made["nsp_loss"] = sums.auxiliary / sums.weight
            return made

        return jax.jit(run)

    def call(model: Transformer, params: Any, batch: Arrays) -> Arrays:
        # For arrays in another place, jit would compile anew.
        made = program(model)(jax.device_put(params, jax.devices()[0]), batch)
        return {name: np.asarray(value) for name, value in made.items()}

    return call


class _Once:
    """A model of which no method is traced twice for the same parameters and batch."""

    def __init__(self, model: Transformer):
        self.config = model.config
        self._model = model
        self._made: dict[str | None, Any] = {}

    def apply(self, variables: Any, batch: Arrays, *, method: str | None = None, **options: Any) -> Any:
        if method not in self._made:
            self._made[method] = self._model.apply(variables, batch, method=method, **options)
        return self._made[method]


def _batch(config: TransformerConfig, reference: Arrays) -> Arrays:
    """Returns the reference's inputs and labels under the names of the batch contract."""
    inputs, mask = (reference[name].astype(np.int32) for name in ("input_ids", "attention_mask"))
    if config.num_decoder_layers and config.num_encoder_layers:
        return {
            "encoder_input_tokens": inputs,
            "encoder_segment_ids": mask,
            "decoder_input_tokens": reference["decoder_input_ids"].astype(np.int32),
            "decoder_segment_ids": reference["decoder_attention_mask"].astype(np.int32),
            **_targets("decoder_target_tokens", "decoder_loss_weights", reference["labels"]),
        }
    if config.num_decoder_layers:
        shifted = np.pad(reference["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        return {
            "decoder_input_tokens": inputs,
            "decoder_segment_ids": mask,
            **_targets("decoder_target_tokens", "decoder_loss_weights", shifted),
        }
    batch = {"encoder_input_tokens": inputs, "encoder_segment_ids": mask}
    if "token_type_ids" in reference:
        batch["encoder_token_types"] = reference["token_type_ids"].astype(np.int32)
    rows = {
        "labels": "labels" if config.head == "sequence_classification" else "",
        "start_positions": "start_positions",
        "end_positions": "end_positions",
        "next_sentence_labels": "next_sentence_label",
    }
    batch |= {ours: reference[theirs].astype(np.int32) for ours, theirs in rows.items() if theirs in reference}
    if config.head in ("masked_lm", "pretraining", "token_classification"):
        batch |= _targets("encoder_target_tokens", "encoder_loss_weights", reference["labels"])
    return batch


def _targets(targets: str, weights: str, labels: np.ndarray) -> Arrays:
    counts = labels != -100
    return {targets: np.where(counts, labels, 0).astype(np.int32), weights: counts.astype(np.float32)}


def _expected(reference: Arrays) -> Arrays:
    # Of a span, transformers' loss has padding among the candidates; ours has not.
    real = "loss_real_positions"
    return reference | {"loss": reference[real]} if real in reference else reference
