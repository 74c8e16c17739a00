"""Hugging Face directories: how they are spelled, what is refused, what is written, and in which layout they arrive."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from t5x_lite.errors import CheckpointMismatch, InputError
from t5x_lite.interop import huggingface
from t5x_lite.interop.tensor_files import StoredTensor, open_tensors, write_safetensors
from t5x_lite.models import TransformerConfig, build
from t5x_lite.sharding import make_mesh, tree_shardings

FIXTURES = Path(__file__).parents[1] / "fixtures" / "huggingface"
CASES = sorted(path.parents[1].name for path in FIXTURES.glob("*/hf/config.json"))

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]


def flat(params: Any) -> Arrays:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def assert_same(actual: Any, expected: Any) -> None:
    """Same names, dtypes and bits."""
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def read_tensors(directory: Path) -> Arrays:
    files = open_tensors(directory)
    return {name: files.read(name) for name in files.shapes}


def read_settings(name: str) -> Settings:
    return json.loads((FIXTURES / name / "hf" / "config.json").read_text())


def write(directory: Path, tensors: Arrays, settings: Settings) -> Path:
    directory.mkdir(exist_ok=True)
    entries = ((name, array.shape, array.dtype, lambda array=array: array) for name, array in tensors.items())
    write_safetensors(directory / "model.safetensors", entries)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def on_one_device(config: TransformerConfig) -> Any:
    layout = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), build(config).param_shapes()
    )


def load(directory: Path, config: TransformerConfig, abstract: Any, **options: Any) -> Any:
    return huggingface.load_params(directory, config, abstract, **options)


# --- settings -------------------------------------------------------------------------------------------------------


def test_every_fixture_is_there() -> None:
    assert len(CASES) == 28


@pytest.mark.parametrize("name", CASES)
def test_transformers_4_and_5_spell_the_same_configuration(name: str, tmp_path: Path) -> None:
    for file in (FIXTURES / name / "hf").iterdir():
        source = FIXTURES / name / "config_v4.json" if file.name == "config.json" else file
        (tmp_path / file.name).symlink_to(source)
    assert huggingface.read_config(tmp_path) == huggingface.read_config(FIXTURES / name / "hf")


def test_a_class_is_told_without_a_model_type(huggingface_case: Any, tmp_path: Path) -> None:
    # google/umt5-small is stored like this.
    case = huggingface_case("umt5")
    settings = {key: value for key, value in read_settings("umt5").items() if key != "model_type"}
    assert huggingface.read_config(write(tmp_path, read_tensors(case.directory), settings)) == case.config


def test_a_directory_is_recognised_by_its_config(tmp_path: Path) -> None:
    assert huggingface.is_huggingface(FIXTURES / "gpt2" / "hf")
    assert not huggingface.is_huggingface(FIXTURES / "gpt2")
    assert not huggingface.is_huggingface(tmp_path / "nowhere")


# --- names ----------------------------------------------------------------------------------------------------------


def renamed(tensors: Arrays, pattern: str, replacement: str) -> Arrays:
    changed = {re.sub(pattern, replacement, name): array for name, array in tensors.items()}
    assert changed.keys() != tensors.keys()
    assert len(changed) == len(tensors)
    return changed


def copied(tensors: Arrays, name: str, *others: str) -> Arrays:
    assert not set(others) & tensors.keys()
    return tensors | dict.fromkeys(others, tensors[name])


def moved(tensors: Arrays, name: str, *others: str) -> Arrays:
    return {key: array for key, array in copied(tensors, name, *others).items() if key != name}


CAUSAL = np.tril(np.ones((1, 1, 48, 48), np.uint8))
WORDS = "bert.embeddings.word_embeddings.weight"
SPARE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
EMBED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

VARIANTS: dict[str, tuple[str, Callable[[Arrays], Arrays]]] = {
    "no prefix: gpt2": ("gpt2", lambda t: renamed(t, r"^transformer\.", "")),
    "no prefix: openai-gpt": ("openai_gpt", lambda t: renamed(t, r"^transformer\.", "")),
    "no prefix, and a head: gpt2": (
        "gpt2",
        lambda t: copied(renamed(t, r"^transformer\.", ""), "wte.weight", "lm_head.weight"),
    ),
    "prefix: bert-base": ("bert_model", lambda t: renamed(t, "^", "bert.")),
    "names of TensorFlow: bert": (
        "bert_pretraining",
        lambda t: renamed(renamed(t, r"LayerNorm\.weight$", "LayerNorm.gamma"), r"LayerNorm\.bias$", "LayerNorm.beta"),
    ),
    "names of TensorFlow, no prefix: bert": (
        "bert_model",
        lambda t: renamed(renamed(t, r"LayerNorm\.weight$", "LayerNorm.gamma"), r"LayerNorm\.bias$", "LayerNorm.beta"),
    ),
    "stored twice: gpt2": ("gpt2", lambda t: copied(t, "transformer.wte.weight", "lm_head.weight")),
    "stored twice: openai-gpt": (
        "openai_gpt",
        lambda t: copied(t, "transformer.tokens_embed.weight", "lm_head.weight"),
    ),
    "stored twice: llama": ("llama_tied", lambda t: copied(t, "model.embed_tokens.weight", "lm_head.weight")),
    "stored four times: t5": ("t5_v1_0", lambda t: copied(t, "shared.weight", *EMBED, "lm_head.weight")),
    "stored thrice: t5-v1.1": ("t5_v1_1", lambda t: copied(t, "shared.weight", *EMBED)),
    "stored four times: bart": (
        "bart",
        lambda t: copied(t, "model.shared.weight", *(f"model.{name}" for name in EMBED), "lm_head.weight"),
    ),
    "stored twice: bert": (
        "bert_pretraining",
        lambda t: copied(
            copied(t, WORDS, "cls.predictions.decoder.weight"), "cls.predictions.bias", "cls.predictions.decoder.bias"
        ),
    ),
    "stored twice: roberta": (
        "roberta_mlm",
        lambda t: copied(
            copied(t, "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
            "lm_head.bias",
            "lm_head.decoder.bias",
        ),
    ),
    # google/madlad400 and others have the table under the names of its users alone.
    "no shared.weight: t5": ("t5_v1_0", lambda t: moved(t, "shared.weight", EMBED[0])),
    "no shared.weight: t5-v1.1": ("t5_v1_1", lambda t: moved(t, "shared.weight", *EMBED)),
    "no shared.weight: mt5": ("mt5", lambda t: moved(t, "shared.weight", EMBED[1])),
    "no shared.weight: bart": ("bart", lambda t: moved(t, "model.shared.weight", f"model.{EMBED[0]}")),
    "buffers: gpt2": (
        "gpt2",
        lambda t: (
            t
            | {f"transformer.h.{i}.attn.bias": CAUSAL for i in range(3)}
            | {f"transformer.h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(3)}
        ),
    ),
    "buffers, no prefix: gpt2": ("gpt2", lambda t: renamed(t, r"^transformer\.", "") | {"h.0.attn.bias": CAUSAL}),
    "buffers: bert": ("bert_seqcls", lambda t: t | {"bert.embeddings.position_ids": np.arange(36)[None]}),
    "buffers, no prefix: bert": ("bert_model", lambda t: t | {"embeddings.position_ids": np.arange(22)[None]}),
    "buffers: roberta": ("roberta_qa", lambda t: t | {"roberta.embeddings.position_ids": np.arange(22)[None]}),
    "spare bias: t5": ("t5_v1_0", lambda t: t | {SPARE: np.zeros((12, 3), np.float32)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_names_of_a_tensor_are_known(variant: str, huggingface_case: Any, tmp_path: Path) -> None:
    name, change = VARIANTS[variant]
    case = huggingface_case(name)
    directory = write(tmp_path, change(read_tensors(case.directory)), read_settings(name))
    assert huggingface.read_config(directory) == case.config
    assert_same(load(directory, case.config, case.abstract), case.params)


def test_tensors_tell_the_head_of_a_bert(huggingface_case: Any, tmp_path: Path) -> None:
    # bert-base-uncased says so on the Hub, and holds what it was pre-trained with.
    case = huggingface_case("bert_pretraining")
    settings = read_settings("bert_pretraining") | {"architectures": ["BertForMaskedLM"]}
    directory = write(tmp_path, read_tensors(case.directory), settings)
    assert huggingface.read_config(directory) == case.config
    assert_same(load(directory, case.config, case.abstract), case.params)


@pytest.mark.parametrize("prefix", ["roberta.", ""])
def test_a_roberta_without_its_head(prefix: str, huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("roberta_mlm")
    tensors = {
        name.replace("roberta.", prefix): array
        for name, array in read_tensors(case.directory).items()
        if name.startswith("roberta.")
    }
    directory = write(tmp_path, tensors, read_settings("roberta_mlm") | {"architectures": ["RobertaModel"]})
    config = huggingface.read_config(directory)
    assert config == dataclasses.replace(case.config, head=None, head_bias=False)
    expected = {path: leaf for path, leaf in flat(case.params).items() if path.startswith(("encoder/", "embedding/"))}
    assert_same(load(directory, config, on_one_device(config)), expected)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("t5_v1_0", "shared.weight", "encoder.embed_tokens.weight"),
        ("t5_v1_1", "shared.weight", "decoder.embed_tokens.weight"),
        ("mbart", "model.shared.weight", "model.encoder.embed_tokens.weight"),
        ("bert_pretraining", "cls.predictions.bias", "cls.predictions.decoder.bias"),
    ],
)
def test_copies_that_differ_are_refused(
    name: str, first: str, second: str, huggingface_case: Any, tmp_path: Path
) -> None:
    case = huggingface_case(name)
    tensors = copied(read_tensors(case.directory), first, second)
    tensors[second] = tensors[second].copy()
    tensors[second].flat[-1] += 1
    with pytest.raises(CheckpointMismatch, match=f"{re.escape(first)} and {re.escape(second)} .*differ"):
        load(write(tmp_path, tensors, read_settings(name)), case.config, case.abstract)


@pytest.mark.parametrize(
    ("name", "table", "head"),
    [
        ("t5_v1_0", "shared.weight", "lm_head.weight"),
        ("bart", "model.shared.weight", "lm_head.weight"),
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("llama_tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("bert_mlm", WORDS, "cls.predictions.decoder.weight"),
    ],
)
def test_a_head_that_differs_from_the_table_is_a_head_of_its_own(
    name: str, table: str, head: str, huggingface_case: Any, tmp_path: Path
) -> None:
    case = huggingface_case(name)
    tensors = copied(read_tensors(case.directory), table, head)
    tensors[head] = tensors[head] + 1
    directory = write(tmp_path, tensors, read_settings(name))
    config = huggingface.read_config(directory)
    assert config == dataclasses.replace(case.config, tied_head=False)
    expected = flat(case.params) | {"head/kernel": tensors[head].T}
    assert_same(load(directory, config, on_one_device(config)), expected)


# --- strictness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5_v1_1", "gpt2", "bert_seqcls"])
def test_every_tensor_has_to_be_there_and_to_fit(name: str, huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case(name)
    tensors = read_tensors(case.directory)

    def differences(changed: Arrays) -> list[str]:
        with pytest.raises(CheckpointMismatch) as caught:
            load(write(tmp_path, changed, read_settings(name)), case.config, case.abstract)
        first, *lines = str(caught.value).splitlines()
        assert first == f"{tmp_path} does not fit the model, {len(lines)} differences:"
        return [line.strip() for line in lines]

    for tensor, array in tensors.items():
        others = {other: value for other, value in tensors.items() if other != tensor}
        assert differences(others) == [f"{tensor} {array.shape} is missing"]
        longer = np.concatenate([array, array[-1:]])
        assert differences(others | {tensor: longer}) == [f"{tensor}: {longer.shape} there, {array.shape} in the model"]
        wrong = re.sub(r"\.?(\w+)$", r".my_\1", tensor)
        assert differences(others | {wrong: array}) == [
            f"{tensor} {array.shape} is missing; nearest: {wrong} {array.shape}",
            f"{wrong} {array.shape} is not used; nearest: {tensor} {array.shape}",
        ]
    extra = next(iter(tensors)).replace(".0.", ".7.") + "_2"
    assert differences(tensors | {extra: np.zeros((2, 3), np.float32)}) == [f"{extra} (2, 3) is not used"]


def test_a_transposed_tensor_is_not_turned_to_fit(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("gpt2")
    tensors = read_tensors(case.directory)
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(CheckpointMismatch, match=re.escape(f"{name}: (96, 24) there, (24, 96) in the model")):
        load(write(tmp_path, tensors, read_settings("gpt2")), case.config, case.abstract)


def test_a_checkpoint_of_another_depth_lists_what_it_lacks(huggingface_case: Any) -> None:
    case = huggingface_case("gpt2")
    deeper = dataclasses.replace(case.config, num_decoder_layers=20)
    with pytest.raises(CheckpointMismatch, match="204 differences") as caught:
        load(case.directory, deeper, on_one_device(deeper))
    assert "transformer.h.10.attn.c_attn.bias (72,) is missing" in str(caught.value)
    assert str(caught.value).endswith("and 164 more")


def test_what_may_be_missing_is_drawn_afresh(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("bert_seqcls")
    tensors = {k: v for k, v in read_tensors(case.directory).items() if not k.startswith("classifier.")}
    directory = write(tmp_path, tensors, read_settings("bert_seqcls"))
    with pytest.raises(CheckpointMismatch, match=r"classifier\.weight"):
        load(directory, case.config, case.abstract)
    with pytest.raises(CheckpointMismatch, match=r"classifier\.weight"):
        load(directory, case.config, case.abstract, allow_missing=["classifier/bias"])
    got = flat(load(directory, case.config, case.abstract, allow_missing=["classifier/*"]))
    expected = flat(case.params)
    kernel, bias = got.pop("classifier/kernel"), got.pop("classifier/bias")
    # BERT's initialisation: normal with a standard deviation of 0.02, cut off at two of them.
    assert kernel.shape == expected.pop("classifier/kernel").shape
    assert 0.01 < np.std(kernel) < 0.03
    np.testing.assert_array_equal(bias, np.zeros_like(expected.pop("classifier/bias")))
    assert_same(got, expected)


def test_what_may_be_missing_and_is_there_is_read(huggingface_case: Any) -> None:
    case = huggingface_case("bert_seqcls")
    assert_same(load(case.directory, case.config, case.abstract, allow_missing=["classifier/*"]), case.params)


def test_what_may_be_missing_has_to_be_a_parameter(huggingface_case: Any) -> None:
    case = huggingface_case("bert_seqcls")
    with pytest.raises(InputError, match=r"allow_missing 'clasifier/\*' fits none of .*classifier/kernel"):
        load(case.directory, case.config, case.abstract, allow_missing=["clasifier/*"])


@pytest.mark.parametrize("name", ["llama_gqa", "t5_v1_1"])
def test_a_head_of_its_own_that_is_not_there_is_missing(name: str, huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case(name)
    tensors = {k: v for k, v in read_tensors(case.directory).items() if k != "lm_head.weight"}
    settings = read_settings(name) | {"tie_word_embeddings": False}
    directory = write(tmp_path, tensors, settings)
    config = huggingface.read_config(directory)
    assert not config.tied_head
    with pytest.raises(CheckpointMismatch, match=r"lm_head\.weight .* is missing"):
        load(directory, config, on_one_device(config))


def test_ids_that_only_the_generation_config_has(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("bart")
    directory = write(tmp_path, read_tensors(case.directory), read_settings("bart"))
    (directory / "generation_config.json").write_text(
        json.dumps({"forced_bos_token_id": 0, "forced_eos_token_id": 2, "eos_token_id": [2, 7], "pad_token_id": 3})
    )
    config = huggingface.read_config(directory)
    assert (config.forced_bos_id, config.forced_eos_id, config.end_ids, config.pad_id) == (0, 2, (2, 7), 1)


def test_a_layer_that_is_missing_is_not_drawn_while_the_others_are_there(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("gpt2")
    tensors = read_tensors(case.directory)
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    directory = write(tmp_path, tensors, read_settings("gpt2"))
    with pytest.raises(CheckpointMismatch, match=r"h\.1\.mlp\.c_fc\.bias \(96,\) is missing"):
        load(directory, case.config, case.abstract, allow_missing=["decoder/layers/mlp/up/bias"])


def test_a_fused_tensor_may_be_missing_only_with_all_its_parts(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("gpt2")
    tensors = {k: v for k, v in read_tensors(case.directory).items() if not k.endswith("c_attn.bias")}
    directory = write(tmp_path, tensors, read_settings("gpt2"))
    with pytest.raises(CheckpointMismatch, match=r"h\.0\.attn\.c_attn\.bias \(72,\) is missing"):
        load(directory, case.config, case.abstract, allow_missing=["*/query/bias"])
    parts = [f"*/{part}/bias" for part in ("query", "key", "value")]
    got = flat(load(directory, case.config, case.abstract, allow_missing=parts))
    assert not np.any(got["decoder/layers/self_attention/key/bias"])


def test_two_tensors_for_one_place_are_one_too_many(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("gpt2")
    tensors = read_tensors(case.directory)
    tensors["wte.weight"] = tensors["transformer.wte.weight"] + 1
    with pytest.raises(CheckpointMismatch, match=r"wte\.weight \(98, 24\) is not used"):
        load(write(tmp_path, tensors, read_settings("gpt2")), case.config, case.abstract)


def test_what_a_model_may_leave_unread(huggingface_case: Any) -> None:
    case = huggingface_case("bert_pretraining")
    config = dataclasses.replace(case.config, head="sequence_classification", head_bias=False, num_labels=3)
    abstract = on_one_device(config)
    new = {"allow_missing": ["classifier/*"]}
    with pytest.raises(CheckpointMismatch, match=r"cls\.predictions\.bias \(95,\) is not used"):
        load(case.directory, config, abstract, **new)
    got = flat(load(case.directory, config, abstract, allow_unused=["cls.*"], **new))
    expected = flat(case.params)
    assert_same({k: v for k, v in got.items() if k in expected}, {k: v for k, v in expected.items() if k in got})
    assert got.keys() - expected.keys() == {"classifier/kernel", "classifier/bias"}
    with pytest.raises(InputError, match=r"allow_unused 'clas\.\*' fits none of "):
        load(case.directory, config, abstract, allow_unused=["clas.*"])
    with pytest.raises(CheckpointMismatch, match="is missing"):  # what is needed is read, whatever may be left
        load(case.directory, case.config, on_one_device(dataclasses.replace(case.config, num_encoder_layers=4)),
             allow_unused=["bert.*"])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"n_layer": None}),
        ("gpt2", {"vocab_size": "many"}),
        ("bart", {"d_model": None}),
        ("t5_v1_1", {"feed_forward_proj": None}),
        ("llama_gqa", {"rope_theta": "x", "rope_parameters": "y"}),
        ("bert_mlm", {"architectures": 3}),
    ],
)
def test_a_setting_of_the_wrong_kind_is_bad_input(
    name: str, settings: dict[str, Any], huggingface_case: Any, tmp_path: Path
) -> None:
    case = huggingface_case(name)
    directory = write(tmp_path, read_tensors(case.directory), {**read_settings(name), **settings})
    with pytest.raises(InputError, match=r"config\.json") as caught:
        huggingface.read_config(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "cannot read .*config.json: No such file"),
        ("{", "config.json is not JSON"),
        ("[1]", "config.json is not a JSON object"),
        ('"gpt2"', "config.json is not a JSON object"),
        ("\udcff", "config.json is not JSON"),
        ("{}", "config.json has neither a model_type nor architectures"),
        ('{"architectures": 5}', "config.json has neither a model_type nor architectures"),
        ('{"model_type": null}', "model_type '.*' is unknown, allowed: t5, "),
        ('{"model_type": "gpt-2"}', "model_type 'gpt-2' is unknown, allowed: .*did you mean 'gpt2'"),
        ('{"model_type": "longt5"}', "model_type 'longt5' is not supported: its encoder"),
        ('{"model_type": "gpt2"}', "no weights in .*looked for model.safetensors"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        huggingface.read_config(tmp_path)
    assert "\n" not in str(caught.value)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_what_was_read(name: str, huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case(name)
    config = huggingface.read_config(case.directory)
    directory = tmp_path / "new" / "model"
    huggingface.save(case.params, config, directory)
    wanted, got = read_tensors(case.directory), read_tensors(directory)
    if name == "bert_model":  # the only base model: it may have the prefix or not, and gets it
        wanted = renamed(wanted, "^", "bert.")
    assert_same(got, {tensor: array for tensor, array in wanted.items() if tensor in got})
    for tensor in wanted.keys() - got.keys():  # transformers stores no tensor twice, but not every version
        assert any(np.array_equal(wanted[tensor], array) for array in got.values()), tensor
    assert huggingface.read_config(directory) == config
    assert_same(load(directory, config, case.abstract), case.params)
    generation = directory / "generation_config.json"
    assert generation.exists() == (config.num_decoder_layers > 0)
    settings = json.loads((directory / "config.json").read_text())
    assert settings["torch_dtype"] == "float32"
    assert settings["architectures"] == [re.sub(r"^MT5", "T5", case.notes["hf_class"])]
    assert not list(directory.glob("*.partial"))


def test_what_transformers_cannot_do_is_not_written(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("gpt3_sparse")
    with pytest.raises(InputError, match=r"model.attention_window 5 cannot be written .*GPT2LMHeadModel"):
        huggingface.save(case.params, case.config, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_model_is_written_over(huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case("bert_mlm")
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(InputError, match="holds a model already"):
        huggingface.save(case.params, case.config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["gpt2", "t5_v1_1", "bart"])
def test_bfloat16_is_stable(name: str, huggingface_case: Any, tmp_path: Path) -> None:
    case = huggingface_case(name)
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding), case.abstract
    )
    params = load(case.directory, case.config, half)
    assert_same(params, jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), case.params))
    for directory in (tmp_path / "first", tmp_path / "second"):
        huggingface.save(params, case.config, directory)
        assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
        assert set(open_tensors(directory).dtypes.values()) == {np.dtype(ml_dtypes.bfloat16)}
        again = load(directory, case.config, half)
        assert_same(again, params)
        params = again
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    wide = load(tmp_path / "first", case.config, case.abstract)
    assert_same(wide, jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), params))


# --- layouts and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5_sharded", "llama2_head_dim", "gpt2", "bart", "bert_mlm"])
def test_every_shard_is_read_once_to_where_it_stays(
    name: str, huggingface_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = huggingface_case(name)
    layouts = tree_shardings(make_mesh("data:2,fsdp:2,model:2"), case.model.logical_axes(), case.abstract)
    abstract = jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), case.abstract, layouts
    )
    read, sizes = StoredTensor.read, []

    def counted(*arguments: Any) -> np.ndarray:
        array = read(*arguments)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(StoredTensor, "read", counted)
    params = load(case.directory, case.config, abstract)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == layouts
    assert_same(params, case.params)
    # Besides, a head of its own is compared with the embedding table.
    compared = 0 if case.config.tied_head else 2 * case.params["embedding"]["table"].nbytes
    assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(case.params)) + compared

    expected, ways = flat(case.params), {}
    for path, leaf in flatten_dict(params, sep="/").items():
        ways[path] = len({str(shard.index) for shard in leaf.addressable_shards})
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[path][shard.index], err_msg=path)
    assert {ways[path] for path in ways if path.endswith(("embedding/table", "attention/query/kernel"))} == {4}

    # From many devices to one file.
    for directory, tree in {"one": case.params, "many": params}.items():
        huggingface.save(tree, case.config, tmp_path / directory)
    one, many = ((tmp_path / directory / "model.safetensors").read_bytes() for directory in ("one", "many"))
    assert one == many


MEMORY = """
import sys
from pathlib import Path

import jax

from t5x_lite.interop import huggingface
from t5x_lite.models import build


def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


config = huggingface.read_config(sys.argv[1])
(device,) = jax.devices()
layout = jax.sharding.SingleDeviceSharding(device)
shapes = build(config).param_shapes()
abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), shapes)
jax.block_until_ready(jax.device_put(0.0, device))
before = kilobytes("VmRSS")
params = jax.block_until_ready(huggingface.load_params(sys.argv[1], config, abstract))
print(kilobytes("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell what memory is in use")
def test_loading_takes_the_memory_of_the_parameters_and_of_one_tensor(
    tiny_config: TransformerConfig, tmp_path: Path
) -> None:
    # 180 MB. No tensor in the file has more than 8, but the stacks of the encoder's attention, read last, have 25.
    config = dataclasses.replace(
        tiny_config,
        vocab_size=4096,
        embed_dim=512,
        num_heads=24,
        head_dim=128,
        mlp_dim=1024,
        num_encoder_layers=4,
        num_decoder_layers=1,
        gated=False,
        tied_head=True,
        scaled_head=True,
    )
    rng = np.random.default_rng(0)
    shapes = build(config).param_shapes()
    huggingface.save(jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes), config, tmp_path / "model")
    largest = max(int(np.prod(shape)) for shape in open_tensors(tmp_path / "model").shapes.values()) * 4 // 1024
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    taken, parameters = map(int, result.stdout.split())
    assert parameters > 170_000
    # 2 MB: the header, and what the allocator keeps of small arrays.
    assert taken <= parameters + 1.3 * largest + 2048
