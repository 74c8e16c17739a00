"""T5 (Raffel et al. 2020) and its descendants: v1.0, v1.1, Flan, mT5, umT5 and ByT5, by their published names.

v1.0 has relu feed-forward blocks and a head that is the embedding table, scaled; v1.1 and everything after it has gated
tanh-gelu blocks and a head of its own. umT5 has a position bias in every layer, ByT5 a deep encoder over bytes.
"""

from collections.abc import Collection
from typing import Any

from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.weights import (
    Settings,
    Stored,
    Table,
    activation,
    activation_name,
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


def _v1_0(embed_dim: int, mlp_dim: int, layers: int, heads: int, head_dim: int = 64) -> TransformerConfig:
    return TransformerConfig(
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
    )


def _v1_1(
    embed_dim: int,
    mlp_dim: int,
    layers: int,
    heads: int,
    decoder_layers: int | None = None,
    vocab_size: int = 32128,
    relative_bias_per_layer: bool = False,
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_encoder_layers=layers,
        num_decoder_layers=decoder_layers or layers,
        num_heads=heads,
        activation="gelu_tanh",
        gated=True,
        tied_head=False,
        scaled_head=False,
        relative_bias_per_layer=relative_bias_per_layer,
    )


# embed_dim, mlp_dim, layers, heads
_V1_1_SIZES = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}

PRESETS: dict[str, TransformerConfig] = {
    "t5-small": _v1_0(512, 2048, 6, 8),
    "t5-base": _v1_0(768, 3072, 12, 12),
    "t5-large": _v1_0(1024, 4096, 24, 16),
    "t5-3b": _v1_0(1024, 16384, 24, 32, head_dim=128),
    "t5-11b": _v1_0(1024, 65536, 24, 128, head_dim=128),
    **{f"t5-v1.1-{size}": _v1_1(*shape) for size, shape in _V1_1_SIZES.items()},
    **{f"flan-t5-{size}": _v1_1(*shape) for size, shape in _V1_1_SIZES.items()},
    **{f"mt5-{size}": _v1_1(*shape, vocab_size=250112) for size, shape in _V1_1_SIZES.items()},
    **{
        f"umt5-{size}": _v1_1(*shape, vocab_size=256384, relative_bias_per_layer=True)
        for size, shape in _V1_1_SIZES.items()
        if size != "large"  # never published
    },
    "byt5-small": _v1_1(1472, 3584, 12, 6, decoder_layers=4, vocab_size=384),
    "byt5-base": _v1_1(1536, 3968, 18, 12, decoder_layers=6, vocab_size=384),
    "byt5-large": _v1_1(1536, 3840, 36, 16, decoder_layers=12, vocab_size=384),
    "byt5-xl": _v1_1(2560, 6720, 36, 32, decoder_layers=12, vocab_size=384),
    "byt5-xxl": _v1_1(4672, 12352, 36, 64, decoder_layers=12, vocab_size=384),
}

PREFIX = {"t5": "", "mt5": "", "umt5": ""}
REFUSED = {"longt5": "its encoder has local or transient-global attention; t5, mt5 and umt5 attend to the whole input"}
BUFFERS: tuple[str, ...] = (
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)  # in early files, unused


# Rows of a published table, a multiple of 128, to tokens: pieces and sentinels. The vocabularies are T5's cc_all.32000
# and 100, mT5's mc4.250000.100extra, and umT5's umt5.256000 and 300. ByT5 has no row too many, but 125 sentinels.
_TOKENS = {32128: 32100, 250112: 250100, 256384: 256300}


def tokens_in_use(config: TransformerConfig) -> int | None:
    """Returns how many ids of a T5 with a published vocabulary are tokens, the rest being padding; None for others."""
    return _TOKENS.get(config.vocab_size) if config.family == "t5" else None


def from_huggingface(settings: Settings, names: Collection[str]) -> TransformerConfig:
    """Returns the configuration that a T5's config.json describes; see `registry.Family`."""
    kind = settings.get("model_type", "t5")
    require(settings, is_encoder_decoder=True, is_decoder=False)
    v1_0 = kind == "t5"  # what the class of configurations takes for granted
    function, gated = _feed_forward(settings, "relu" if v1_0 else "gated-gelu")
    depth = layers(settings, "num_layers", 6 if v1_0 else 8)
    asymmetric = settings.get("num_decoder_layers") is not None
    tied = is_tied(settings, names, "lm_head.weight")
    ids = token_ids(settings, pad=0, bos=None, eos=1)
    return TransformerConfig(
        family="t5",
        vocab_size=settings.get("vocab_size", 32128 if v1_0 else 250112),
        embed_dim=settings.get("d_model", 512),
        num_heads=settings.get("num_heads", 8 if v1_0 else 6),
        head_dim=settings.get("d_kv", 64),
        mlp_dim=settings.get("d_ff", 2048 if v1_0 else 1024),
        num_encoder_layers=depth,
        num_decoder_layers=layers(settings, "num_decoder_layers", depth) if asymmetric else depth,
        activation=activation(function, "feed_forward_proj"),
        gated=gated,
        norm_epsilon=settings.get("layer_norm_epsilon", 1e-6),
        relative_bias_buckets=settings.get("relative_attention_num_buckets", 32),
        relative_bias_max_distance=settings.get("relative_attention_max_distance", 128),
        relative_bias_per_layer=kind == "umt5",
        # Without the file's names, no scale is the mark of a v1.1, which is not tied.
        tied_head=tied and (bool(names) or settings.get("scale_decoder_outputs") is not False),
        scaled_head=_scaled_head(settings, names),
        dropout_rate=settings.get("dropout_rate", 0.1),
        decoder_start_id=first_id(settings.get("decoder_start_token_id"), ids["pad_id"]),
        **ids,
    )


def _feed_forward(settings: Settings, default: str) -> tuple[str, bool]:
    """Returns Hugging Face's name of the activation, and whether it gates."""
    name = settings.get("feed_forward_proj", default)
    function = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
    return settings.get("dense_act_fn", function), settings.get("is_gated_act", name.startswith("gated-"))


def _scaled_head(settings: Settings, names: Collection[str]) -> bool:
    if "scale_decoder_outputs" in settings:
        return settings["scale_decoder_outputs"]
    tied = settings.get("tie_word_embeddings") is not False
    if settings.get("model_type", "t5") == "t5":
        return tied
    # transformers 5 says of every mT5 and umT5 that it is tied: of the published ones too, which have heads of their
    # own that were trained unscaled; and of all mT5 it scales none.
    version_5 = int((settings.get("transformers_version") or "4").split(".")[0]) >= 5
    return tied and "lm_head.weight" not in names and not (version_5 and settings["model_type"] == "mt5")


def to_huggingface(config: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a T5, for transformers 4 and 5; see `registry.Family`."""
    kind, architecture = ("umt5", "UMT5") if config.relative_bias_per_layer else ("t5", "T5")
    function = "gelu" if config.gated and config.activation == "gelu_tanh" else activation_name(config)
    settings = {
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_bias_buckets,
        "relative_attention_max_distance": config.relative_bias_max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_factor": 1.0,
        "feed_forward_proj": f"gated-{function}" if config.gated else function,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tied_head,  # transformers 4 scales what is tied
        "scale_decoder_outputs": config.tied_head,
        "decoder_start_token_id": config.decoder_start_id,
        **id_settings(config),
    }
    return written(config, settings, from_huggingface)


def weights(config: TransformerConfig) -> Table:
    """Returns where each parameter of `config` is in a Hugging Face file; see `registry.Family`."""
    head = ("lm_head.weight",)
    same = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(head if config.tied_head else ()))
    table = {"embedding/table": Stored("shared.weight", also=same)}
    table |= under("encoder", _stack(config, "encoder", self_attention="SelfAttention"))
    table |= under(
        "decoder", _stack(config, "decoder", self_attention="SelfAttention", cross_attention="EncDecAttention")
    )
    return table if config.tied_head else table | {"head/kernel": Stored(head[0], transposed=True)}


_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def _stack(config: TransformerConfig, stack: str, **attentions: str) -> Table:
    layer = f"{stack}.block.{{}}.layer"
    table: Table = {}
    for number, (ours, theirs) in enumerate(attentions.items()):
        attention = linears(f"{layer}.{number}.{theirs}", _ATTENTION, bias=False)
        table |= under(ours, attention) | under(f"{ours}_norm", norm(f"{layer}.{number}.layer_norm", bias=False))
    last = f"{layer}.{len(attentions)}"
    up = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
    table |= under("mlp", linears(f"{last}.DenseReluDense", {**up, "down": "wo"}, bias=False))
    table |= under("mlp_norm", norm(f"{last}.layer_norm", bias=False))
    bias = "SelfAttention.relative_attention_bias.weight"
    if config.relative_bias_per_layer:
        biases = {"layers/position_bias/table": Stored(f"{layer}.0.{bias}")}
    else:
        biases = {"position_bias/table": Stored(f"{stack}.block.0.layer.0.{bias}")}
    return under("layers", table) | biases | under("final_norm", norm(f"{stack}.final_layer_norm", bias=False))
