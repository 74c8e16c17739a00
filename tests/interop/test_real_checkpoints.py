"""Checkpoints that others have trained: loaded, they say what transformers (or llama2.c, or T5X) say with them."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import t5x_lite
from t5x_lite import GenerationConfig, LanguageModel
from t5x_lite.data.packing import decoder_batch
from t5x_lite.data.tokenizers import load_tokenizer
from t5x_lite.errors import InputError
from t5x_lite.interop import huggingface
from t5x_lite.interop.tensor_files import open_tensors
from t5x_lite.training.step import batch_loss

WEIGHTS = Path(__file__).parents[2].parent / "shared" / "data" / "weights"
pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the real checkpoints are not here")

BART, GPT2, LLAMA = "bart-g2p-us", "gpt2-smiles-0.2m", "llama2c-stories260K/hf"
BERT, T5, T5X = "bert-tiny-fixture", "t5-tiny-fixture", "t5x-native-testdata/test_t5_tiny_hf"
WIDTH = 16
CHECKPOINTS = (BART, GPT2, LLAMA, BERT, T5, T5X)

Arrays = dict[str, np.ndarray]
Load = Callable[[str], LanguageModel]


@pytest.fixture(scope="module")
def load() -> Load:
    """A function `name -> LanguageModel`, on one device."""
    return cache(lambda name: t5x_lite.load(WEIGHTS / name))


@pytest.fixture(scope="module")
def apply() -> Callable[..., np.ndarray]:
    """A function `(lm, batch, method) -> array`; one program for each model and method."""

    @cache
    def program(model: Any, method: str | None) -> Any:
        return jax.jit(lambda params, batch: model.apply({"params": params}, batch, method=method))

    return lambda lm, batch, method=None: np.asarray(program(lm.model, method)(lm.params, batch))


def home(name: str) -> Path:
    """Returns the folder with a checkpoint's references."""
    return (WEIGHTS / name).parent if "/" in name else WEIGHTS / name


def arrays(name: str, file: str = "ref.npz") -> Arrays:
    with np.load(home(name) / file) as stored:
        return {key: value.astype(np.int32) if value.dtype == np.int64 else value for key, value in stored.items()}


def said(name: str) -> list[dict[str, Any]]:
    outputs = json.loads((home(name) / "ref.json").read_text(encoding="utf-8"))["outputs"]
    return list(outputs.values()) if isinstance(outputs, dict) else outputs


def inputs(lm: LanguageModel, reference: Arrays) -> Arrays:
    names = {"encoder_input_tokens": "input_ids", "encoder_segment_ids": "attention_mask"}
    if lm.config.num_decoder_layers and lm.config.num_encoder_layers:
        names["decoder_input_tokens"] = "decoder_input_ids"
    elif lm.config.num_decoder_layers:
        names = {
            "decoder_input_tokens": "input_ids",
            "decoder_segment_ids": "attention_mask",
            "decoder_positions": "position_ids",
        }
    return {ours: reference[theirs] for ours, theirs in names.items() if theirs in reference}


def answers(lm: LanguageModel, rows: Sequence[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Returns the answers to rows of ids, which are padded on the right to one batch, up to and with EOS."""
    side = "encoder" if lm.config.num_encoder_layers else "decoder"
    # Of one width, so that fewer programs are compiled.
    laid = decoder_batch([(row, []) for row in rows], rows=len(rows), length=WIDTH, pad_id=lm.config.fill_id)
    batch = {f"{side}_{name}": laid[f"decoder_{name}"] for name in ("input_tokens", "segment_ids")}
    made = lm.generate_tokens(batch, config)
    return [row[:size].tolist() for row, size in zip(np.asarray(made.tokens), np.asarray(made.lengths), strict=True)]


def greedy(lm: LanguageModel, rows: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    return answers(lm, rows, GenerationConfig(max_new_tokens=new_tokens))


def loss(lm: LanguageModel, batch: Arrays) -> float:
    sums = jax.jit(lambda params, batch: batch_loss(lm.model, params, batch))(lm.params, batch)
    return float(sums.cross_entropy / sums.weight)


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(name: str, load: Load, apply: Any) -> None:
    lm, reference = load(name), arrays(name)
    got, wanted = apply(lm, inputs(lm, reference)), reference["logits"]
    assert got.shape == wanted.shape
    # Padding of decoders alone stands on the left, and what a model says there nobody asks.
    real = reference["attention_mask"] > 0 if wanted.shape[1] == reference["attention_mask"].shape[1] else ...
    # They are up to 30, and those of the random models are tiny. The largest difference is 7e-7 of the largest logit.
    tolerance = min(1e-4, 1e-5 * np.max(np.abs(wanted)))
    np.testing.assert_allclose(got[real], wanted[real], atol=tolerance, rtol=0)


def test_hidden_states_of_bert(load: Load, apply: Any) -> None:
    reference = arrays(BERT)
    got = apply(load(BERT), inputs(load(BERT), reference), "encode")
    real = reference["attention_mask"] > 0
    assert 0 < np.sum(real) < real.size
    np.testing.assert_allclose(got[real], reference["last_hidden_state"][real], atol=1e-5, rtol=0)


# --- greedy tokens and texts ----------------------------------------------------------------------------------------


def test_pronunciations_of_bart(load: Load) -> None:
    lm, words = load(BART), said(BART)
    together = greedy(lm, [word["input_ids"] for word in words], 40)
    spelling = json.loads((WEIGHTS / BART / "config.json").read_text(encoding="utf-8"))["phoneme_chars"]
    for word, ids in zip(words, together, strict=True):
        assert [lm.config.decoder_start_id, *ids] == word["greedy"], word["word"]
        assert "".join(spelling[i] for i in ids if i > 3) == word["greedy_text"]
        assert greedy(lm, [word["input_ids"]], 40) == [ids]


def test_bart_is_cut_off_by_the_end_that_it_is_forced_to(load: Load) -> None:
    word = said(BART)[0]
    assert greedy(load(BART), [word["input_ids"]], 5) == [[*word["greedy"][1:5], 2]]


def test_molecules_of_gpt2(load: Load) -> None:
    lm, molecules = load(GPT2), said(GPT2)
    together = greedy(lm, [molecule["input_ids"] for molecule in molecules], 60)
    tokenizer = lm.require_tokenizer()
    for molecule, ids in zip(molecules, together, strict=True):
        prompt = molecule["input_ids"]
        assert [*prompt, *ids] == molecule["greedy"], molecule["prompt"]
        assert ids[-1] == lm.config.eos_id
        # Its tokenizer.json splits nothing: a program of its own has cut the prompts. Text it gives all the same.
        assert f"<BOS>{molecule['prompt']}{tokenizer.decode(ids)}<EOS>" == molecule["greedy_text"]
        assert greedy(lm, [prompt], 60) == [ids]


def test_stories_of_llama(load: Load) -> None:
    lm, stories = load(LLAMA), said(LLAMA)
    together = greedy(lm, [story["input_ids"] for story in stories], 40)
    tokenizer = load_tokenizer(home(LLAMA) / "tok512_rebuilt.model")
    for story, ids in zip(stories, together, strict=True):
        assert [*story["input_ids"], *ids] == story["greedy"], story["prompt"]
        assert tokenizer.decode([*story["input_ids"], *ids]) == story["greedy_text"]
        assert greedy(lm, [story["input_ids"]], 40) == [ids]


def test_the_story_that_llama2_c_prints(load: Load, tmp_path: Path) -> None:
    golden = json.loads((home(LLAMA) / "golden_llama2c_stdout.json").read_text(encoding="utf-8"))
    assert [[1, *ids] for ids in greedy(load(LLAMA), [[1]], 200)] == [golden["ids"]]
    directory = shutil.copytree(WEIGHTS / LLAMA, tmp_path / "model")
    shutil.copyfile(home(LLAMA) / "tok512_rebuilt.model", directory / "tokenizer.model")
    lm = t5x_lite.load(directory)
    assert lm.generate([""], max_new_tokens=200) == [golden["text"]]
    story = said(LLAMA)[1]
    (continued,) = lm.generate([story["prompt"]], max_new_tokens=40)
    assert story["prompt"] + continued == story["greedy_text"]


def test_greedy_tokens_of_the_converted_t5x_model(load: Load) -> None:
    texts = said(T5X)
    together = greedy(load(T5X), [text["input_ids"] for text in texts], 16)
    assert [[0, *ids] for ids in together] == [text["greedy"] for text in texts]


# --- beam search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "new_tokens", "early_stopping"), [(BART, 40, True), (GPT2, 60, True), (LLAMA, 40, True), (T5X, 16, False)]
)
def test_beam_search_finds_what_transformers_finds(
    name: str, new_tokens: int, early_stopping: bool, load: Load
) -> None:
    lm, texts = load(name), said(name)
    config = GenerationConfig(max_new_tokens=new_tokens, num_beams=4, early_stopping=early_stopping)
    rows = [text["input_ids"] for text in texts]
    # What transformers stores begins with the prompt, or with the decoder's start token.
    wanted = [
        text["beam4"][1:] if lm.config.num_encoder_layers else text["beam4"][len(row) :]
        for text, row in zip(texts, rows, strict=True)
    ]
    same = wanted == [text["greedy"][-len(row) :] for text, row in zip(texts, wanted, strict=True)]
    assert same == (name == BART)  # which is sure of how words sound
    assert answers(lm, rows, config) == wanted
    for row, ids in zip(rows, wanted, strict=True):
        assert answers(lm, [row], config) == [ids]


# --- losses ---------------------------------------------------------------------------------------------------------


def test_loss_of_bart(load: Load) -> None:
    reference = arrays(BART, "ref_loss.npz")
    counts = reference["labels"] >= 0
    batch = inputs(load(BART), reference) | {
        "decoder_target_tokens": np.where(counts, reference["labels"], 0),
        "decoder_loss_weights": counts.astype(np.float32),
    }
    got = loss(load(BART), batch)
    assert got == pytest.approx(float(reference["loss"]), abs=1e-5)
    assert got == pytest.approx(0.0948, abs=1e-4)


def test_loss_of_llama(load: Load) -> None:
    reference = json.loads((home(LLAMA) / "ref_loss.json").read_text(encoding="utf-8"))
    ids = np.array(reference["ids"], np.int32).reshape(8, 256)
    weights = np.ones(ids.shape, np.float32)
    weights[:, -1] = 0.0
    batch = {
        "decoder_input_tokens": ids,
        "decoder_segment_ids": np.ones_like(ids),
        "decoder_target_tokens": np.roll(ids, -1, axis=1),
        "decoder_loss_weights": weights,
    }
    got = loss(load(LLAMA), batch)
    assert got == pytest.approx(reference["loss"], abs=1e-5)


# --- back to files --------------------------------------------------------------------------------------------------


# What is stored twice, with where the other copy is, or is no parameter.
LEFT_OUT: dict[str, dict[str, str | None]] = {
    BERT: {"bert.embeddings.position_ids": None},
    T5: dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
    ),
}


def equal(one: Any, other: Any) -> bool:
    """Returns whether shape, dtype and bits are the same."""
    one, other = np.asarray(one), np.asarray(other)
    return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != T5X])
def test_written_again_every_tensor_has_the_same_bits(name: str, load: Load, tmp_path: Path) -> None:
    lm = load(name)
    huggingface.save(lm.params, lm.config, tmp_path)
    written, original = open_tensors(tmp_path), open_tensors(WEIGHTS / name)
    assert original.shapes.keys() - written.shapes.keys() == LEFT_OUT.get(name, {}).keys()
    for left, same in LEFT_OUT.get(name, {}).items():
        assert same is None or equal(original.read(left), original.read(same)), left
    for kept in written.shapes:
        assert equal(written.read(kept), original.read(kept)), kept
    again = t5x_lite.load(tmp_path)
    assert again.config == lm.config
    assert jax.tree.all(jax.tree.map(equal, again.params, lm.params))


def test_a_tied_head_that_is_not_scaled_is_not_written(load: Load, tmp_path: Path) -> None:
    """transformers 4 would scale it."""
    lm = load(T5X)
    assert (lm.config.tied_head, lm.config.scaled_head) == (True, False)
    with pytest.raises(InputError, match=r"model\.scaled_head False cannot be written for Hugging Face"):
        huggingface.save(lm.params, lm.config, tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def test_t5x_to_huggingface(tmp_path: Path) -> None:
    """The conversion that was made elsewhere has put the output head of the checkpoint in place of its embedding."""
    lm = t5x_lite.load(WEIGHTS / "t5x-native-testdata" / "test_t5_tiny.checkpoint_0")
    with np.load(WEIGHTS / "t5x-native-testdata" / "test_t5_tiny_target.npz") as file:
        embedding, head = file["token_embedder/embedding"], file["decoder/logits_dense/kernel"]
    huggingface.save(lm.params, lm.config, tmp_path / "untied")
    written, converted = open_tensors(tmp_path / "untied"), open_tensors(WEIGHTS / T5X)
    assert written.shapes.keys() == converted.shapes.keys() | {"lm_head.weight"}
    for name in converted.shapes.keys() - {"shared.weight"}:
        assert equal(written.read(name), converted.read(name)), name
    assert equal(written.read("shared.weight"), embedding)
    assert equal(written.read("lm_head.weight"), head.T)
    assert equal(converted.read("shared.weight"), head.T)
    again = t5x_lite.load(tmp_path / "untied")
    assert again.config == lm.config
    assert jax.tree.all(jax.tree.map(equal, again.params, lm.params))
