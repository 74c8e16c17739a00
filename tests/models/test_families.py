import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from t5x_lite.errors import InputError
from t5x_lite.models import PRESETS, TransformerConfig
from t5x_lite.models.registry import FAMILIES, Family, module_for, module_for_model_type

FIXTURES = sorted(Path(__file__).parent.parent.joinpath("fixtures", "huggingface").glob("*/hf/config.json"))
IDS = [path.parent.parent.name for path in FIXTURES]


def read(settings: dict[str, Any], names: Any = ()) -> TransformerConfig:
    return module_for_model_type(settings["model_type"]).from_huggingface(settings, names)


def header(path: Path) -> dict[str, list[int]]:
    """The tensors of a safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tensor["shape"] for name, tensor in tensors.items() if name != "__metadata__"}


def tensors(fixture: Path) -> dict[str, list[int]]:
    """All of a checkpoint, with the prefix that files of a base model leave out."""
    names = {k: v for path in sorted(fixture.parent.glob("*.safetensors")) for k, v in header(path).items()}
    kind = json.loads(fixture.read_text())["model_type"]
    prefix = module_for_model_type(kind).PREFIX[kind]
    bare = not any(name.startswith(prefix) for name in names)
    return {f"{prefix}{name}" if bare else name: shape for name, shape in names.items()}


def files_of(fixture: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[int]]]:
    v4 = fixture.parent.parent / "config_v4.json"
    return json.loads(v4.read_text()), json.loads(fixture.read_text()), tensors(fixture)


# --- reading and writing settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", FIXTURES, ids=IDS)
def test_both_spellings_are_the_same_configuration(fixture: Path) -> None:
    v4, v5, names = files_of(fixture)
    assert read(v4, names) == read(v5, names)


@pytest.mark.parametrize("fixture", FIXTURES, ids=IDS)
def test_what_is_written_reads_back(fixture: Path) -> None:
    v4, _, names = files_of(fixture)
    config = read(v4, names)
    assert read(module_for(config).to_huggingface(config), names) == config


MEANING = {
    "t5_v1_0": {"activation": "relu", "gated": False, "tied_head": True, "scaled_head": True},
    "t5_v1_1": {"activation": "gelu_tanh", "gated": True, "tied_head": False, "scaled_head": False},
    "mt5": {"tied_head": False, "scaled_head": False, "num_encoder_layers": 3, "num_decoder_layers": 2},
    "bart": {"activation": "gelu", "decoder_mlp_dim": 48, "decoder_num_heads": 0, "mlp_dim": 60, "final_norm": False},
    "bart_scaled": {
        "scaled_embedding": True,
        "num_heads": 2,
        "head_dim": 16,
        "decoder_num_heads": 4,
        "head_bias": True,
    },
    "mbart": {"norm_position": "pre", "final_norm": True, "embedding_norm": True, "decoder_start_id": 91},
    "gpt2": {"activation": "gelu_tanh", "mlp_dim": 96, "pad_id": None, "eos_id": 97, "decoder_start_id": 97},
    "gpt2_ninner": {"mlp_dim": 88, "norm_epsilon": 1e-3},
    "openai_gpt": {"activation": "gelu_tanh", "norm_position": "post", "final_norm": False, "bos_id": None},
    "llama_gqa": {"num_kv_heads": 2, "head_dim": 12, "tied_head": False, "rotary_scaling": None},
    "llama_tied": {"num_kv_heads": 0, "tied_head": True, "norm_epsilon": 1e-3},
    "llama3_rope": {"rotary_scaling": (8.0, 1.0, 4.0, 64), "rotary_base": 500000.0, "num_kv_heads": 1},
    "bert_pretraining": {"head": "pretraining", "pooler": True, "head_bias": True, "norm_epsilon": 1e-12},
    "bert_seqcls": {"head": "sequence_classification", "num_labels": 3, "pooler": True, "head_bias": False},
    "umt5": {"relative_bias_per_layer": True, "tied_head": False, "scaled_head": False},
    "sliding_window": {"attention_window": 6, "alternating_window": False, "num_kv_heads": 2},
    "llama2_head_dim": {"head_dim": 6},
    "bert_model": {"head": None, "pooler": True},
    "bert_mlm": {"head": "masked_lm", "pooler": False},
    "bert_qa": {"head": "span", "pooler": False},
    "bert_tokencls": {"head": "token_classification", "pooler": False},
    "roberta_seqcls": {"head": "sequence_classification", "pooler": True, "num_labels": 3},
    "roberta_mlm": {"head": "masked_lm", "pooler": False, "position_offset": 2, "max_positions": 36, "token_types": 1},
}


@pytest.mark.parametrize("name", MEANING)
def test_settings_mean_what_they_say(name: str) -> None:
    _, v5, names = files_of(FIXTURES[IDS.index(name)])
    config = read(v5, names)
    assert {field: getattr(config, field) for field in MEANING[name]} == MEANING[name]


# LlamaForCausalLM has no PaLM in it.
UNWRITABLE = ("palm-8b", "palm-62b", "palm-540b")


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in UNWRITABLE])
def test_presets_are_what_hugging_face_writes(name: str) -> None:
    config = PRESETS[name]
    settings = json.loads(json.dumps(module_for(config).to_huggingface(config)))
    assert read(settings) == config


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("palm-8b", {}, ["model.norm 'layer'", "LlamaForCausalLM has 'rms'"]),
        ("gpt3-1.3b", {"num_heads": 24}, ["model.head_dim 128", "85.3"]),
        ("gpt2", {"attention_window": 256}, ["model.attention_window 256", "GPT2LMHeadModel has 0"]),
        ("gpt2", {"positions": "sinusoidal"}, ["model.positions 'sinusoidal'", "'learned'"]),
        ("gpt2", {"norm": "rms"}, ["model.norm 'rms'", "'layer'"]),
        ("openai-gpt", {"mlp_dim": 100}, ["model.mlp_dim 100", "OpenAIGPTLMHeadModel has 3072"]),
        ("llama-7b", {"gated": False}, ["model.gated False", "True"]),
        ("llama-7b", {"attention_window": 8, "alternating_window": True}, ["model.alternating_window True"]),
        ("t5-small", {"scaled_head": False}, ["model.scaled_head False", "T5ForConditionalGeneration has True"]),
        ("t5-v1.1-small", {"activation": "gelu"}, ["model.activation 'gelu'", "'gelu_tanh'"]),
        ("t5-small", {"num_decoder_layers": 0}, ["num_decoder_layers", "at least 1"]),
        ("bart-base", {"norm_epsilon": 1e-6}, ["model.norm_epsilon 1e-06", "1e-05"]),
        ("bart-base", {"position_offset": 0}, ["model.position_offset 0", "2"]),
        ("bert-base-uncased", {"norm_position": "pre"}, ["model.norm_position 'pre'", "BertForPreTraining has 'post'"]),
        ("roberta-base", {"position_offset": 3, "max_positions": 511}, ["model.max_positions 511", "512"]),
        ("roberta-base", {"head": "pretraining", "pooler": True}, ["RobertaForPreTraining", "RobertaForMaskedLM"]),
    ],
)
def test_what_hugging_face_does_not_have_is_refused(name: str, changes: dict[str, Any], words: list[str]) -> None:
    config = dataclasses.replace(PRESETS[name], **changes)
    with pytest.raises(InputError) as caught:
        module_for(config).to_huggingface(config)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_window_makes_a_llama_a_mistral() -> None:
    config = dataclasses.replace(PRESETS["llama-3-8b"], attention_window=4096)
    settings = FAMILIES["llama"].to_huggingface(config)
    assert (settings["model_type"], settings["sliding_window"]) == ("mistral", 4096)
    assert read(settings) == config
    assert read({**settings, "sliding_window": None}).attention_window == 0
    assert read({"model_type": "mistral"}).attention_window == 4096


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("t5", {"feed_forward_proj": "gated-mish"}, ["feed_forward_proj 'mish'", "relu, gelu"]),
    ("t5", {"is_encoder_decoder": False}, ["is_encoder_decoder False", "True"]),
    ("t5", {"pruned_heads": {"0": [1]}}, ["pruned_heads", "{}"]),
    ("bart", {"activation_function": "tanh"}, ["activation_function 'tanh'"]),
    ("bart", {"encoder_attention_heads": 7}, ["d_model 1024", "encoder_attention_heads 7"]),
    ("bart", {"decoder_layers": 0}, ["decoder_layers", "at least 1, not 0"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx True", "False"]),
    ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights False", "True"]),
    ("gpt2", {"add_cross_attention": True}, ["add_cross_attention True"]),
    ("gpt2", {"activation_function": "gelu_nwe"}, ["'gelu_nwe'", "did you mean 'gelu_new'"]),
    ("gpt2", {"n_head": 7}, ["n_embd 768", "n_head 7"]),
    ("llama", {"attention_bias": True}, ["attention_bias True"]),
    ("llama", {"mlp_bias": True}, ["mlp_bias True"]),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type 'linear'", "default, llama3"]),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type 'dynamic'"]),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_type 'yarn'"]),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor is missing"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5", "1.0"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ("bert", {"position_embedding_type": "relative_key"}, ["position_embedding_type 'relative_key'", "absolute"]),
    ("bert", {"is_decoder": True}, ["is_decoder True"]),
    ("bert", {"hidden_act": "quick_gelu"}, ["hidden_act 'quick_gelu'"]),
    ("bert", {"architectures": ["BertForMultipleChoice"]}, ["'BertForMultipleChoice'", "BertForMaskedLM"]),
    ("roberta", {"pad_token_id": None}, ["pad_token_id null"]),
    ("roberta", {"architectures": ["RobertaForMaskedLM"], "hidden_act": "relu"}, ["hidden_act 'relu'"]),
]


@pytest.mark.parametrize(("kind", "settings", "words"), REFUSED, ids=[f"{k}-{next(iter(s))}" for k, s, _ in REFUSED])
def test_settings_that_we_do_not_have_are_refused(kind: str, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read({"model_type": kind, **settings})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["t5", "mt5", "umt5", "bart", "mbart", "gpt2", "openai-gpt", "llama", "bert", "roberta"]
)
def test_absent_settings_have_the_defaults_of_their_class(kind: str) -> None:
    config = read({"model_type": kind})
    sizes = {
        "t5": (32128, 512, 2048, 6),
        "mt5": (250112, 512, 1024, 8),
        "umt5": (250112, 512, 1024, 8),
        "bart": (50265, 1024, 4096, 12),
        "mbart": (50265, 1024, 4096, 12),
        "gpt2": (50257, 768, 3072, 12),
        "openai-gpt": (40478, 768, 3072, 12),
        "llama": (32000, 4096, 11008, 32),
        "bert": (30522, 768, 3072, 12),
        "roberta": (50265, 768, 3072, 12),
    }
    depth = config.num_decoder_layers or config.num_encoder_layers
    assert (config.vocab_size, config.embed_dim, config.mlp_dim, depth) == sizes[kind]


def test_token_ids() -> None:
    llama = read({"model_type": "llama", "vocab_size": 128256, "eos_token_id": [128001, 128008, 128009]})
    assert (llama.eos_id, llama.stop_ids) == (128001, (128008, 128009))
    assert FAMILIES["llama"].to_huggingface(llama)["eos_token_id"] == [128001, 128008, 128009]
    assert read({"model_type": "llama", "pad_token_id": -1}).pad_id is None
    assert read({"model_type": "gpt2", "bos_token_id": None}).decoder_start_id == 50256
    assert read({"model_type": "openai-gpt"}).decoder_start_id == 0
    bart = read({"model_type": "bart", "force_bos_token_to_be_generated": True})
    assert (bart.forced_bos_id, bart.forced_eos_id, bart.decoder_start_id) == (0, 2, 2)
    assert read({"model_type": "bart", "forced_eos_token_id": None}).forced_eos_id is None


def test_tied_and_scaled_heads_of_t5() -> None:
    def both(*names: str, **settings: Any) -> tuple[bool, bool]:
        config = read({"model_type": "t5", **settings}, names)
        return config.tied_head, config.scaled_head

    head, shared = "lm_head.weight", "shared.weight"
    assert both(shared) == (True, True)
    assert both(shared, head, tie_word_embeddings=False) == (False, False)
    # transformers 5: always tied, as it says.
    assert both(shared, head, tie_word_embeddings=True, scale_decoder_outputs=False) == (False, False)
    assert both(tie_word_embeddings=True, scale_decoder_outputs=False) == (False, False)
    assert both(shared, tie_word_embeddings=True, scale_decoder_outputs=False) == (True, False)
    v5 = {"tie_word_embeddings": True, "transformers_version": "5.23.0"}
    assert both(shared, head, model_type="mt5", **v5) == (False, False)
    assert both(shared, model_type="mt5", **v5) == (True, False)
    assert both(shared, head, model_type="umt5", tie_word_embeddings=False) == (False, False)


def test_heads_of_encoders_are_those_of_class_and_tensors() -> None:
    def head(kind: str, architecture: str, *names: str) -> tuple[str | None, bool]:
        config = read({"model_type": kind, "architectures": [architecture]}, names)
        return config.head, config.pooler

    words, pooler = "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"
    mlm, nsp = "cls.predictions.bias", "cls.seq_relationship.weight"
    assert head("bert", "BertForMaskedLM", words, pooler, mlm, nsp) == ("pretraining", True)
    assert head("bert", "BertForMaskedLM", words, mlm) == ("masked_lm", False)
    assert head("bert", "BertForMaskedLM", words, pooler, mlm) == ("masked_lm", True)
    # What the class says is missing then, and not somebody else's head.
    assert head("bert", "BertForMaskedLM", words, pooler) == ("masked_lm", True)
    assert head("bert", "BertForSequenceClassification", words, "classifier.weight") == (
        "sequence_classification",
        True,
    )
    assert head("bert", "Contriever", words, pooler) == (None, True)
    assert head("bert", "Somebody", words, mlm) == ("masked_lm", False)
    assert head("bert", "BertModel") == (None, True)
    assert head("bert", "BertForTokenClassification", words, pooler, "classifier.weight") == (
        "token_classification",
        True,
    )
    assert head("bert", "BertForQuestionAnswering", words, "qa_outputs.weight") == ("span", False)
    sequence = ("sequence_classification", True)
    assert head("roberta", "RobertaForSequenceClassification", "classifier.out_proj.weight") == sequence
    assert head("xlm-roberta", "XLMRobertaForSequenceClassification") == sequence
    assert head("camembert", "CamembertForMaskedLM", "lm_head.bias") == ("masked_lm", False)


def test_ids_that_the_vocabulary_does_not_have_are_none() -> None:
    config = read({"model_type": "gpt2", "vocab_size": 21128})
    assert (config.bos_id, config.eos_id, config.decoder_start_id) == (None, None, 0)


def test_what_only_training_uses_does_not_keep_a_model_from_loading() -> None:
    assert read({"model_type": "gpt2", "embd_pdrop": 0.0, "resid_pdrop": 0.3}).dropout_rate == 0.3
    bert = {"model_type": "bert", "architectures": ["BertForTokenClassification"], "classifier_dropout": 0.3}
    assert read(bert).head == "token_classification"


def test_unknown_model_types() -> None:
    with pytest.raises(InputError, match=r"model_type 'gpt-2' is unknown, allowed: t5, .*did you mean 'gpt2'"):
        module_for_model_type("gpt-2")
    with pytest.raises(InputError, match=r"'longt5' is not supported: .*transient-global"):
        module_for_model_type("longt5")


# --- weights --------------------------------------------------------------------------------------------------------


def depths(config: TransformerConfig, path: str) -> int:
    return config.num_encoder_layers if path.startswith("encoder") else config.num_decoder_layers


@pytest.mark.parametrize("fixture", FIXTURES, ids=IDS)
def test_the_table_has_every_tensor_of_the_file(fixture: Path) -> None:
    v4, _, names = files_of(fixture)
    config = read(v4, names)
    table = module_for(config).weights(config)
    named = {
        s.name.format(layer) for p, s in table.items() for layer in range(depths(config, p) if "{}" in s.name else 1)
    }
    assert named == names.keys()
    for stored in table.values():
        assert stored.row == (len(names[stored.name.format(0)]) == 2 and stored.name == "final_logits_bias")


# Shapes that no fixture has.
OTHERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "span": ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, {"qa_outputs.weight"}),
    "tokens": ({"model_type": "bert", "architectures": ["BertForTokenClassification"]}, {"classifier.weight"}),
    "roberta": (
        {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]},
        {"classifier.dense.weight", "classifier.out_proj.bias"},
    ),
    "umt5": (
        {"model_type": "umt5", "tie_word_embeddings": False},
        {"decoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight", "lm_head.weight"},
    ),
    "bart": ({"model_type": "bart", "tie_word_embeddings": False}, {"lm_head.weight", "final_logits_bias"}),
    "gpt2": ({"model_type": "gpt2", "tie_word_embeddings": False}, {"lm_head.weight", "transformer.ln_f.bias"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_table_of_other_shapes(name: str) -> None:
    settings, expected = OTHERS[name]
    config = read(settings)
    stored = [stored.name for stored in module_for(config).weights(config).values()]
    assert expected <= set(stored)
    assert "roberta.pooler.dense.weight" not in stored


def test_names_of_early_files() -> None:
    bert = FAMILIES["bert"].weights(PRESETS["bert-base-uncased"])
    assert bert["encoder/embedding_norm/scale"].also == ("bert.embeddings.LayerNorm.gamma",)
    assert bert["embedding/table"].also == ("cls.predictions.decoder.weight",)
    t5 = FAMILIES["t5"].weights(PRESETS["t5-small"])
    assert "lm_head.weight" in t5["embedding/table"].also
    assert "lm_head.weight" not in FAMILIES["t5"].weights(PRESETS["t5-v1.1-small"])["embedding/table"].also


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
        ("bart", "model.encoder.version"),
        ("gpt", "h.11.attn.bias"),
        ("gpt", "transformer.h.0.attn.masked_bias"),
        ("llama", "model.layers.31.self_attn.rotary_emb.inv_freq"),
        ("bert", "bert.embeddings.position_ids"),
        ("roberta", "roberta.embeddings.position_ids"),
    ],
)
def test_buffers_are_known_as_such(family: str, name: str) -> None:
    module: Family = FAMILIES[family]
    assert any(re.fullmatch(pattern, name) for pattern in module.BUFFERS)


def test_no_buffer_is_a_parameter() -> None:
    for name, config in PRESETS.items():
        module = module_for(config)
        for stored in module.weights(config).values():
            names = [stored.name.format(0), *stored.also]
            assert not any(re.fullmatch(pattern, n) for pattern in module.BUFFERS for n in names), (name, names)
