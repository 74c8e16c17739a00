"""T5 (Raffel et al. 2020) and its descendants: v1.0, v1.1, Flan, mT5, umT5 and ByT5, by their published names.

v1.0 has relu feed-forward blocks and a head that is the embedding table, scaled; v1.1 and everything after it has gated
tanh-gelu blocks and a head of its own. umT5 has a position bias in every layer, ByT5 a deep encoder over bytes.
"""

from t5x_lite.models.config import TransformerConfig


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
