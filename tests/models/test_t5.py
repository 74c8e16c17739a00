import dataclasses
import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import sharding
from t5x_lite.models import PRESETS, TransformerConfig, build
from t5x_lite.models.stack import REMAT_POLICIES
from t5x_lite.training.losses import LossSettings
from t5x_lite.training.step import batch_loss

FAMILIES = ("v1_0_config", "tiny_config", "umt5_config")

# How the real ones differ from each other, at a size that compiles in a second or two.
SMALL = {
    "embed_dim": 32,
    "num_heads": 4,
    "head_dim": 8,
    "mlp_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}
VARIANTS = {
    "v1.0": dataclasses.replace(PRESETS["t5-small"], **SMALL, vocab_size=1024),
    "v1.1": dataclasses.replace(PRESETS["t5-v1.1-small"], **SMALL, vocab_size=1024),
    "umt5": dataclasses.replace(PRESETS["umt5-small"], **SMALL, vocab_size=1024),
    "mt5": dataclasses.replace(PRESETS["mt5-small"], **SMALL, vocab_size=32_000),
    "byt5": dataclasses.replace(PRESETS["byt5-small"], **SMALL | {"num_encoder_layers": 6}, vocab_size=384),
}


@cache
def program(config: TransformerConfig, **options: Any) -> Any:
    return jax.jit(build(config, **options).apply)


def apply(config: TransformerConfig, params: Any, batch: Any, **options: Any) -> np.ndarray:
    return np.asarray(program(config, **options)({"params": params}, batch))


def paths(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_has_a_known_name(family: str, request: pytest.FixtureRequest) -> None:
    model = build(request.getfixturevalue(family))
    axes = paths(model.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    shapes = paths(model.param_shapes())
    assert axes.keys() == shapes.keys()
    sizes = {"vocab": 256, "embed": 32, "heads": 8 * 6, "mlp": 64, "buckets": 32}
    for path, names in axes.items():
        in_stack = "/layers/" in path
        depth = {"encoder": 2, "decoder": 3}[path.split("/")[0]] if in_stack else 0
        assert set(names) <= set(sharding.PARAMETERS), path
        assert (names[0] == "layers") == in_stack, path
        if path.endswith("kernel"):
            assert len(names) == 2 + in_stack, path
        expected = tuple(
            depth if n == "layers" else model.config.num_heads if "position_bias" in path and n == "heads" else sizes[n]
            for n in names
        )
        assert shapes[path].shape == expected, path
        assert shapes[path].dtype == jnp.float32, path


def test_fresh_parameters_have_the_sizes_of_t5() -> None:
    config = TransformerConfig(
        vocab_size=512,
        embed_dim=96,
        num_heads=8,
        head_dim=16,
        mlp_dim=192,
        num_encoder_layers=2,
        num_decoder_layers=2,
        activation="gelu_tanh",
        gated=True,
        tied_head=False,
        scaled_head=False,
    )
    params = paths(jax.jit(build(config).init)(jax.random.key(0), tiny_tokens())["params"])
    d, joined, mlp = 96, 8 * 16, 192
    expected = {
        "query/kernel": (d * 16) ** -0.5,  # the 1/sqrt(head_dim) that the attention does not have
        "key/kernel": d**-0.5,
        "value/kernel": d**-0.5,
        "out/kernel": joined**-0.5,
        "up/kernel": d**-0.5,
        "gate/kernel": d**-0.5,
        "down/kernel": mlp**-0.5,
        "head/kernel": d**-0.5,
        "embedding/table": 1.0,
        "position_bias/table": (2 / (32 + 8)) ** 0.5,  # uniform, variance 1 / fan_avg
    }
    seen = set()
    for path, value in params.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(value, np.ones(value.shape))
            continue
        (name,) = [name for name in expected if path.endswith(name)]
        seen.add(name)
        layers = value if "/layers/" in path else value[None]
        for layer in layers:
            # Five standard errors of a standard deviation; those of a uniform distribution are smaller.
            assert np.std(layer) == pytest.approx(expected[name], rel=5 / math.sqrt(2 * layer.size)), path
        if len(layers) > 1:
            assert np.any(layers[0] != layers[1]), path
    assert seen == set(expected)


def tiny_tokens() -> dict[str, np.ndarray]:
    return {name: np.ones((1, 1), np.int32) for name in ("encoder_input_tokens", "decoder_input_tokens")}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_model_predicts_nothing_in_particular(name: str, random_batch: Any) -> None:
    config = VARIANTS[name]
    model = build(config)
    batch = random_batch(np.random.default_rng(0), 16, 24, 24, config.vocab_size)

    @jax.jit
    def fresh_loss(key: jax.Array, batch: Any) -> jax.Array:
        sums = batch_loss(model, model.init(key, tiny_tokens())["params"], batch)
        return sums.cross_entropy / sums.weight

    # A head that is scaled but not tied, or the reverse, is outside: ln V + 13 for v1.0 without its scale.
    assert 0.0 <= fresh_loss(jax.random.key(0), batch) - math.log(config.vocab_size) <= 1.0


# --- the program ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_program_does_not_grow_with_depth(family: str, request: pytest.FixtureRequest, random_batch: Any) -> None:
    batch = random_batch(np.random.default_rng(0), 2, 8, 8, 256)

    def lines(layers: int) -> int:
        config = dataclasses.replace(
            request.getfixturevalue(family), num_encoder_layers=layers, num_decoder_layers=layers
        )
        model = build(config)
        gradient = jax.grad(lambda params: batch_loss(model, params, batch, LossSettings(z_loss=1e-4)).cross_entropy)
        return jax.jit(gradient).lower(model.param_shapes()).as_text().count("\n")

    assert lines(3) == lines(48)


def test_remat_policies_give_the_same_gradients(tiny_config: Any, random_params: Any, random_batch: Any) -> None:
    batch = random_batch(np.random.default_rng(3), 4, 12, 10, 256)
    params = random_params(tiny_config, 3)

    def gradients(remat: str) -> tuple[Any, int]:
        model = build(tiny_config, remat=remat)

        def loss(params: Any) -> jax.Array:  # with dropout: the recomputation has to draw the same mask
            return batch_loss(model, params, batch, dropout_key=jax.random.key(1)).cross_entropy

        traced = jax.jit(jax.grad(loss)).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr).count("tanh")

    expected, tanhs = gradients("none")
    largest = max(np.max(np.abs(value)) for value in jax.tree.leaves(expected))
    for remat in REMAT_POLICIES.keys() - {"none"}:
        got, recomputed = gradients(remat)
        assert recomputed > tanhs  # the activations come into being twice
        for path, value in paths(got).items():
            # The same sums, rounded in other places: 1e-7 of the largest gradient with `minimal`, 3e-7 with the others.
            # Other seeds have up to 7e-7, one of twelve 2e-6.
            np.testing.assert_allclose(value, paths(expected)[path], rtol=0, atol=1e-6 * largest, err_msg=path)


def test_remat_lowers_the_memory_of_the_gradients(tiny_config: Any) -> None:
    # So deep that what layers leave for the backward pass is most of what a program holds.
    config = dataclasses.replace(tiny_config, num_encoder_layers=24, num_decoder_layers=24)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    names = "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"

    def measured(remat: str) -> tuple[int, int]:
        """Bytes, and how many matrix products there are."""
        model = build(config, remat=remat)
        gradient = jax.jit(jax.grad(lambda params, batch: batch_loss(model, params, batch).trained))
        traced = gradient.trace(model.param_shapes(), dict.fromkeys(names, tokens))
        memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
        return memory, str(traced.jaxpr).count("dot_general")

    (none, products), (minimal, kept), (full, all_again) = map(measured, ("none", "minimal", "full"))
    # 84, 57 and 10 MB.
    assert 6 * full < none
    assert minimal < none / 1.3
    assert kept == products < all_again


def test_dropout_is_off_unless_asked_for(tiny_config: Any, random_params: Any, random_batch: Any) -> None:
    batch = random_batch(np.random.default_rng(0), 4, 12, 10, 256)
    params = random_params(tiny_config)
    without = dataclasses.replace(tiny_config, dropout_rate=0.0)
    np.testing.assert_array_equal(apply(tiny_config, params, batch), apply(without, params, batch))
    model = build(tiny_config)
    dropped = jax.jit(lambda key: model.apply({"params": params}, batch, enable_dropout=True, rngs={"dropout": key}))
    first, again, other = (np.asarray(dropped(jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 0.1
    assert np.max(np.abs(first - apply(tiny_config, params, batch))) > 0.1


def test_dropout_is_where_the_paper_has_it(tiny_config: Any, random_params: Any, random_batch: Any) -> None:
    # Each dropout draws once. A stack: after the embedding and after the final norm. A layer, which stands once in the
    # program because layers are scanned: on the weights and on the output of each attention, inside and after the
    # feed-forward block. So 2 + 4 in the encoder and 2 + 6 in the decoder.
    batch = random_batch(np.random.default_rng(0), 2, 6, 5, tiny_config.vocab_size)
    model, params = build(tiny_config), random_params(tiny_config)

    def forward(key: jax.Array) -> jax.Array:
        return model.apply({"params": params}, batch, enable_dropout=True, rngs={"dropout": key})

    def draws(jaxpr: Any) -> int:
        inner = [value.jaxpr for eqn in jaxpr.eqns for value in eqn.params.values() if hasattr(value, "jaxpr")]
        return sum(eqn.primitive.name == "random_bits" for eqn in jaxpr.eqns) + sum(map(draws, inner))

    assert draws(jax.make_jaxpr(forward)(jax.random.key(0)).jaxpr) == 14


def test_bfloat16_compute_keeps_float32_parameters_and_logits(
    tiny_config: Any, v1_0_config: Any, random_params: Any, random_batch: Any
) -> None:
    batch = random_batch(np.random.default_rng(0), 4, 12, 10, 256)
    for config in (tiny_config, v1_0_config):
        params = random_params(config)
        model = build(config, dtype="bfloat16")
        assert {x.dtype for x in jax.tree.leaves(model.param_shapes())} == {jnp.dtype("float32")}
        encoded = jax.eval_shape(lambda p, m=model: m.apply({"params": p}, batch, method="encode"), params)
        assert encoded.dtype == jnp.bfloat16
        logits = apply(config, params, batch, dtype="bfloat16")
        wanted = apply(config, params, batch)
        assert logits.dtype == np.float32
        # Not numbers of bfloat16 in float32's clothes ...
        assert np.any(logits != logits.astype(jnp.bfloat16).astype(np.float32))
        # ... and as near as eight bits through five layers may be: 1 % of a logit's usual size was seen.
        assert np.sqrt(np.mean((logits - wanted) ** 2)) < 0.03 * np.std(wanted)


# --- padding and packing --------------------------------------------------------------------------------------------


def test_absent_segment_ids_are_derived_from_the_pads(tiny_config: Any, random_params: Any, random_batch: Any) -> None:
    batch = random_batch(np.random.default_rng(0), 6, 12, 10, 256)
    assert batch["decoder_input_tokens"][0, 0] == 0  # the start token is a pad, and real all the same
    explicit = batch | {
        "encoder_segment_ids": (batch["encoder_input_tokens"] > 0).astype(np.int32),
        "decoder_segment_ids": (batch["decoder_target_tokens"] > 0).astype(np.int32),
    }
    params = random_params(tiny_config)
    np.testing.assert_array_equal(apply(tiny_config, params, batch), apply(tiny_config, params, explicit))


def test_another_pad_id(tiny_config: Any, random_params: Any, random_batch: Any) -> None:
    # With rows 0 and 7 of the table exchanged, tokens 0 and 7 exchanged mean the same.
    config = dataclasses.replace(tiny_config, pad_id=7, decoder_start_id=7)
    batch = random_batch(np.random.default_rng(0), 6, 12, 10, 256)
    batch["encoder_input_tokens"][0, 2] = batch["decoder_input_tokens"][0, 3] = 7  # must not be taken for the pad 0
    exchange = np.arange(256)
    exchange[[0, 7]] = 7, 0
    exchanged = {k: exchange[v].astype(np.int32) if k.endswith("input_tokens") else v for k, v in batch.items()}
    params = random_params(tiny_config)
    other = {**params, "embedding": {"table": params["embedding"]["table"][exchange]}}
    np.testing.assert_array_equal(apply(config, other, exchanged), apply(tiny_config, params, batch))


def test_padding_changes_nothing(tiny_config: Any, random_params: Any) -> None:
    rng = np.random.default_rng(0)
    params = random_params(tiny_config)
    alone = {
        "encoder_input_tokens": rng.integers(2, 256, (2, 9)).astype(np.int32),
        "decoder_input_tokens": rng.integers(2, 256, (2, 7)).astype(np.int32),
    }
    wanted = apply(tiny_config, params, alone)
    for pads in (1, 64):
        padded = {name: np.pad(tokens, ((0, 0), (0, pads))) for name, tokens in alone.items()}
        got = apply(tiny_config, params, padded)
        assert np.all(np.isfinite(got))
        # Other shapes are other loops: float32 sums in another order.
        np.testing.assert_allclose(got[:, :7], wanted, atol=1e-5)


def test_tokens_in_padding_do_not_count(umt5_config: Any, random_params: Any) -> None:
    rng = np.random.default_rng(0)
    segments = {
        "encoder_segment_ids": np.array([[1] * 9 + [0] * 3], np.int32),
        "decoder_segment_ids": np.array([[1] * 7 + [0] * 3], np.int32),
    }
    one, other = (
        {
            "encoder_input_tokens": rng.integers(0, 256, (1, 12)).astype(np.int32),
            "decoder_input_tokens": rng.integers(0, 256, (1, 10)).astype(np.int32),
        }
        for _ in range(2)
    )
    for name, real in (("encoder", 9), ("decoder", 7)):
        other[f"{name}_input_tokens"][:, :real] = one[f"{name}_input_tokens"][:, :real]
    params = random_params(umt5_config)
    got = [apply(umt5_config, params, tokens | segments)[:, :7] for tokens in (one, other)]
    np.testing.assert_allclose(*got, atol=1e-6)  # the same program on the same real numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_do_not_see_each_other(family: str, request: pytest.FixtureRequest, random_params: Any) -> None:
    config = request.getfixturevalue(family)
    params = random_params(config)
    rng = np.random.default_rng(0)
    inputs, outputs = rng.integers(0, 256, (2, 1, 14)).astype(np.int32)
    packed = {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": np.array([[1] * 5 + [2] * 6 + [0] * 3], np.int32),
        "decoder_input_tokens": outputs,
        "decoder_segment_ids": np.array([[1] * 7 + [2] * 5 + [0] * 2], np.int32),
    }
    before = apply(config, params, packed)
    first, second = np.s_[:, :7], np.s_[:, 7:12]

    # Example A's inputs, then its targets: the second example must not notice either, and the first must.
    for name, where in (("encoder_input_tokens", np.s_[:, :5]), ("decoder_input_tokens", np.s_[:, :7])):
        changed = {key: value.copy() for key, value in packed.items()}
        changed[name][where] = rng.integers(0, 256, changed[name][where].shape)
        after = apply(config, params, changed)
        np.testing.assert_allclose(after[second], before[second], atol=1e-6)
        assert np.max(np.abs(after[first] - before[first])) > 0.1

    # And the second is what it would be in a row of its own.
    alone = {
        "encoder_input_tokens": np.pad(inputs[:, 5:11], ((0, 0), (0, 8))),
        "encoder_segment_ids": np.array([[1] * 6 + [0] * 8], np.int32),
        "decoder_input_tokens": np.pad(outputs[second], ((0, 0), (0, 9))),
        "decoder_segment_ids": np.array([[1] * 5 + [0] * 9], np.int32),
    }
    np.testing.assert_allclose(apply(config, params, alone)[:, :5], before[second], atol=1e-5)


def test_numpy_batches_work_outside_jit(tiny_config: Any, random_params: Any, random_batch: Any) -> None:
    batch = random_batch(np.random.default_rng(0), 2, 5, 4, 256)
    logits = jax.eval_shape(
        lambda params: build(tiny_config).apply({"params": params}, batch), random_params(tiny_config)
    )
    assert logits.shape == (2, 4, 256)
