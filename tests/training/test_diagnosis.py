"""What a step that was not finite is traced back to. Faults are planted, and have to be found where they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import sharding
from t5x_lite.models import TransformerConfig, build, preset
from t5x_lite.nn import feed_forward
from t5x_lite.training.diagnosis import Finding, diagnose, first_update

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def diagnosed(tiny_config: TransformerConfig, random_params: Any, random_batch: Any) -> Callable[..., Finding]:
    """A function that plants a fault in a T5, by default on one device, and returns what is found."""

    def run(
        change: Change = lambda params: None,
        spoil: Change = lambda batch: None,
        config: TransformerConfig = tiny_config,
        mesh_text: str = "",
        **settings: Any,
    ) -> Finding:
        mesh = sharding.make_mesh(mesh_text, None if mesh_text else jax.devices()[:1])
        model = build(config, remat=settings.pop("remat", "none"), dtype=settings.pop("dtype", "float32"))
        params, batch = random_params(config), random_batch(np.random.default_rng(0), 8, 16, 12, config.vocab_size)
        change(params)
        spoil(batch)
        params = jax.device_put(params, sharding.tree_shardings(mesh, model.logical_axes(), model.param_shapes()))
        return diagnose(
            model, params, sharding.put_batch(mesh, batch), jax.random.key(3), mesh=mesh, microbatches=2, **settings
        )

    return run


def test_a_step_that_is_finite_after_all_is_said_to_be(diagnosed: Callable[..., Finding]) -> None:
    finding = diagnosed()
    assert finding == Finding("nothing")
    assert str(finding) == "repeated, the step is finite"


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_parameter_is_found_with_its_layer(value: float, diagnosed: Callable[..., Finding]) -> None:
    def plant(params: Any) -> None:
        params["decoder"]["layers"]["mlp"]["up"]["kernel"][2, 5, 7] = value

    finding = diagnosed(plant)
    assert finding == Finding("parameter", "decoder/layers/mlp/up/kernel", 2, "nan" if np.isnan(value) else "inf")
    assert "decoder/layers/mlp/up/kernel, layer 2 (counted from 0), holds" in str(finding)


def test_of_several_parameters_the_one_that_is_read_first_is_named(diagnosed: Callable[..., Finding]) -> None:
    def plant(params: Any) -> None:
        params["head"]["kernel"][0, 0] = np.nan
        params["decoder"]["layers"]["self_attention"]["query"]["kernel"][0, 0, 0] = np.nan
        params["encoder"]["final_norm"]["scale"][0] = np.nan
        params["encoder"]["layers"]["mlp"]["up"]["kernel"][0, 0, 0] = np.inf
        params["encoder"]["layers"]["self_attention"]["query"]["kernel"][1, 0, 0] = np.nan

    assert diagnosed(plant, mesh_text="data:2,fsdp:2,model:2") == Finding(
        "parameter", "encoder/layers/mlp/up/kernel", 0, "inf"
    )


def test_values_of_the_batch(diagnosed: Callable[..., Finding]) -> None:
    def weights(batch: Any) -> None:
        batch["decoder_loss_weights"][3, 2] = np.nan

    def token(batch: Any) -> None:
        batch["encoder_input_tokens"][5, 1] = 256

    assert diagnosed(spoil=weights, mesh_text="data:8") == Finding("batch", "decoder_loss_weights", None, "nan")
    assert str(diagnosed(spoil=token)) == "the batch's encoder_input_tokens holds 256, which is no token of 256"


@pytest.mark.parametrize(("remat", "mesh"), [("none", "data:2,fsdp:2,model:2"), ("full", "")])
def test_an_overflow_is_found_in_its_layer(remat: str, mesh: str, diagnosed: Callable[..., Finding]) -> None:
    def plant(params: Any) -> None:
        for name in ("gate", "up"):  # each of them fits into a float32, their product does not
            params["encoder"]["layers"]["mlp"][name]["kernel"][1] *= 1e25

    finding = diagnosed(plant, remat=remat, mesh_text=mesh)
    assert (finding.kind, finding.layer, finding.value) == ("activation", 1, "inf")
    assert finding.name == "encoder/layers/mlp/Dropout_0"  # the first to be given the product
    assert finding.as_details() == {"kind": "activation", "module": finding.name, "layer": 1, "value": "inf"}


def test_an_overflow_within_attention_is_named_by_it(diagnosed: Callable[..., Finding]) -> None:
    def plant(params: Any) -> None:
        params["decoder"]["layers"]["cross_attention"]["value"]["kernel"][1] *= 1e30
        params["decoder"]["layers"]["cross_attention"]["out"]["kernel"][1] *= 1e30

    assert diagnosed(plant) == Finding("activation", "decoder/layers/cross_attention/out", 1, "inf")


def test_float16_overflows_where_float32_does_not(diagnosed: Callable[..., Finding]) -> None:
    def plant(params: Any) -> None:
        params["decoder"]["layers"]["mlp"]["up"]["kernel"][0] *= 1e5

    assert diagnosed(plant).kind == "nothing"
    assert diagnosed(plant, dtype="float16") == Finding("activation", "decoder/layers/mlp/up", 0, "inf")


def test_a_gradient_alone_is_traced_to_the_layer_that_makes_it(
    diagnosed: Callable[..., Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    @jax.custom_vjp
    def gelu(x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x)

    def backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
        return (jnp.where(jnp.max(jnp.abs(x)) > 1e6, jnp.nan, 1.0) * g,)

    gelu.defvjp(lambda x: (jax.nn.gelu(x), x), backward)
    monkeypatch.setitem(feed_forward.ACTIVATIONS, "gelu_tanh", gelu)

    def plant(params: Any) -> None:  # layer 1 of three: the one after it stays finite, all before it do not
        params["decoder"]["layers"]["mlp"]["gate"]["kernel"][1] *= 1e8

    finding = diagnosed(plant)
    assert finding == Finding("gradient", "decoder/layers/mlp", 1, "nan")
    assert str(finding).startswith("the forward pass is finite, and the first gradient to be nan is that of decoder/")


def test_the_scale_of_the_loss_is_part_of_the_step(diagnosed: Callable[..., Finding]) -> None:
    def plant(params: Any) -> None:
        params["head"]["kernel"] *= 1e5

    # The head's own gradient still fits into a float32; times the kernel it does not.
    finding = diagnosed(plant, scale=1e37)
    assert (finding.kind, finding.name) == ("gradient", "decoder/final_norm")


def test_the_module_whose_update_is_not_finite() -> None:
    norms = {"update_norm": np.inf, "update_norm/embedding": 1.0, "gradient_norm/embedding": np.nan}
    both = norms | {"update_norm/head": np.nan, "update_norm/decoder/layers/mlp": np.inf}
    assert first_update(both) == Finding("update", "decoder/layers/mlp", None, "inf")  # it comes before the head
    # Squares of numbers below 1.8e19 fit into a float32, their sum may not.
    together = norms | {"update_norm/head": 1.5e19, "update_norm/decoder/layers/mlp": 1.2e19}
    assert str(first_update(together)).endswith("the norm of the update of head is 1.5e+19")


def test_other_families(diagnosed: Callable[..., Finding]) -> None:
    bert = dataclasses.replace(preset("bert-base-uncased"), embed_dim=32, num_heads=4, head_dim=8, mlp_dim=64)
    bert = dataclasses.replace(bert, num_encoder_layers=2, vocab_size=256, head="masked_lm", pooler=False)

    def plant(params: Any) -> None:
        params["prediction_transform"]["kernel"] *= 1e38

    def as_masked_lm(batch: Any) -> None:
        batch["encoder_target_tokens"] = batch["encoder_input_tokens"]
        batch["encoder_loss_weights"] = (batch["encoder_input_tokens"] > 0).astype(np.float32)

    assert diagnosed(plant, as_masked_lm, bert) == Finding("activation", "prediction_transform", None, "inf")
