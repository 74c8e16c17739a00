"""The model against straight-line NumPy models, written from the papers and reading nothing but the parameters."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite.models import TransformerConfig, build


def bucket(distance: int, bidirectional: bool, buckets: int = 32, max_distance: int = 128) -> int:
    first, back = 0, max(-distance, 0)
    if bidirectional:
        buckets, back = buckets // 2, abs(distance)
        first = buckets if distance > 0 else 0
    exact = buckets // 2
    if back < exact:
        return first + back
    # The epsilon keeps a distance that lies on a boundary in the upper bucket.
    far = np.log(back / exact) / np.log(max_distance / exact) * (buckets - exact) + 1e-9
    return first + min(exact + int(far), buckets - 1)


def t5(config: TransformerConfig, params: dict, inputs: np.ndarray, decoder_inputs: np.ndarray) -> np.ndarray:
    """Logits of one example without padding, `[T, V]`, in float64."""

    def norm(x, p):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]

    def attention(p, x, source, bias):
        query, key, value = (
            (y @ p[name]["kernel"]).reshape(len(y), config.num_heads, config.head_dim)
            for name, y in [("query", x), ("key", source), ("value", source)]
        )
        logits = np.einsum("thk,shk->hts", query, key) + bias
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hts,shk->thk", weights, value).reshape(len(x), -1) @ p["out"]["kernel"]

    def feed_forward(p, x):
        up = x @ p["up"]["kernel"]
        if not config.gated:
            return np.maximum(up, 0) @ p["down"]["kernel"]
        gate = x @ p["gate"]["kernel"]
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gate * up) @ p["down"]["kernel"]

    def stack(p, x, encoded=None):
        places = range(len(x))
        buckets = np.array([[bucket(s - t, encoded is None) for s in places] for t in places])
        future = 0 if encoded is None else np.triu(np.full((len(x), len(x)), -np.inf), 1)
        for i in range(config.num_encoder_layers if encoded is None else config.num_decoder_layers):
            layer = jax.tree.map(lambda stacked, i=i: stacked[i], p["layers"])
            table = (layer if config.relative_bias_per_layer else p)["position_bias"]["table"]
            y = norm(x, layer["self_attention_norm"])
            x = x + attention(layer["self_attention"], y, y, table[buckets].transpose(2, 0, 1) + future)
            if encoded is not None:
                y = norm(x, layer["cross_attention_norm"])
                x = x + attention(layer["cross_attention"], y, encoded, 0)
            x = x + feed_forward(layer["mlp"], norm(x, layer["mlp_norm"]))
        return norm(x, p["final_norm"])

    table = params["embedding"]["table"]
    y = stack(params["decoder"], table[decoder_inputs], stack(params["encoder"], table[inputs]))
    if config.scaled_head:
        y = y / np.sqrt(config.embed_dim)
    return y @ (table.T if config.tied_head else params["head"]["kernel"])


@pytest.mark.parametrize("family", ["v1_0_config", "tiny_config", "umt5_config"])
def test_logits_equal_the_reference(family: str, request: pytest.FixtureRequest, random_params: Any) -> None:
    config = request.getfixturevalue(family)
    model = build(config)
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, config.vocab_size, (2, 150)).astype(np.int32)  # longer than the bias's last bucket
    outputs = rng.integers(2, config.vocab_size, (2, 140)).astype(np.int32)
    lengths = [150, 40]  # the second row is padded
    inputs[1, 40:] = 0
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": outputs}

    params = random_params(config)
    got = jax.jit(model.apply)({"params": params}, batch)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for row, length in enumerate(lengths):
        expected = t5(config, params, inputs[row, :length], outputs[row])
        # Float32 through five layers reads 6e-7 of the largest logit; a wrong formula 1e-2 and more.
        assert np.max(np.abs(got[row] - expected)) < 1e-4 * np.max(np.abs(expected))


# --- the other families ---------------------------------------------------------------------------------------------
# Published without weights that we could compare with, or with more settings than those that were: what a paper says,
# one query, one head and one layer at a time, in float64.


def dense(p: dict, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray | float, epsilon: float) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


def heads_of(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(len(x), heads, -1)


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, sees: Callable[[int, int], bool]) -> np.ndarray:
    """Scaled dot products; `query` [T, H, K], `key` and `value` [S, G, K], `sees(t, s)`."""
    out = np.zeros(query.shape)
    for t, h in np.ndindex(query.shape[:2]):
        g = h * key.shape[1] // query.shape[1]
        seen = [s for s in range(len(key)) if sees(t, s)]
        weights = np.exp(key[seen, g] @ query[t, h] / math.sqrt(query.shape[2]))
        out[t, h] = weights / weights.sum() @ value[seen, g]
    return out.reshape(len(query), -1)


def causal(t: int, s: int) -> bool:
    return s <= t


def everywhere(t: int, s: int) -> bool:
    return True


def rotated(x: np.ndarray, base: float) -> np.ndarray:
    """Numbers i and i + K/2 of each head, as a complex number, turned by position * base^(-2i / K)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layers_of(stack: dict, number: int) -> list[dict]:
    return [jax.tree.map(lambda stacked, i=i: stacked[i], stack["layers"]) for i in range(number)]


def attention(p: dict, x: np.ndarray, source: np.ndarray, heads: int, sees: Callable[[int, int], bool]) -> np.ndarray:
    """As in BERT, BART and GPT: every projection with a bias."""
    key, value = (heads_of(dense(p[name], source), heads) for name in ("key", "value"))
    return dense(p["out"], attend(heads_of(dense(p["query"], x), heads), key, value, sees))


PALM = TransformerConfig(
    family="palm",
    vocab_size=61,
    embed_dim=24,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    mlp_dim=40,
    num_encoder_layers=0,
    num_decoder_layers=3,
    activation="silu",
    gated=True,
    norm="layer",
    parallel_block=True,
    scaled_attention=True,
    positions="rotary",
    tied_head=True,
    scaled_head=True,
    pad_id=None,
)


def palm(params: dict, tokens: np.ndarray) -> np.ndarray:
    """Chowdhery et al. 2022, section 2: y = x + MLP(LN(x)) + Attention(LN(x)), one head of keys and values."""
    table = params["embedding"]["table"]
    x = table[tokens]
    for p in layers_of(params["decoder"], 3):
        y = layer_norm(x, p["self_attention_norm"]["scale"], 0, 1e-6)
        query, key, value = (y @ p["self_attention"][name]["kernel"] for name in ("query", "key", "value"))
        query, key = rotated(heads_of(query, 3), 10000.0), rotated(heads_of(key, 1), 10000.0)
        attended = attend(query, key, heads_of(value, 1), causal) @ p["self_attention"]["out"]["kernel"]
        swiglu = swish(y @ p["mlp"]["gate"]["kernel"]) * (y @ p["mlp"]["up"]["kernel"])
        x = x + swiglu @ p["mlp"]["down"]["kernel"] + attended
    x = layer_norm(x, params["decoder"]["final_norm"]["scale"], 0, 1e-6)
    return x @ table.T / math.sqrt(24)


ORIGINAL = TransformerConfig(
    vocab_size=61,
    embed_dim=24,
    num_heads=4,
    head_dim=6,
    mlp_dim=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
    bias=True,
    norm="layer",
    norm_position="post",
    final_norm=False,
    scaled_attention=True,
    positions="sinusoidal",
    scaled_embedding=True,
    tied_head=True,
    scaled_head=False,
    pad_id=0,
)


def post_norm(p: dict, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    return layer_norm(x, p[name]["scale"], p[name]["bias"], epsilon)


def original(params: dict, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Vaswani et al. 2017: LN(x + sublayer(x)), relu, one table times sqrt(D) for inputs, outputs and logits."""
    table = params["embedding"]["table"]

    def embed(tokens: np.ndarray) -> np.ndarray:
        positions = np.zeros((len(tokens), 24))
        for position, i in np.ndindex(len(tokens), 12):
            angle = position / 10000 ** (2 * i / 24)
            positions[position, 2 * i], positions[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
        return table[tokens] * math.sqrt(24) + positions

    def feed_forward(p: dict, x: np.ndarray) -> np.ndarray:
        return dense(p["down"], np.maximum(dense(p["up"], x), 0))

    x = embed(inputs)
    for p in layers_of(params["encoder"], 2):
        x = post_norm(p, "self_attention_norm", x + attention(p["self_attention"], x, x, 4, everywhere), 1e-6)
        x = post_norm(p, "mlp_norm", x + feed_forward(p["mlp"], x), 1e-6)
    y = embed(outputs)
    for p in layers_of(params["decoder"], 3):
        y = post_norm(p, "self_attention_norm", y + attention(p["self_attention"], y, y, 4, causal), 1e-6)
        y = post_norm(p, "cross_attention_norm", y + attention(p["cross_attention"], y, x, 4, everywhere), 1e-6)
        y = post_norm(p, "mlp_norm", y + feed_forward(p["mlp"], y), 1e-6)
    return y @ table.T


BART = dataclasses.replace(
    ORIGINAL,
    family="bart",
    decoder_num_heads=2,
    decoder_mlp_dim=32,
    activation="gelu",
    norm_epsilon=1e-5,
    embedding_norm=True,
    positions="learned",
    max_positions=16,
    position_offset=2,
    scaled_embedding=False,
    head_bias=True,
    pad_id=1,
)


def bart(params: dict, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Lewis et al. 2020: positions learned from row 2 on, a norm of the embedding, gelu, a bias of the logits."""
    table = params["embedding"]["table"]

    def embed(p: dict, tokens: np.ndarray) -> np.ndarray:
        return post_norm(p, "embedding_norm", table[tokens] + p["positions"]["table"][2 : 2 + len(tokens)], 1e-5)

    def feed_forward(p: dict, x: np.ndarray) -> np.ndarray:
        return dense(p["down"], gelu(dense(p["up"], x)))

    x = embed(params["encoder"], inputs)
    for p in layers_of(params["encoder"], 2):
        x = post_norm(p, "self_attention_norm", x + attention(p["self_attention"], x, x, 4, everywhere), 1e-5)
        x = post_norm(p, "mlp_norm", x + feed_forward(p["mlp"], x), 1e-5)
    y = embed(params["decoder"], outputs)
    for p in layers_of(params["decoder"], 3):
        y = post_norm(p, "self_attention_norm", y + attention(p["self_attention"], y, y, 2, causal), 1e-5)
        y = post_norm(p, "cross_attention_norm", y + attention(p["cross_attention"], y, x, 2, everywhere), 1e-5)
        y = post_norm(p, "mlp_norm", y + feed_forward(p["mlp"], y), 1e-5)
    return y @ table.T + params["head"]["bias"]


SPARSE = TransformerConfig(
    family="gpt",
    vocab_size=61,
    embed_dim=24,
    num_heads=4,
    head_dim=6,
    mlp_dim=40,
    num_encoder_layers=0,
    num_decoder_layers=4,
    activation="gelu_tanh",
    bias=True,
    norm="layer",
    norm_epsilon=1e-5,
    scaled_attention=True,
    attention_window=3,
    alternating_window=True,
    positions="learned",
    max_positions=16,
    scaled_head=False,
    pad_id=None,
)


def gpt(params: dict, tokens: np.ndarray, windows: Sequence[int]) -> np.ndarray:
    """Brown et al. 2020: GPT-2 with dense and locally banded layers; `windows` has the keys a query sees, by layer."""
    table = params["embedding"]["table"]
    x = table[tokens] + params["decoder"]["positions"]["table"][: len(tokens)]
    for p, window in zip(layers_of(params["decoder"], 4), windows, strict=True):
        y = post_norm(p, "self_attention_norm", x, 1e-5)

        def sees(t: int, s: int, window: int = window) -> bool:
            return t - window < s <= t

        x = x + attention(p["self_attention"], y, y, 4, sees)
        y = post_norm(p, "mlp_norm", x, 1e-5)
        x = x + dense(p["mlp"]["down"], gelu_tanh(dense(p["mlp"]["up"], y)))
    return post_norm(params["decoder"], "final_norm", x, 1e-5) @ table.T


MISTRAL = dataclasses.replace(
    PALM,
    family="llama",
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    norm="rms",
    norm_epsilon=1e-5,
    parallel_block=False,
    attention_window=4,
    rotary_base=500.0,
    tied_head=False,
    scaled_head=False,
)


def mistral(params: dict, tokens: np.ndarray) -> np.ndarray:
    """Jiang et al. 2023: Llama with two queries to a key, and a window of four in every layer."""

    def norm(p: dict, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * p["scale"]

    x = params["embedding"]["table"][tokens]
    for p in layers_of(params["decoder"], 3):
        y = norm(p["self_attention_norm"], x)
        query, key, value = (
            heads_of(y @ p["self_attention"][name]["kernel"], heads)
            for name, heads in (("query", 4), ("key", 2), ("value", 2))
        )
        attended = attend(rotated(query, 500.0), rotated(key, 500.0), value, lambda t, s: t - 4 < s <= t)
        x = x + attended @ p["self_attention"]["out"]["kernel"]
        y = norm(p["mlp_norm"], x)
        gate, up = (y @ p["mlp"][name]["kernel"] for name in ("gate", "up"))
        x = x + (swish(gate) * up) @ p["mlp"]["down"]["kernel"]
    return norm(params["decoder"]["final_norm"], x) @ params["head"]["kernel"]


LOCAL_BERT = dataclasses.replace(
    BART,
    family="bert",
    num_encoder_layers=3,
    num_decoder_layers=0,
    decoder_num_heads=0,
    decoder_mlp_dim=0,
    position_offset=0,
    token_types=2,
    attention_window=2,
    head="masked_lm",
)


def local_bert(params: dict, tokens: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Devlin et al. 2019, every token seeing itself and its two neighbours alone."""
    table, p = params["embedding"]["table"], params["encoder"]
    x = table[tokens] + p["positions"]["table"][: len(tokens)] + p["token_types"]["table"][types]
    x = post_norm(p, "embedding_norm", x, 1e-5)
    for p in layers_of(params["encoder"], 3):
        attended = attention(p["self_attention"], x, x, 4, lambda t, s: -1 <= s - t <= 1)
        x = post_norm(p, "self_attention_norm", x + attended, 1e-5)
        x = post_norm(p, "mlp_norm", x + dense(p["mlp"]["down"], gelu(dense(p["mlp"]["up"], x))), 1e-5)
    x = post_norm(params, "prediction_norm", gelu(dense(params["prediction_transform"], x)), 1e-5)
    return x @ table.T + params["head"]["bias"]


DECODERS = {
    "palm": (PALM, palm),
    "gpt-alternating": (SPARSE, lambda params, tokens: gpt(params, tokens, [99, 3, 99, 3])),
    "gpt-windowed": (dataclasses.replace(SPARSE, alternating_window=False), lambda p, x: gpt(p, x, [3, 3, 3, 3])),
    "mistral": (MISTRAL, mistral),
}
PAIRS = {"original": (ORIGINAL, original), "bart": (BART, bart)}
LENGTHS = (13, 9)  # of two rows, the second padded


def assert_equal_rows(got: Any, expected: Sequence[np.ndarray]) -> None:
    for row, wanted in zip(np.asarray(got), expected, strict=True):
        # Float32 reads up to 1e-6 of the largest logit.
        assert np.max(np.abs(row[: len(wanted)] - wanted)) < 1e-5 * np.max(np.abs(wanted))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_equal_their_papers(name: str, sharp_params: Any) -> None:
    config, reference = DECODERS[name]
    params = sharp_params(config)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 13)).astype(np.int32)
    segments = (np.arange(13) < np.array(LENGTHS)[:, None]).astype(np.int32)
    batch = {"decoder_input_tokens": tokens, "decoder_segment_ids": segments}
    got = jax.jit(build(config).apply)({"params": params}, batch)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    assert_equal_rows(got, [reference(params, tokens[row, :length]) for row, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("name", PAIRS)
def test_encoder_decoders_equal_their_papers(name: str, sharp_params: Any) -> None:
    config, reference = PAIRS[name]
    params = sharp_params(config)
    inputs, outputs = np.random.default_rng(0).integers(2, 61, (2, 2, 13)).astype(np.int32)
    inputs[1, 9:] = config.pad_id
    got = jax.jit(build(config).apply)(
        {"params": params}, {"encoder_input_tokens": inputs, "decoder_input_tokens": outputs}
    )
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    assert_equal_rows(
        got, [reference(params, inputs[row, :length], outputs[row]) for row, length in enumerate(LENGTHS)]
    )


def test_an_encoder_with_a_window_equals_its_definition(sharp_params: Any) -> None:
    params = sharp_params(LOCAL_BERT)
    rng = np.random.default_rng(0)
    tokens, types = rng.integers(2, 61, (2, 13)).astype(np.int32), rng.integers(0, 2, (2, 13)).astype(np.int32)
    tokens[1, 9:] = 1
    batch = {"encoder_input_tokens": tokens, "encoder_token_types": types}
    got = jax.jit(build(LOCAL_BERT).apply)({"params": params}, batch)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    assert_equal_rows(
        got, [local_bert(params, tokens[r, :length], types[r, :length]) for r, length in enumerate(LENGTHS)]
    )


def test_models_without_biases_have_no_parameter_that_the_reference_leaves_out() -> None:
    for config in (PALM, MISTRAL):
        leaves = jax.tree_util.tree_leaves_with_path(build(config).param_shapes())
        names = {jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1] for path, _ in leaves}
        assert names == {"table", "kernel", "scale"}


def test_a_decoder_has_sizes_of_its_own() -> None:
    stacks = build(BART).param_shapes()
    for side, layers, mlp_dim in (("encoder", 2, 40), ("decoder", 3, 32)):
        layer = stacks[side]["layers"]
        assert layer["mlp"]["up"]["kernel"].shape == (layers, 24, mlp_dim)
        assert layer["mlp"]["down"]["kernel"].shape == (layers, mlp_dim, 24)
        assert layer["self_attention"]["query"]["kernel"].shape == (layers, 24, 24)
        assert stacks[side]["positions"]["table"].shape == (16 + 2, 24)
