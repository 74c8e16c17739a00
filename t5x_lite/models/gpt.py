"""GPT (Radford et al. 2018), GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020), by their published names.

GPT normalises after each sub-layer; GPT-2 and GPT-3 before each and after the last block. The paper on GPT-3 says that
its layers alternate between dense and locally banded attention, but not how wide the band is. So the presets are dense,
and `dataclasses.replace(preset("gpt3-175b"), attention_window=256, alternating_window=True)` has a band of 256, say.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.weights import (
    Activation,
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
    norm,
    require,
    token_ids,
    under,
    written,
)

_COMMON: dict[str, Any] = {
    "family": "gpt",
    "num_encoder_layers": 0,
    "bias": True,
    "norm": "layer",
    "scaled_attention": True,
    "positions": "learned",
    "scaled_head": False,
    "mlp_dropout_rate": 0.0,
    "dropout_style": "elementwise",
}
_GPT: dict[str, Any] = {"norm_position": "post", "final_norm": False, "initialization": "normal"}
_GPT2: dict[str, Any] = {"norm_position": "pre", "final_norm": True, "initialization": "gpt2"}


def _gpt2(embed_dim: int, layers: int, heads: int, head_dim: int = 64) -> TransformerConfig:
    return TransformerConfig(
        **_COMMON,
        **_GPT2,
        vocab_size=50257,
        embed_dim=embed_dim,
        num_heads=heads,
        head_dim=head_dim,
        mlp_dim=4 * embed_dim,
        num_decoder_layers=layers,
        activation="gelu_tanh",
        norm_epsilon=1e-5,
        max_positions=1024,
        attention_dropout_rate=0.1,
        pad_id=None,
        bos_id=50256,
        eos_id=50256,
        decoder_start_id=50256,
    )


# embed_dim, layers, heads, head_dim: table 2.1 of the paper, but for two slips in it. With its 24 heads the 1.3b would
# have 1,517 million parameters where table D.1 counts 1,320 (16 heads), and with its width of 5140 the 13b would have
# 12,936 where that counts 12,850 (5120, which is also 40 heads of 128).
_GPT3_SIZES = {
    "125m": (768, 12, 12, 64),
    "350m": (1024, 24, 16, 64),
    "760m": (1536, 24, 16, 96),
    "1.3b": (2048, 24, 16, 128),
    "2.7b": (2560, 32, 32, 80),
    "6.7b": (4096, 32, 32, 128),
    "13b": (5120, 40, 40, 128),
    "175b": (12288, 96, 96, 128),
}

PRESETS: dict[str, TransformerConfig] = {
    "openai-gpt": replace(
        _gpt2(768, 12, 12), **_GPT, vocab_size=40478, max_positions=512, bos_id=None, eos_id=None, decoder_start_id=0
    ),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # The paper names no dropout; one epoch of its data needs none.
    **{
        f"gpt3-{size}": replace(_gpt2(*shape), max_positions=2048, dropout_rate=0.0, attention_dropout_rate=0.0)
        for size, shape in _GPT3_SIZES.items()
    },
}

PREFIX = {"gpt2": "transformer.", "openai-gpt": "transformer."}
BUFFERS: tuple[str, ...] = (
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    r"(transformer\.)?position_ids",
)  # causal masks; 0, 1, ...


def from_huggingface(settings: Settings, names: Collection[str]) -> TransformerConfig:
    """Returns the configuration that a GPT's or GPT-2's config.json describes; see `registry.Family`."""
    gpt = settings.get("model_type") == "openai-gpt"
    require(settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    ids = token_ids(settings, None, *(None, None) if gpt else (50256, 50256))
    width = settings.get("n_embd", 768)
    return TransformerConfig(
        **_COMMON | (_GPT if gpt else _GPT2),
        vocab_size=settings.get("vocab_size", 40478 if gpt else 50257),
        embed_dim=width,
        num_heads=settings.get("n_head", 12),
        head_dim=divided(settings, "n_embd", "n_head", (768, 12)),
        mlp_dim=(None if gpt else settings.get("n_inner")) or 4 * width,
        num_decoder_layers=layers(settings, "n_layer", 12),
        activation=_activation(settings, gpt),
        norm_epsilon=settings.get("layer_norm_epsilon", 1e-5),
        max_positions=settings.get("n_positions", 512 if gpt else 1024),
        tied_head=is_tied(settings, names, "lm_head.weight"),
        dropout_rate=settings.get("resid_pdrop", 0.1),
        attention_dropout_rate=settings.get("attn_pdrop", 0.1),
        init_std=settings.get("initializer_range", 0.02),
        decoder_start_id=first_id(settings.get("decoder_start_token_id"), ids["bos_id"], ids["eos_id"]),
        **ids,
    )


def _activation(settings: Settings, gpt: bool) -> Activation:
    if not gpt:
        return activation(settings.get("activation_function", "gelu_new"), "activation_function")
    name = settings.get("afn", "gelu")
    return activation("gelu_new" if name == "gelu" else name, "afn")  # in this class, gelu is the approximation


def to_huggingface(config: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a GPT or GPT-2, for transformers 4 and 5; see `registry.Family`."""
    gpt = config.norm_position == "post"
    if gpt:
        own = {"model_type": "openai-gpt", "afn": "gelu" if config.activation == "gelu_tanh" else config.activation}
    else:
        own = {"model_type": "gpt2", "activation_function": activation_name(config), "n_inner": config.mlp_dim}
    settings = {
        "architectures": ["OpenAIGPTLMHeadModel" if gpt else "GPT2LMHeadModel"],
        **own,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.embed_dim,
        "n_layer": config.num_decoder_layers,
        "n_head": config.num_heads,
        "embd_pdrop": config.dropout_rate,
        "resid_pdrop": config.dropout_rate,
        "attn_pdrop": config.rate(config.attention_dropout_rate),
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "decoder_start_token_id": config.decoder_start_id,
        **id_settings(config),
    }
    return written(config, settings, from_huggingface)


def weights(config: TransformerConfig) -> Table:
    """Returns where each parameter of `config` is in a Hugging Face file; see `registry.Family`."""
    words, positions = ("wte", "wpe") if config.norm_position == "pre" else ("tokens_embed", "positions_embed")
    layer = "transformer.h.{}"
    table = _convs(f"{layer}.attn.c_attn", "self_attention/query", "self_attention/key", "self_attention/value")
    table |= _convs(f"{layer}.attn.c_proj", "self_attention/out") | under("self_attention_norm", norm(f"{layer}.ln_1"))
    table |= _convs(f"{layer}.mlp.c_fc", "mlp/up") | _convs(f"{layer}.mlp.c_proj", "mlp/down")
    table |= under("mlp_norm", norm(f"{layer}.ln_2"))
    table = under("decoder/layers", table)
    table["decoder/positions/table"] = Stored(f"transformer.{positions}.weight")
    if config.final_norm:
        table |= under("decoder/final_norm", norm("transformer.ln_f"))
    head = ("lm_head.weight",)
    table["embedding/table"] = Stored(f"transformer.{words}.weight", also=head if config.tied_head else ())
    return table if config.tied_head else table | {"head/kernel": Stored(head[0], transposed=True)}


def _convs(name: str, *ours: str) -> Table:
    """Returns what a `Conv1D` called `name` holds: `[in, out]`, and side by side where it is several of ours."""
    return {
        f"{path}/{ending}": Stored(f"{name}.{theirs}", part=(number, len(ours)) if len(ours) > 1 else None)
        for number, path in enumerate(ours)
        for ending, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
