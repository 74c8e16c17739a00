"""The same numbers as transformers, for every kind of model; and that no mistake in reading one would go unseen."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from t5x_lite.models import build

FIXTURES = Path(__file__).parents[1] / "fixtures" / "huggingface"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/ref.npz"))

Arrays = dict[str, np.ndarray]


# --- parity ---------------------------------------------------------------------------------------------------------


def test_every_fixture_is_there() -> None:
    assert len(CASES) == 31


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_loss_are_those_of_transformers(name: str, huggingface_case: Any, outputs: Any) -> None:
    case = huggingface_case(name)
    got = outputs(case.model, case.params, case.batch)
    compared = {"logits", "encoder_last_hidden_state", "pooled_output", "nsp_logits"} & case.reference.keys()
    assert compared <= got.keys()
    for output in compared:
        assert np.all(np.isfinite(got[output])), output
        assert case.difference(output, got[output]) <= case.atol(output), output
    for loss in {"loss", "nsp_loss"} & case.reference.keys():
        np.testing.assert_allclose(got[loss], case.reference[loss], rtol=0, atol=1e-5, err_msg=loss)


# --- padding --------------------------------------------------------------------------------------------------------


def apply(model: Any, params: Any, batch: Arrays) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)({"params": params}, batch))


def widened(example: Arrays, pads: int, left: list[int], vocab: int) -> Arrays:
    """Returns rows that are longer by `pads`.

    They are the example padded on the right; with so many of its pads on the left, for each of `left`; and a row full
    of other texts. What stands in padding is not the pad id.
    """
    rng = np.random.default_rng(0)
    batch = {}
    for name, row in example.items():
        length = row.shape[1]
        rows = np.stack([np.pad(row[0], (before, pads - before)) for before in (0, *left)])
        if name.endswith("_segment_ids"):
            others = np.arange(length + pads) // length + 1
        else:
            others = rng.integers(0, vocab if name.endswith("_tokens") else 2, length + pads)
            real = np.stack([np.pad(np.ones(length, bool), (before, pads - before)) for before in (0, *left)])
            rows = np.where(real, rows, others)
        batch[name] = np.stack([*rows, others]).astype(np.int32)
    return batch


@pytest.mark.parametrize(
    "name",
    [
        "t5_v1_1",
        "bart",
        "mbart",
        "gpt2",
        "openai_gpt",
        "llama_gqa",
        "sliding_window",
        "bert_pretraining",
        "roberta_mlm",
    ],
)
def test_padding_and_company_change_nothing(name: str, huggingface_case: Any) -> None:
    case = huggingface_case(name)
    config = case.config
    sizes = {side: int(np.sum(case.batch[f"{side}_segment_ids"][0])) for side in case.sides}
    example = {
        key: value[:1, : sizes[key.split("_")[0]]]
        for key, value in case.batch.items()
        if key.endswith(("_input_tokens", "_segment_ids", "_token_types"))
    }
    alone, padding = apply(case.model, case.params, {k: np.concatenate([v, 0 * v]) for k, v in example.items()})
    assert np.all(np.isfinite(padding))
    length = len(alone)
    # Pads are counted from 0, as any segment is, and a learned table has no row for those beyond its end: there can be
    # as many on one side as it has rows, in a row that is then longer than that, if segment ids say what is padding.
    most = config.max_positions if config.positions == "learned" else 512
    some = min(37, most)
    left = [] if config.num_encoder_layers else [1, some, most - some, most - 1, most]
    for pads in (1, most) if config.num_encoder_layers else (most,):
        got = apply(case.model, case.params, widened(example, pads, left, config.vocab_size))
        for row, before in enumerate((0, *left)):
            # Sums in another order: twice what float32 is off at most, and no more of it with more pads.
            atol = max(1e-5, 2 * case.notes["float32_vs_float64_logits"])
            np.testing.assert_allclose(got[row, before : before + length], alone, rtol=0, atol=atol)
        assert np.all(np.isfinite(got[-1]))


# --- mistakes -------------------------------------------------------------------------------------------------------


def flat(params: Any) -> Arrays:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def exchanged(params: Arrays) -> Arrays:
    other = {"query": "key", "key": "query"}
    return {re.sub(r"(?<=/)(query|key)(?=/)", lambda m: other[m[0]], path): leaf for path, leaf in params.items()}


def heads_dealt_out(params: Arrays, heads: int, kv_heads: int) -> Arrays:
    """Returns the model in which query head h has key and value head `h % kv_heads`, not `h // (heads / kv_heads)`."""
    order = np.arange(heads).reshape(-1, kv_heads).T.reshape(-1)

    def reordered(leaf: np.ndarray, axis: int) -> np.ndarray:
        blocks = np.stack(np.split(leaf, heads, axis), axis)
        return np.concatenate([np.take(blocks, head, axis) for head in order], axis)

    path = "decoder/layers/self_attention"
    query, out = f"{path}/query/kernel", f"{path}/out/kernel"
    return params | {query: reordered(params[query], 2), out: reordered(params[out], 1)}


def scaled(params: Arrays, ending: str, factor: float) -> Arrays:
    return {path: leaf * np.float32(factor) if path.endswith(ending) else leaf for path, leaf in params.items()}


def moved(params: Arrays, path: str, rows: int) -> Arrays:
    return params | {path: np.roll(params[path], rows, axis=0)}


TYPES = "encoder/token_types/table"
WEIGHTS: dict[str, tuple[str, Callable[[Arrays], Arrays]]] = {
    "queries and keys exchanged: T5": ("t5_v1_1", exchanged),
    "queries and keys exchanged: GPT-2": ("gpt2", exchanged),
    "queries and keys exchanged: BERT": ("bert_pretraining", exchanged),
    "key and value heads dealt out: Llama": ("llama_gqa", lambda p: heads_dealt_out(p, 4, 2)),
    "key and value heads dealt out: Mistral": ("sliding_window", lambda p: heads_dealt_out(p, 4, 2)),
    # A factor in the program is a factor in the weights.
    "attention scaled: T5": ("t5_v1_1", lambda p: scaled(p, "attention/query/kernel", 8**-0.5)),
    "attention not scaled: BERT": ("bert_pretraining", lambda p: scaled(p, "attention/query/kernel", 12**0.5)),
    "head not scaled: T5 1.0": ("t5_v1_0", lambda p: scaled(p, "decoder/final_norm/scale", 24**0.5)),
    "head scaled: T5 1.1": ("t5_v1_1", lambda p: scaled(p, "decoder/final_norm/scale", 40**-0.5)),
    # The row that position p would have without the offset, moved to where it is looked up.
    "no position offset: BART's encoder": ("bart", lambda p: moved(p, "encoder/positions/table", 2)),
    "no position offset: BART's decoder": ("bart", lambda p: moved(p, "decoder/positions/table", 2)),
    "no position offset: RoBERTa": ("roberta_mlm", lambda p: moved(p, "encoder/positions/table", 2)),
    "positions from 1 on: GPT-2": ("gpt2", lambda p: moved(p, "decoder/positions/table", -1)),
    "token types ignored": ("bert_model", lambda p: p | {TYPES: np.repeat(p[TYPES][:1], len(p[TYPES]), axis=0)}),
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_a_mistake_in_the_weights_shows(mistake: str, huggingface_case: Any, outputs: Any) -> None:
    name, change = WEIGHTS[mistake]
    case = huggingface_case(name)
    params = unflatten_dict(change(flat(case.params)), sep="/")
    assert case.distance(outputs(case.model, params, case.batch)) > 10


@pytest.mark.parametrize("name", ["mbart", "gpt2", "bert_pretraining", "roberta_seqcls"])
def test_a_bias_that_is_dropped_shows(name: str, huggingface_case: Any, outputs: Any) -> None:
    case = huggingface_case(name)
    params = flat(case.params)
    biases = [path for path in params if path.endswith("/bias")]
    assert len(biases) >= 8
    for path in biases:
        damaged = unflatten_dict(params | {path: np.zeros_like(params[path])}, sep="/")
        effect = case.distance(outputs(case.model, damaged, case.batch))
        if "/key/" in path:  # it adds the same to all logits of a query, and softmax takes that away
            assert effect < 1, path
        else:
            assert effect > 10, path


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu for gelu_tanh: T5": ("t5_v1_1", {"activation": "gelu"}),
    "gelu for gelu_tanh: GPT-2": ("gpt2", {"activation": "gelu"}),
    "gelu_tanh for gelu: BART": ("bart", {"activation": "gelu_tanh"}),
    "gelu_tanh for gelu: BERT": ("bert_pretraining", {"activation": "gelu_tanh"}),
    "epsilon: mT5": ("mt5", {"norm_epsilon": 10.0}),
    "epsilon: GPT-2": ("gpt2_ninner", {"norm_epsilon": 10.0}),
    "epsilon: Llama": ("llama_tied", {"norm_epsilon": 10.0}),
    "epsilon: BERT": ("bert_seqcls", {"norm_epsilon": 10.0}),
    "rotary base": ("llama_gqa", {"rotary_base": 2.0}),
    "no rotary scaling": ("llama3_rope", {"rotary_scaling": None}),
    "no window: Mistral": ("sliding_window", {"attention_window": 0}),
    "no window: GPT-3": ("gpt3_sparse", {"attention_window": 0, "alternating_window": False}),
    "a window in every layer: GPT-3": ("gpt3_sparse", {"alternating_window": False}),
}
_FACTORS = ("norm_epsilon", "rotary_base")


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_mistake_in_the_configuration_shows(mistake: str, huggingface_case: Any) -> None:
    name, changes = CONFIGS[mistake]
    case = huggingface_case(name)
    changes = {k: getattr(case.config, k) * v if k in _FACTORS else v for k, v in changes.items()}
    assert all(getattr(case.config, field) != value for field, value in changes.items())
    model = build(dataclasses.replace(case.config, **changes))
    output = "logits" if "logits" in case.reference else "encoder_last_hidden_state"
    assert case.distance({output: apply(model, case.params, case.batch)}) > 10


def test_a_head_of_its_own_shows(huggingface_case: Any) -> None:
    case = huggingface_case("llama_tied")
    table = case.params["embedding"]["table"]
    model = build(dataclasses.replace(case.config, tied_head=False))
    logits = {}
    for name, kernel in {"same": table, "other": np.random.default_rng(0).permutation(table)}.items():
        params = case.params | {"head": {"kernel": np.asarray(kernel).T}}
        logits[name] = apply(model, params, case.batch)
    assert case.distance({"logits": logits["same"]}) <= 1
    assert case.distance({"logits": logits["other"]}) > 10
