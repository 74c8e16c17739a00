"""The model against a straight-line NumPy T5, written from the papers and reading nothing but the parameters."""

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
