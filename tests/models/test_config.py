"""Which shapes a model may have, and what follows from one."""

from typing import Any

import pytest

from t5x_lite.errors import InputError
from t5x_lite.models import PRESETS, TransformerConfig

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    # Sizes.
    *(
        ({name: 0}, [f"model.{name} must be at least 1, not 0"])
        for name in ("vocab_size", "embed_dim", "num_heads", "head_dim", "mlp_dim", "num_labels")
    ),
    *(
        ({name: -1}, [f"model.{name} must be at least 0, not -1"])
        for name in (
            *("num_kv_heads", "num_encoder_layers", "num_decoder_layers", "decoder_num_heads", "decoder_mlp_dim"),
            *("attention_window", "max_positions", "position_offset", "token_types"),
        )
    ),
    # Words.
    ({"family": "xlnet"}, ["model.family 'xlnet'", "t5, bart, gpt, llama, palm, bert, roberta"]),
    ({"activation": "swish"}, ["model.activation 'swish'", "relu, gelu, gelu_tanh, silu"]),
    ({"norm": "batch"}, ["model.norm 'batch'", "rms, layer"]),
    ({"norm_position": "both"}, ["model.norm_position 'both'", "pre, post"]),
    ({"positions": "alibi"}, ["model.positions 'alibi'", "relative, learned, sinusoidal, rotary, none"]),
    ({"dropout_style": "dense"}, ["model.dropout_style 'dense'", "t5, elementwise"]),
    ({"initialization": "zeros"}, ["model.initialization 'zeros'", "t5, fan_in, normal, gpt2, truncated_normal"]),
    ({"head": "nsp", "num_decoder_layers": 0}, ["model.head 'nsp'", "masked_lm, pretraining", "span, null"]),
    # Rates and other real numbers.
    *(
        ({name: value}, [f"model.{name} must be in [0, 1), not {value}"])
        for name in ("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate")
        for value in (1.0, -0.1, float("nan"))
    ),
    *(
        ({name: value}, [f"model.{name} must be above 0 and finite, not {value}"])
        for name in ("norm_epsilon", "init_std", "rotary_base")
        for value in (0.0, -1.0, float("inf"), float("nan"))
    ),
    # Ids.
    *(
        ({name: value, "vocab_size": 50}, [f"model.{name} must be in [0, vocab_size = 50), not {value}"])
        for name in ("pad_id", "bos_id", "eos_id", "decoder_start_id", "forced_bos_id", "forced_eos_id")
        for value in (50, -1)
    ),
    # Parts that do not fit together.
    ({"num_encoder_layers": 0, "num_decoder_layers": 0}, ["num_encoder_layers", "num_decoder_layers", "both 0"]),
    (
        {"num_heads": 6, "head_dim": 5, "decoder_num_heads": 4},
        ["model.decoder_num_heads 4", "num_heads * head_dim 30"],
    ),
    ({"num_heads": 8, "num_kv_heads": 3}, ["model.num_heads 8", "not a multiple of num_kv_heads 3"]),
    (
        {"num_heads": 8, "num_kv_heads": 8, "decoder_num_heads": 4},
        ["model.decoder_num_heads 4", "not a multiple of num_kv_heads 8"],
    ),
    ({"rotary_scaling": (0.0, 1.0, 4.0, 64)}, ["model.rotary_scaling", "above 0", "[0.0, 1.0, 4.0, 64]"]),
    ({"rotary_scaling": (8.0, 4.0, 4.0, 64)}, ["model.rotary_scaling", "low below high"]),
    ({"stop_ids": (3, 50), "vocab_size": 50}, ["model.stop_ids", "[0, vocab_size = 50)", "[3, 50]"]),
    ({"alternating_window": True}, ["model.alternating_window=true needs model.attention_window"]),
    ({"token_types": 2, "num_encoder_layers": 0}, ["model.token_types 2 is for an encoder"]),
    ({"relative_bias_buckets": 3}, ["model.relative_bias_buckets must be at least 4, not 3"]),
    (
        {"relative_bias_buckets": 32, "relative_bias_max_distance": 16},
        ["model.relative_bias_max_distance", "half of relative_bias_buckets, 16, not 16"],
    ),
    ({"positions": "learned"}, ["model.positions=learned needs model.max_positions of at least 1"]),
    ({"positions": "rotary", "head_dim": 7}, ["model.positions=rotary needs an even head_dim in both stacks, not 7"]),
    ({"positions": "sinusoidal", "embed_dim": 33}, ["model.positions=sinusoidal needs an even embed_dim, not 33"]),
    ({"head": "masked_lm"}, ["model.head=masked_lm is for an encoder alone", "num_decoder_layers=0"]),
    ({"pooler": True}, ["model.pooler is for an encoder alone", "num_decoder_layers=0"]),
    *(
        ({"head": head, "num_decoder_layers": 0}, [f"model.head={head} needs model.pooler=true"])
        for head in ("pretraining", "sequence_classification")
    ),
    ({"parallel_block": True}, ["model.parallel_block", "num_encoder_layers=0"]),
    (
        {"parallel_block": True, "num_encoder_layers": 0, "norm_position": "post"},
        ["model.parallel_block", "norm_position=pre"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[repr(changes) for changes, _ in REFUSED])
def test_shapes_that_no_model_can_have(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        TransformerConfig(**changes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_rotary_positions_need_an_even_head_dim_in_both_stacks() -> None:
    with pytest.raises(InputError, match="head_dim"):
        TransformerConfig(positions="rotary", num_heads=2, head_dim=6, decoder_num_heads=4)


ALLOWED: list[dict[str, Any]] = [
    {},
    {"num_encoder_layers": 0},
    {"num_decoder_layers": 0},
    {"num_decoder_layers": 0, "decoder_num_heads": 7},
    {"num_decoder_layers": 0, "head": "masked_lm"},
    {"num_decoder_layers": 0, "head": "sequence_classification", "pooler": True},
    {"num_decoder_layers": 0, "pooler": True},
    {"num_kv_heads": 1},
    {"num_kv_heads": 4, "decoder_num_heads": 16},
    # Checked only where they mean something.
    {"positions": "none", "relative_bias_buckets": 1, "embed_dim": 33, "head_dim": 7},
    {"positions": "rotary", "embed_dim": 33},
    {"positions": "sinusoidal", "head_dim": 7},
    {"relative_bias_buckets": 4, "relative_bias_max_distance": 3},
    {"parallel_block": True, "num_encoder_layers": 0},
    {"dropout_rate": 0.0, "attention_dropout_rate": None, "mlp_dropout_rate": 0.999},
    {"pad_id": None, "eos_id": None, "bos_id": None, "decoder_start_id": 32127},
]


@pytest.mark.parametrize("changes", ALLOWED, ids=repr)
def test_shapes_that_a_model_can_have(changes: dict[str, Any]) -> None:
    TransformerConfig(**changes)


ASYMMETRIC = TransformerConfig(
    vocab_size=100,
    embed_dim=40,
    num_heads=12,
    head_dim=4,
    mlp_dim=60,
    num_encoder_layers=2,
    num_decoder_layers=3,
    decoder_num_heads=8,
    decoder_mlp_dim=36,
)


def test_stacks_may_differ() -> None:
    assert (ASYMMETRIC.heads(False), ASYMMETRIC.heads(True)) == (12, 8)
    assert (ASYMMETRIC.kv_heads(False), ASYMMETRIC.kv_heads(True)) == (12, 8)
    assert (ASYMMETRIC.stack_head_dim(False), ASYMMETRIC.stack_head_dim(True)) == (4, 6)  # 48 wide both
    assert (ASYMMETRIC.stack_mlp_dim(False), ASYMMETRIC.stack_mlp_dim(True)) == (60, 36)


def test_stacks_are_the_same_unless_said_otherwise() -> None:
    config = TransformerConfig(num_heads=6, head_dim=5, mlp_dim=70, num_kv_heads=2)
    for is_decoder in (False, True):
        assert config.heads(is_decoder) == 6
        assert config.kv_heads(is_decoder) == 2
        assert config.stack_head_dim(is_decoder) == 5
        assert config.stack_mlp_dim(is_decoder) == 70


def sizes(**changes: Any) -> dict[str, int]:
    return TransformerConfig(
        vocab_size=100, embed_dim=40, num_heads=12, head_dim=4, mlp_dim=60, **changes
    ).sharded_sizes()


def test_sizes_that_a_mesh_may_split() -> None:
    assert sizes() == {"vocab": 100, "embed": 40, "heads": 12, "mlp": 60}
    assert sizes(num_kv_heads=4) == {"vocab": 100, "embed": 40, "heads": 12, "mlp": 60, "kv_heads": 4}
    assert "kv_heads" not in sizes(num_kv_heads=1)  # a single one is not split
    # What divides the sizes of both stacks ...
    assert ASYMMETRIC.sharded_sizes() == {"vocab": 100, "embed": 40, "heads": 4, "mlp": 12}
    # ... and of one that there is not, nothing.
    other = {"decoder_num_heads": 8, "decoder_mlp_dim": 36}
    assert (sizes(**other, num_decoder_layers=0)["heads"], sizes(**other, num_decoder_layers=0)["mlp"]) == (12, 60)
    assert (sizes(**other, num_encoder_layers=0)["heads"], sizes(**other, num_encoder_layers=0)["mlp"]) == (8, 36)


@pytest.mark.parametrize(
    ("eos_id", "stop_ids", "end_ids"), [(1, (), (1,)), (1, (7, 9), (1, 7, 9)), (None, (7,), (7,)), (None, (), ())]
)
def test_ids_that_end_a_sequence(eos_id: int | None, stop_ids: tuple[int, ...], end_ids: tuple[int, ...]) -> None:
    assert TransformerConfig(eos_id=eos_id, stop_ids=stop_ids).end_ids == end_ids


@pytest.mark.parametrize(
    ("pad_id", "eos_id", "fill_id"), [(0, 1, 0), (3, 1, 3), (None, 5, 5), (None, None, 0), (0, None, 0)]
)
def test_what_rows_are_filled_up_with(pad_id: int | None, eos_id: int | None, fill_id: int) -> None:
    assert TransformerConfig(pad_id=pad_id, eos_id=eos_id).fill_id == fill_id


def test_every_preset_divides_into_heads() -> None:
    for name, config in PRESETS.items():
        for is_decoder in (False, True):
            joined = config.heads(is_decoder) * config.stack_head_dim(is_decoder)
            assert joined == config.num_heads * config.head_dim, name
            assert config.heads(is_decoder) % config.kv_heads(is_decoder) == 0, name
