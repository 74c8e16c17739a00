"""What families share in saying how Hugging Face stores their weights and their settings."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from t5x_lite.errors import InputError, nearest
from t5x_lite.models.config import TransformerConfig

Settings = Mapping[str, Any]  # a config.json
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Where a parameter is in somebody else's file.

    Attributes:
      name: the tensor's name, with `{}` for the number of the layer where ours is stacked over layers.
      transposed: a `torch.nn.Linear` keeps `[out, in]`, we `[in, out]`.
      part: (index, count): ours is that one of `count` equal parts of the last axis (GPT-2's fused c_attn).
      row: theirs is `[1, n]` where ours is `[n]` (BART's final_logits_bias).
      also: other names of the same tensor. Files hold one of them or several; all that are there must be equal.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    row: bool = False
    also: tuple[str, ...] = ()


Table = dict[str, Stored]  # our parameter paths, joined by "/"


def linear(name: str, bias: bool = True) -> Table:
    """Returns kernel and bias of a `torch.nn.Linear` called `name`."""
    return {"kernel": Stored(f"{name}.weight", transposed=True)} | ({"bias": Stored(f"{name}.bias")} if bias else {})


def norm(name: str, bias: bool = True) -> Table:
    """Returns scale and bias of a norm layer called `name`; bert-base-uncased still has TensorFlow's names of them."""
    scale = {"scale": Stored(f"{name}.weight", also=(f"{name}.gamma",))}
    return scale | ({"bias": Stored(f"{name}.bias", also=(f"{name}.beta",))} if bias else {})


def linears(name: str, names: Mapping[str, str], bias: bool = True) -> Table:
    """Returns the linears under `name`, of which `names` has ours and theirs: `{"query": "q_proj", ...}`."""
    parts = (under(ours, linear(f"{name}.{theirs}", bias)) for ours, theirs in names.items())
    return {path: stored for part in parts for path, stored in part.items()}


def under(path: str, parts: Table) -> Table:
    """Returns `parts` with `path/` put before each of our names."""
    return {f"{path}/{name}": stored for name, stored in parts.items()}


# --- reading settings -----------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str, key: str) -> Activation:
    """Returns our name of Hugging Face's activation, the value of setting `key`.

    Raises:
      InputError: it is not one of ours.
    """
    if name not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS)
        raise InputError(f"{key} '{name}' in config.json is unknown, allowed: {allowed}{nearest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_name(config: TransformerConfig) -> str:
    """Returns Hugging Face's name of the activation."""
    return "gelu_new" if config.activation == "gelu_tanh" else config.activation


def require(settings: Settings, **allowed: Any) -> None:
    """Checks settings that can have but one value here; one that is absent has it.

    Raises:
      InputError: a setting has another.
    """
    for key, value in {"pruned_heads": {}, "quantization_config": None, **allowed}.items():
        found = settings.get(key, value)
        if found != value and (found or value):  # null, false, 0 and {} say the same
            raise InputError(f"{key} {found!r} in config.json is not supported, allowed: {value!r}")


def layers(settings: Settings, key: str, default: int) -> int:
    """Returns a number of layers.

    Raises:
      InputError: there are none.
    """
    count = settings.get(key, default)
    if count < 1:
        raise InputError(f"{key} in config.json must be at least 1, not {count}")
    return count


def divided(settings: Settings, width: str, heads: str, defaults: tuple[int, int]) -> int:
    """Returns the size of one head: the setting `width` divided by the setting `heads`.

    Raises:
      InputError: it is not a multiple.
    """
    size, count = settings.get(width, defaults[0]), settings.get(heads, defaults[1])
    if count < 1 or size % count:
        raise InputError(f"{width} {size} in config.json is not a multiple of {heads} {count}")
    return size // count


def token_ids(settings: Settings, pad: int | None, bos: int | None, eos: int | None) -> dict[str, Any]:
    """Returns the token ids as fields of a TransformerConfig, all but the decoder's first input.

    Args:
      settings: of config.json.
      pad: the default, as the others; a setting of null is none, and not the default.
      bos: that begins a text.
      eos: that ends one. Where the setting is a list (Llama 3), the first is `eos_id` and the others `stop_ids`.
    """

    def every(key: str, default: int | None = None) -> tuple[int, ...]:
        value = settings.get(key, default)
        rows = settings.get("vocab_size", math.inf)
        # The first Llama conversions wrote -1 for none; GPT-2s with another vocabulary kept 50256.
        return tuple(i for i in (value if isinstance(value, list) else [value]) if i is not None and 0 <= i < rows)

    def one(key: str, default: int | None = None) -> int | None:
        return next(iter(every(key, default)), None)

    return {
        "pad_id": one("pad_token_id", pad),
        "bos_id": one("bos_token_id", bos),
        "eos_id": one("eos_token_id", eos),
        "stop_ids": every("eos_token_id", eos)[1:],
        "forced_bos_id": one("forced_bos_token_id"),
        "forced_eos_id": one("forced_eos_token_id"),
    }


def first_id(*ids: int | None) -> int:
    """Returns the first that is one, else 0."""
    return next((i for i in ids if i is not None), 0)


def is_tied(settings: Settings, names: Collection[str], head: str, default: bool = True) -> bool:
    """Returns whether the output head is the embedding table, as far as settings and tensor names say.

    A `head` in the file is a head of its own, whatever the flag says (transformers 5 writes true for every T5); it may
    still turn out to equal the embedding table, which only the tensors tell.
    """
    return settings.get("tie_word_embeddings", default) is not False and head not in names


# --- writing settings -----------------------------------------------------------------------------------------------


def id_settings(config: TransformerConfig) -> dict[str, Any]:
    """Returns the settings that `token_ids` reads."""
    ids = {
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.end_ids) if config.stop_ids else config.eos_id,
    }
    forced = {"forced_bos_token_id": config.forced_bos_id, "forced_eos_token_id": config.forced_eos_id}
    return ids | {key: i for key, i in forced.items() if i is not None}


# What a config.json need not express: it is for training, and so for whoever trains on.
_TRAINING = (
    "dropout_rate",
    "attention_dropout_rate",
    "mlp_dropout_rate",
    "dropout_style",
    "initialization",
    "init_std",
)
_OF_POSITIONS = {
    "max_positions": ("learned", "rotary"),
    "position_offset": ("learned",),
    "relative_bias_buckets": ("relative",),
    "relative_bias_max_distance": ("relative",),
    "rotary_base": ("rotary",),
    "rotary_scaling": ("rotary",),
}


def written(
    config: TransformerConfig,
    settings: dict[str, Any],
    read: Callable[[Settings, Collection[str]], TransformerConfig],
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Returns `settings`, once reading them back has given `config`: so nothing of it is lost in silence.

    Args:
      config: what they are to express.
      settings: what a family made of it.
      read: the family's `from_huggingface`.
      ignore: fields that Hugging Face's class can do without.

    Raises:
      InputError: a field that shapes the computation has no such value in Hugging Face's class.
    """

    def plain(config: TransformerConfig) -> TransformerConfig:
        own = {
            "num_kv_heads": config.num_heads,
            "decoder_num_heads": config.num_heads,
            "decoder_mlp_dim": config.mlp_dim,
        }
        return replace(config, **{name: 0 for name, same in own.items() if getattr(config, name) == same})

    architecture = settings["architectures"][0]
    if not {"head_dim", "d_kv"} & settings.keys() and config.num_heads * config.head_dim != config.embed_dim:
        theirs = f"embed_dim / num_heads = {config.embed_dim / config.num_heads:g}"
        raise InputError(
            f"model.head_dim {config.head_dim} cannot be written for Hugging Face: {architecture} has {theirs}"
        )
    wanted, got = plain(config), plain(read(settings, ()))
    for name in (field.name for field in fields(config)):
        ours, theirs = getattr(wanted, name), getattr(got, name)
        matters = config.positions in _OF_POSITIONS.get(name, (config.positions,))
        matters &= name != "num_labels" or config.head in ("sequence_classification", "token_classification")
        if ours != theirs and matters and name not in (*_TRAINING, "family", *ignore):
            raise InputError(f"model.{name} {ours!r} cannot be written for Hugging Face: {architecture} has {theirs!r}")
    return settings
