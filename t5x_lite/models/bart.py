"""BART (Lewis et al. 2020) and mBART (Liu et al. 2020), by their published names.

BART normalises after each sub-layer and the embedding; mBART before each, the embedding, and after the last block, and
multiplies embeddings by sqrt(embed_dim). Both keep two unused rows before position 0, and a number added to each logit.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.weights import (
    Settings,
    Stored,
    Table,
    activation,
    activation_name,
    divided,
    first_id,
    id_settings,
    is_tied,
    layers,
    linears,
    norm,
    require,
    token_ids,
    under,
    written,
)

_COMMON: dict[str, Any] = {
    "family": "bart",
    "bias": True,
    "norm": "layer",
    "norm_epsilon": 1e-5,
    "embedding_norm": True,
    "scaled_attention": True,
    "positions": "learned",
    "position_offset": 2,
    "scaled_head": False,
    "head_bias": True,
    "dropout_style": "elementwise",
    "initialization": "normal",
}
_BART: dict[str, Any] = {"norm_position": "post", "final_norm": False}
_MBART: dict[str, Any] = {"norm_position": "pre", "final_norm": True}

_LARGE = TransformerConfig(
    **_COMMON,
    **_BART,
    vocab_size=50265,
    embed_dim=1024,
    num_heads=16,
    mlp_dim=4096,
    num_encoder_layers=12,
    num_decoder_layers=12,
    activation="gelu",
    max_positions=1024,
    attention_dropout_rate=0.1,
    mlp_dropout_rate=0.1,
    pad_id=1,
    bos_id=0,
    eos_id=2,
    decoder_start_id=2,
    forced_bos_id=0,
    forced_eos_id=2,
)
# Fine-tuned without the mask token.
_CNN = replace(_LARGE, vocab_size=50264, attention_dropout_rate=0.0, mlp_dropout_rate=0.0)
# In generation, the decoder of cc25 starts with the target's language and that of mBART-50 is forced to begin with it:
# `decoder_start_id` or `forced_bos_id` is for whoever generates.
_CC25 = replace(_CNN, **_MBART, vocab_size=250027, scaled_embedding=True, decoder_start_id=0, forced_bos_id=None)

PRESETS: dict[str, TransformerConfig] = {
    "bart-base": replace(_LARGE, embed_dim=768, num_heads=12, mlp_dim=3072, num_encoder_layers=6, num_decoder_layers=6),
    "bart-large": _LARGE,
    "bart-large-cnn": _CNN,
    "bart-large-xsum": replace(_CNN, forced_bos_id=None),
    "mbart-large-cc25": _CC25,
    "mbart-large-50": replace(_CC25, vocab_size=250054, decoder_start_id=2),
}

PREFIX = {"bart": "model.", "mbart": "model."}
BUFFERS: tuple[str, ...] = (r"(model\.)?(encoder|decoder)\.version",)  # fairseq's, in early files


def from_huggingface(settings: Settings, names: Collection[str]) -> TransformerConfig:
    """Returns the configuration that a BART's or mBART's config.json describes; see `registry.Family`."""
    mbart = settings.get("model_type") == "mbart"
    require(settings, is_encoder_decoder=True, is_decoder=False)
    ids = token_ids({"forced_eos_token_id": 2, **settings}, pad=1, bos=0, eos=2)
    if settings.get("force_bos_token_to_be_generated") and ids["forced_bos_id"] is None:  # its name until 4.3
        ids["forced_bos_id"] = ids["bos_id"]
    head_dim = divided(settings, "d_model", "encoder_attention_heads", (1024, 16))
    divided(settings, "d_model", "decoder_attention_heads", (1024, 16))
    # An encoder-decoder without its head, as facebook/bart-large is stored, has no logit biases.
    bias = {"head_bias": not names or "final_logits_bias" in names}
    start = settings.get("decoder_start_token_id", None if mbart else 2)
    return TransformerConfig(
        **_COMMON | (_MBART if mbart else _BART) | bias,
        vocab_size=settings.get("vocab_size", 50265),
        embed_dim=settings.get("d_model", 1024),
        num_heads=settings.get("encoder_attention_heads", 16),
        head_dim=head_dim,
        mlp_dim=settings.get("encoder_ffn_dim", 4096),
        num_encoder_layers=layers(settings, "encoder_layers", 12),
        num_decoder_layers=layers(settings, "decoder_layers", 12),
        **_decoder_sizes(settings),
        activation=activation(settings.get("activation_function", "gelu"), "activation_function"),
        max_positions=settings.get("max_position_embeddings", 1024),
        scaled_embedding=settings.get("scale_embedding", False),
        tied_head=is_tied(settings, names, "lm_head.weight"),
        dropout_rate=settings.get("dropout", 0.1),
        attention_dropout_rate=settings.get("attention_dropout", 0.0),
        mlp_dropout_rate=settings.get("activation_dropout", 0.0),
        init_std=settings.get("init_std", 0.02),
        decoder_start_id=first_id(start, ids["bos_id"]),
        **ids,
    )


def _decoder_sizes(settings: Settings) -> dict[str, int]:
    """Returns those sizes of the decoder that are not the encoder's."""
    fields = {"decoder_num_heads": ("attention_heads", 16), "decoder_mlp_dim": ("ffn_dim", 4096)}
    sizes = {}
    for field, (key, default) in fields.items():
        encoder, decoder = (settings.get(f"{stack}_{key}", default) for stack in ("encoder", "decoder"))
        sizes[field] = 0 if encoder == decoder else decoder
    return sizes


def to_huggingface(config: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a BART or mBART, for transformers 4 and 5; see `registry.Family`."""
    kind, name = ("mbart", "MBart") if config.norm_position == "pre" else ("bart", "Bart")
    settings = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": config.heads(False),
        "decoder_attention_heads": config.heads(True),
        "encoder_ffn_dim": config.stack_mlp_dim(False),
        "decoder_ffn_dim": config.stack_mlp_dim(True),
        "activation_function": activation_name(config),
        "max_position_embeddings": config.max_positions,
        "scale_embedding": config.scaled_embedding,
        "dropout": config.dropout_rate,
        "attention_dropout": config.rate(config.attention_dropout_rate),
        "activation_dropout": config.rate(config.mlp_dropout_rate),
        "init_std": config.init_std,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tied_head,
        "decoder_start_token_id": config.decoder_start_id,
        "forced_eos_token_id": None,  # absent is 2
        **id_settings(config),
    }
    return written(config, settings, from_huggingface, ignore=("head_bias",))  # absent biases are zeros


def weights(config: TransformerConfig) -> Table:
    """Returns where each parameter of `config` is in a Hugging Face file; see `registry.Family`."""
    head = ("lm_head.weight",)
    same = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    table = {"embedding/table": Stored("model.shared.weight", also=same + (head if config.tied_head else ()))}
    table |= under("encoder", _stack(config, "model.encoder", self_attention="self_attn"))
    table |= under(
        "decoder", _stack(config, "model.decoder", self_attention="self_attn", cross_attention="encoder_attn")
    )
    if not config.tied_head:
        table["head/kernel"] = Stored(head[0], transposed=True)
    if config.head_bias:
        table["head/bias"] = Stored("final_logits_bias", row=True)
    return table


_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def _stack(config: TransformerConfig, stack: str, **attentions: str) -> Table:
    layer = f"{stack}.layers.{{}}"
    table: Table = {}
    for ours, theirs in attentions.items():
        table |= under(ours, linears(f"{layer}.{theirs}", _ATTENTION))
        table |= under(f"{ours}_norm", norm(f"{layer}.{theirs}_layer_norm"))
    table |= under("mlp", linears(layer, {"up": "fc1", "down": "fc2"}))
    table |= under("mlp_norm", norm(f"{layer}.final_layer_norm"))
    table = under("layers", table)
    table["positions/table"] = Stored(f"{stack}.embed_positions.weight")
    table |= under("embedding_norm", norm(f"{stack}.layernorm_embedding"))
    return table | (under("final_norm", norm(f"{stack}.layer_norm")) if config.final_norm else {})
