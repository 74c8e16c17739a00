"""Llama 1 to 3.2 (Touvron et al. 2023a, 2023b; Meta 2024) and PaLM (Chowdhery et al. 2022), by their published names.

All are decoders with rotary positions, gated silu feed-forward blocks and no biases. Llama has RMS norms, and from
Llama 2 70B on fewer heads for keys and values; Mistral is a Llama with an attention window. PaLM's weights were never
published: its presets are for training.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from t5x_lite.errors import InputError
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
    "family": "llama",
    "num_encoder_layers": 0,
    "gated": True,
    "scaled_attention": True,
    "positions": "rotary",
    "scaled_head": False,
    "mlp_dropout_rate": 0.0,
    "dropout_style": "elementwise",
    "initialization": "normal",
}


def _llama(embed_dim: int, mlp_dim: int, layers: int, heads: int, kv_heads: int = 0) -> TransformerConfig:
    return TransformerConfig(
        **_COMMON,
        vocab_size=32000,
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=embed_dim // heads,
        mlp_dim=mlp_dim,
        num_decoder_layers=layers,
        activation="silu",
        max_positions=2048,
        tied_head=False,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        pad_id=None,
        bos_id=1,
        eos_id=2,
        decoder_start_id=1,
    )


_V2: dict[str, Any] = {"norm_epsilon": 1e-5, "max_positions": 4096}
_V3: dict[str, Any] = {
    "vocab_size": 128256,
    "norm_epsilon": 1e-5,
    "max_positions": 8192,
    "rotary_base": 500000.0,
    "bos_id": 128000,
    "eos_id": 128001,
    "decoder_start_id": 128000,
}
_V3_1: dict[str, Any] = _V3 | {"max_positions": 131072, "rotary_scaling": (8.0, 1.0, 4.0, 8192)}
_V3_2: dict[str, Any] = _V3_1 | {"rotary_scaling": (32.0, 1.0, 4.0, 8192), "tied_head": True}


def _palm(embed_dim: int, layers: int, heads: int) -> TransformerConfig:
    # What the paper does not tell: epsilon, and the ids of a vocabulary that was not published (here T5's).
    return replace(
        _llama(embed_dim, 4 * embed_dim, layers, heads, kv_heads=1),
        family="palm",
        vocab_size=256000,
        head_dim=256,
        norm="layer",
        parallel_block=True,
        tied_head=True,
        scaled_head=True,
        initialization="fan_in",
        pad_id=0,
        bos_id=None,
        eos_id=1,
        decoder_start_id=1,
    )


PRESETS: dict[str, TransformerConfig] = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-30b": _llama(6656, 17920, 60, 52),
    "llama-65b": replace(_llama(8192, 22016, 80, 64), norm_epsilon=1e-5),
    "llama-2-7b": replace(_llama(4096, 11008, 32, 32), **_V2),
    "llama-2-13b": replace(_llama(5120, 13824, 40, 40), **_V2),
    "llama-2-70b": replace(_llama(8192, 28672, 80, 64, kv_heads=8), **_V2),
    "llama-3-8b": replace(_llama(4096, 14336, 32, 32, kv_heads=8), **_V3),
    "llama-3-70b": replace(_llama(8192, 28672, 80, 64, kv_heads=8), **_V3),
    "llama-3.1-8b": replace(_llama(4096, 14336, 32, 32, kv_heads=8), **_V3_1),
    "llama-3.1-70b": replace(_llama(8192, 28672, 80, 64, kv_heads=8), **_V3_1),
    "llama-3.1-405b": replace(_llama(16384, 53248, 126, 128, kv_heads=8), **_V3_1),
    "llama-3.2-1b": replace(_llama(2048, 8192, 16, 32, kv_heads=8), **_V3_2),
    "llama-3.2-3b": replace(_llama(3072, 8192, 28, 24, kv_heads=8), **_V3_2),
    "palm-8b": _palm(4096, 32, 16),
    "palm-62b": _palm(8192, 64, 32),
    "palm-540b": _palm(18432, 118, 48),
    # Nobody published this one: a decoder of today's parts to train one's own, of GPT-2's size, with T5's vocabulary.
    "decoder-small": replace(
        _llama(768, 2048, 12, 12), vocab_size=32128, tied_head=True, pad_id=0, bos_id=None, eos_id=1
    ),
}

PREFIX = {"llama": "model.", "mistral": "model."}
BUFFERS: tuple[str, ...] = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def from_huggingface(settings: Settings, names: Collection[str]) -> TransformerConfig:
    """Returns the configuration that a Llama's or Mistral's config.json describes; see `registry.Family`."""
    mistral = settings.get("model_type") == "mistral"
    require(settings, attention_bias=False, mlp_bias=False)
    ids = token_ids(settings, pad=None, bos=1, eos=2)
    heads = settings.get("num_attention_heads", 32)
    kv_heads = settings.get("num_key_value_heads", 8 if mistral else None) or heads
    base, scaling = _rotary(settings)
    return TransformerConfig(
        **_COMMON,
        vocab_size=settings.get("vocab_size", 32000),
        embed_dim=settings.get("hidden_size", 4096),
        num_heads=heads,
        num_kv_heads=0 if kv_heads == heads else kv_heads,
        head_dim=settings.get("head_dim") or divided(settings, "hidden_size", "num_attention_heads", (4096, 32)),
        mlp_dim=settings.get("intermediate_size", 14336 if mistral else 11008),
        num_decoder_layers=layers(settings, "num_hidden_layers", 32),
        activation=activation(settings.get("hidden_act", "silu"), "hidden_act"),
        norm_epsilon=settings.get("rms_norm_eps", 1e-6),
        attention_window=(settings.get("sliding_window", 4096) or 0) if mistral else 0,
        max_positions=settings.get("max_position_embeddings", 4096 * 32 if mistral else 2048),
        rotary_base=base,
        rotary_scaling=scaling,
        tied_head=is_tied(settings, names, "lm_head.weight", default=False),
        dropout_rate=0.0,
        attention_dropout_rate=settings.get("attention_dropout", 0.0),
        init_std=settings.get("initializer_range", 0.02),
        decoder_start_id=first_id(settings.get("decoder_start_token_id"), ids["bos_id"], ids["eos_id"]),
        **ids,
    )


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rotary(settings: Settings) -> tuple[float, tuple[float, float, float, int] | None]:
    """Returns base and scaling: transformers 4 writes `rope_theta` and `rope_scaling`, 5 `rope_parameters`."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    require({**settings, **rope}, partial_rotary_factor=1.0)
    base = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise InputError(f"rope_type '{kind}' in config.json is not supported, allowed: default, llama3")
    absent = [key for key in _LLAMA3 if key not in rope]
    if absent:
        raise InputError(f"{absent[0]} is missing in config.json: rope_type llama3 needs {', '.join(_LLAMA3)}")
    factor, low, high, length = (rope[key] for key in _LLAMA3)
    return base, (float(factor), float(low), float(high), length)


def to_huggingface(config: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a Llama or Mistral, for transformers 4 and 5; see `registry.Family`."""
    mistral = config.attention_window > 0
    scaling = config.rotary_scaling
    window = {"sliding_window": config.attention_window} if mistral else {"attention_bias": False, "mlp_bias": False}
    settings = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_decoder_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads(True),
        "head_dim": config.head_dim,
        "hidden_act": activation_name(config),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": None if scaling is None else dict(zip(_LLAMA3, scaling, strict=True), rope_type="llama3"),
        **window,
        "attention_dropout": config.rate(config.attention_dropout_rate),
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "decoder_start_token_id": config.decoder_start_id,
        **id_settings(config),
    }
    return written(config, settings, from_huggingface)


def weights(config: TransformerConfig) -> Table:
    """Returns where each parameter of `config` is in a Hugging Face file; see `registry.Family`."""
    layer = "model.layers.{}"
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    table = under("self_attention", linears(f"{layer}.self_attn", attention, bias=False))
    table |= under("self_attention_norm", norm(f"{layer}.input_layernorm", bias=False))
    table |= under("mlp", linears(f"{layer}.mlp", mlp, bias=False))
    if not config.parallel_block:
        table |= under("mlp_norm", norm(f"{layer}.post_attention_layernorm", bias=False))
    table = under("decoder/layers", table) | under("decoder/final_norm", norm("model.norm", bias=False))
    head = ("lm_head.weight",)
    table["embedding/table"] = Stored("model.embed_tokens.weight", also=head if config.tied_head else ())
    return table if config.tied_head else table | {"head/kernel": Stored(head[0], transposed=True)}
