"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019), by their published names.

Encoders that normalise after each sub-layer and the embedding. RoBERTa counts positions from the pad id + 1 and has one
token type. Each has one of the heads of `config.Head`, or none.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from t5x_lite.errors import InputError
from t5x_lite.models.config import Head, TransformerConfig
from t5x_lite.models.weights import (
    Settings,
    Stored,
    Table,
    activation,
    activation_name,
    divided,
    id_settings,
    is_tied,
    layers,
    linear,
    linears,
    norm,
    require,
    token_ids,
    under,
    written,
)

_COMMON: dict[str, Any] = {
    "num_decoder_layers": 0,
    "bias": True,
    "norm": "layer",
    "norm_position": "post",
    "final_norm": False,
    "embedding_norm": True,
    "scaled_attention": True,
    "positions": "learned",
    "scaled_head": False,
    "mlp_dropout_rate": 0.0,
    "dropout_style": "elementwise",
    "initialization": "truncated_normal",
}

_BASE = TransformerConfig(
    **_COMMON,
    family="bert",
    vocab_size=30522,
    embed_dim=768,
    num_heads=12,
    mlp_dim=3072,
    num_encoder_layers=12,
    activation="gelu",
    norm_epsilon=1e-12,
    max_positions=512,
    token_types=2,
    head_bias=True,
    head="pretraining",
    pooler=True,
    attention_dropout_rate=0.1,
    eos_id=None,
)
_ROBERTA = replace(
    _BASE,
    family="roberta",
    vocab_size=50265,
    norm_epsilon=1e-5,
    position_offset=2,
    token_types=1,
    head="masked_lm",
    pooler=False,
    pad_id=1,
    bos_id=0,
    eos_id=2,
)
_LARGE: dict[str, Any] = {"embed_dim": 1024, "num_heads": 16, "mlp_dim": 4096, "num_encoder_layers": 24}

PRESETS: dict[str, TransformerConfig] = {
    "bert-base-uncased": _BASE,
    "bert-base-cased": replace(_BASE, vocab_size=28996),
    "bert-large-uncased": replace(_BASE, **_LARGE),
    "bert-large-cased": replace(_BASE, **_LARGE, vocab_size=28996),
    "roberta-base": _ROBERTA,
    "roberta-large": replace(_ROBERTA, **_LARGE),
}

PREFIX = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "camembert": "roberta."}
BUFFERS: tuple[str, ...] = (
    r"((bert|roberta)\.)?embeddings\.(position_ids|token_type_ids)",
    # Early RoBERTa classifiers were saved with the pooler that they do not use; of other models the table has it.
    r"roberta\.pooler\.dense\.(weight|bias)",
)

_CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
# By prefix: the masked-language-model head, and in it the transform and its norm.
_PREDICTIONS = {
    "bert.": ("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    "roberta.": ("lm_head", "lm_head.dense", "lm_head.layer_norm"),
}
_CLASSIFIES = ("sequence_classification", "token_classification")
_HEADS: dict[str, Head | None] = {
    "Model": None,
    "ForPreTraining": "pretraining",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "span",
}


def from_huggingface(settings: Settings, names: Collection[str]) -> TransformerConfig:
    """Returns the configuration that a BERT's or RoBERTa's config.json describes; see `registry.Family`.

    Head and pooler are those of the tensors: bert-base-uncased says BertForMaskedLM and holds more.
    """
    kind = settings.get("model_type", "bert")
    roberta = kind != "bert"
    ids = token_ids(settings, *(1, 0, 2) if roberta else (0, None, None))
    head, pooler = _parts(settings, names, kind)
    _check(settings, roberta, ids["pad_id"], head)
    offset = ids["pad_id"] + 1 if roberta else 0
    labels = len(settings.get("id2label") or ()) or settings.get("num_labels", 2)
    predicts = head in ("masked_lm", "pretraining")
    return TransformerConfig(
        **_COMMON,
        family="roberta" if roberta else "bert",
        vocab_size=settings.get("vocab_size", 50265 if kind == "roberta" else 30522),
        embed_dim=settings.get("hidden_size", 768),
        num_heads=settings.get("num_attention_heads", 12),
        head_dim=divided(settings, "hidden_size", "num_attention_heads", (768, 12)),
        mlp_dim=settings.get("intermediate_size", 3072),
        num_encoder_layers=layers(settings, "num_hidden_layers", 12),
        activation=activation(settings.get("hidden_act", "gelu"), "hidden_act"),
        norm_epsilon=settings.get("layer_norm_eps", 1e-12),
        max_positions=settings.get("max_position_embeddings", 512) - offset,
        position_offset=offset,
        token_types=settings.get("type_vocab_size", 2),
        tied_head=not predicts or is_tied(settings, names, f"{_PREDICTIONS[PREFIX[kind]][0]}.decoder.weight"),
        head_bias=predicts,
        head=head,
        num_labels=labels if head in _CLASSIFIES else 2,
        pooler=pooler,
        dropout_rate=settings.get("hidden_dropout_prob", 0.1),
        attention_dropout_rate=settings.get("attention_probs_dropout_prob", 0.1),
        init_std=settings.get("initializer_range", 0.02),
        **ids,
    )


def _check(settings: Settings, roberta: bool, pad_id: int | None, head: Head | None) -> None:
    require(settings, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    if roberta and head == "masked_lm":
        require(settings, hidden_act="gelu")  # that of its head, whatever the layers' is
    if roberta and pad_id is None:
        raise InputError("pad_token_id null in config.json is not supported: RoBERTa counts positions from it")


def _parts(settings: Settings, names: Collection[str], kind: str) -> tuple[Head | None, bool]:
    """Returns the head, and whether there is a pooler.

    The class that `architectures` names says what must be there; the tensors may say more, and speak alone for a class
    that is none of ours (facebook/contriever's is a BertModel under another name).
    """
    architecture = (settings.get("architectures") or [f"{_CLASSES[kind]}Model"])[0]
    ending = architecture.removeprefix(_CLASSES[kind])
    known = [known for known in _HEADS if kind == "bert" or known != "ForPreTraining"]
    wanted = _HEADS[ending] if ending in known else None
    if ending not in known and (not names or architecture.startswith(_CLASSES[kind])):
        allowed = ", ".join(_CLASSES[kind] + known for known in known)
        raise InputError(f"architectures '{architecture}' in config.json is not supported, allowed: {allowed}")
    if not names:
        return wanted, ending in ("Model", "ForPreTraining", "ForSequenceClassification")

    def has(beginning: str) -> bool:
        return any(name.startswith(beginning) for name in names)

    head, pooler = wanted, has(f"{PREFIX[kind]}pooler.")
    predicts = has(f"{_PREDICTIONS[PREFIX[kind]][0]}.")
    if wanted in (None, "masked_lm") and predicts:
        head = "pretraining" if has("cls.seq_relationship.") else "masked_lm"
    elif wanted is None and has("qa_outputs."):
        head = "span"
    elif wanted is None and has("classifier."):
        of_sequences = pooler if kind == "bert" else has("classifier.out_proj.")
        head = "sequence_classification" if of_sequences else "token_classification"
    return head, pooler or head in ("pretraining", "sequence_classification")


def to_huggingface(config: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a BERT or RoBERTa, for transformers 4 and 5; see `registry.Family`."""
    kind = "roberta" if config.family == "roberta" else "bert"
    architecture = _CLASSES[kind] + next(ending for ending, head in _HEADS.items() if head == config.head)
    settings = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_encoder_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": activation_name(config),
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.rate(config.attention_dropout_rate),
        "max_position_embeddings": config.max_positions + config.position_offset,
        "type_vocab_size": config.token_types,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "num_labels": config.num_labels,
        **id_settings(config),
    }
    return written(config, settings, from_huggingface, ignore=("pooler",))  # a spare one is left unread


def weights(config: TransformerConfig) -> Table:
    """Returns where each parameter of `config` is in a Hugging Face file; see `registry.Family`."""
    model = "roberta" if config.family == "roberta" else "bert"
    layer = f"{model}.encoder.layer.{{}}"
    attention = {"query": "self.query", "key": "self.key", "value": "self.value", "out": "output.dense"}
    table = under("self_attention", linears(f"{layer}.attention", attention))
    table |= under("self_attention_norm", norm(f"{layer}.attention.output.LayerNorm"))
    table |= under("mlp", linears(layer, {"up": "intermediate.dense", "down": "output.dense"}))
    table |= under("mlp_norm", norm(f"{layer}.output.LayerNorm"))
    table = under("encoder/layers", table)
    table["encoder/positions/table"] = Stored(f"{model}.embeddings.position_embeddings.weight")
    if config.token_types:
        table["encoder/token_types/table"] = Stored(f"{model}.embeddings.token_type_embeddings.weight")
    table |= under("encoder/embedding_norm", norm(f"{model}.embeddings.LayerNorm"))
    return table | _head_weights(config, model)


def _head_weights(config: TransformerConfig, model: str) -> Table:
    head, pooler, classifier = (
        config.head,
        f"{model}.pooler.dense",
        "qa_outputs" if config.head == "span" else "classifier",
    )
    if head == "sequence_classification" and model == "roberta":
        pooler, classifier = "classifier.dense", "classifier.out_proj"  # its pooler is a part of its head
    table = under("pooler", linear(pooler)) if config.pooler else {}
    if head in (*_CLASSIFIES, "span"):
        table |= under("classifier", linear(classifier))
    same: tuple[str, ...] = ()
    if head in ("masked_lm", "pretraining"):
        name, transform, layer_norm = _PREDICTIONS[f"{model}."]
        table |= under("prediction_transform", linear(transform)) | under("prediction_norm", norm(layer_norm))
        if config.head_bias:
            table["head/bias"] = Stored(f"{name}.bias", also=(f"{name}.decoder.bias",))
        if config.tied_head:
            same = (f"{name}.decoder.weight",)
        else:
            table["head/kernel"] = Stored(f"{name}.decoder.weight", transposed=True)
    if head == "pretraining":
        table |= under("next_sentence_head", linear("cls.seq_relationship"))
    return table | {"embedding/table": Stored(f"{model}.embeddings.word_embeddings.weight", also=same)}
