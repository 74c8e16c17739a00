import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from t5x_lite.nn.dense import FEW_ROWS, Dense, Quantized, linear, turned
from t5x_lite.nn.embeddings import Head, TokenEmbedding
from t5x_lite.sharding import make_mesh, parameter_spec

RNG = np.random.default_rng(0)
IN, OUT = 48, 300  # more outputs than one block, and no whole number of blocks
X = RNG.normal(size=(2, 3, IN)).astype(np.float32)
KERNEL = RNG.normal(size=(IN, OUT)).astype(np.float32)
BIAS = RNG.normal(size=OUT).astype(np.float32)
VALUES = RNG.integers(-127, 128, (IN, OUT)).astype(np.int8)
SCALE = RNG.uniform(0.001, 0.1, OUT).astype(np.float32)


def narrow(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.bfloat16)


# --- float32, and bfloat16 computed from float32 weights: what training does -----------------------------------------


def test_float32_is_one_product_and_a_bias() -> None:
    def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return Dense(OUT, ("embed", "mlp"), use_bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)

    # To the last bit: there is nothing else in the program.
    text = str(jax.make_jaxpr(dense)(X, KERNEL, BIAS))
    assert [text.count(name) for name in ("dot_general", " add ", "convert_element_type", "transpose")] == [1, 1, 0, 0]
    np.testing.assert_array_equal(dense(X, KERNEL, BIAS), jnp.matmul(X, KERNEL) + BIAS)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_a_product_but_nothing_is_turned(transposed: bool) -> None:
    kernel = KERNEL.T if transposed else KERNEL
    x = RNG.normal(size=(2, FEW_ROWS, IN)).astype(np.float32)  # too many rows for the form that decoding has

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(linear(x, kernel, jnp.float32, jnp.float32, transposed=transposed)))

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ (kernel.T if transposed else kernel)))

    for got, wanted in zip(*(jax.grad(f, argnums=(0, 1))(x, kernel) for f in (ours, plain)), strict=True):
        # Float32 sums of 128 and 300 numbers, perhaps in another order.
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert "transpose" not in str(jax.make_jaxpr(jax.grad(ours, argnums=(0, 1)))(x, kernel)).replace("transposed", "")


def test_float32_weights_are_rounded_to_the_dtype_of_the_computation() -> None:
    got = Dense(OUT, ("embed", "mlp"), dtype=jnp.bfloat16).apply({"params": {"kernel": KERNEL}}, X)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.matmul(narrow(X), narrow(KERNEL), preferred_element_type=jnp.bfloat16))


def test_shapes_of_the_parameters() -> None:
    boxed = Dense(OUT, ("embed", "mlp"), use_bias=True).init(jax.random.key(0), jnp.asarray(X))["params"]
    assert {name: (box.unbox().shape, box.names) for name, box in boxed.items()} == {
        "kernel": ((IN, OUT), ("embed", "mlp")),
        "bias": ((OUT,), ("mlp",)),
    }


# --- kernels turned for decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_a_turned_kernel_gives_the_same(rows: int) -> None:
    x = RNG.normal(size=(rows, 1, IN)).astype(np.float32)
    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)}
    module = Dense(OUT, ("embed", "mlp"), use_bias=True)
    got = jax.jit(module.apply)({"params": turned(params)}, x)
    # Sums of 48 products in another order, each rounded to float32.
    np.testing.assert_allclose(got, module.apply({"params": params}, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_rows_are_multiplied_with_the_kernel_as_the_left_factor(dtype: str) -> None:
    # What makes decoding fast on a CPU; XLA would turn the product round if it could.
    def product(rows: int) -> str:
        x, kernel = jnp.zeros((rows, IN), dtype), jnp.zeros((OUT, IN), dtype)
        return (
            jax.jit(partial(linear, dtype=dtype, out_dtype=jnp.float32, transposed=True))
            .lower(x, kernel)
            .compile()
            .as_text()
        )

    assert f"f32[{OUT},4]" in product(4)
    assert f"f32[{OUT}," not in product(FEW_ROWS + 1).replace(f"f32[{OUT},{IN}]", "")


def test_only_float_kernels_are_turned() -> None:
    layer = {
        "a": {"kernel": jnp.asarray(KERNEL), "bias": BIAS},
        "b": {"kernel": VALUES, "kernel_scale": SCALE},
        "c": {"scale": BIAS},
    }
    got = turned(layer)
    assert {name: set(part) for name, part in got.items()} == {
        "a": {"kernel_turned", "bias"},
        "b": {"kernel", "kernel_scale"},
        "c": {"scale"},
    }
    np.testing.assert_array_equal(got["a"]["kernel_turned"], KERNEL.T)


# --- weights stored in bfloat16 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 1, IN), (2, 1, IN), (2, 3, IN), (0, 3, IN)])
def test_bfloat16_weights_are_summed_in_float32(shape: tuple[int, ...], transposed: bool) -> None:
    x, kernel = narrow(X).reshape(-1, IN)[: int(np.prod(shape[:-1]))].reshape(shape), narrow(KERNEL)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    product = jax.jit(partial(linear, transposed=transposed), static_argnums=(2, 3))
    given = kernel.T if transposed else kernel
    got = product(x, given, jnp.bfloat16, jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)  # float32 sums of 48, no bfloat16 among them
    rounded = product(x, given, jnp.bfloat16, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 places, and where the sum cancels, float32's error.
    np.testing.assert_allclose(np.asarray(rounded, np.float64), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_of_bfloat16_weights(rows: int, transposed: bool) -> None:
    x, kernel = narrow(X)[0, :rows], narrow(KERNEL)

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        given = kernel.T if transposed else kernel
        return jnp.sum(jnp.sin(linear(x, given, jnp.bfloat16, jnp.float32, transposed=transposed)))

    wide = [np.asarray(a, np.float64) for a in (x, kernel)]
    outer = np.cos(wide[0] @ wide[1])
    for got, exact in zip(jax.grad(loss, (0, 1))(x, kernel), (outer @ wide[1].T, wide[0].T @ outer), strict=True):
        assert got.dtype == jnp.bfloat16
        # The factors of a gradient are bfloat16, also what comes in as float32, and so is the result: twice 2**-8 of
        # the largest, not of those that cancel.
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0, atol=2**-7 * np.max(np.abs(exact)))


# --- weights in int8 ------------------------------------------------------------------------------------------------


def test_int8_weights_are_scaled_by_output() -> None:
    got = Dense(OUT, ("embed", "mlp"), use_bias=True).apply(
        {"params": {"kernel": VALUES, "kernel_scale": SCALE, "bias": BIAS}}, X
    )
    assert got.dtype == jnp.float32
    exact = X.astype(np.float64) @ (VALUES * SCALE.astype(np.float64)) + BIAS
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)  # float32 sums of 48 numbers of up to 30


@pytest.mark.parametrize("outputs", [1, 128, 129, OUT])
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_weights_in_blocks_and_on_a_mesh(outputs: int, transposed: bool) -> None:
    values, scale = VALUES[:, :outputs], SCALE[:outputs]
    kernel = Quantized(jnp.asarray(values.T if transposed else values), jnp.asarray(scale))
    product = partial(linear, narrow(X), kernel, jnp.bfloat16, jnp.float32, transposed=transposed)
    exact = np.asarray(narrow(X), np.float64) @ (values * scale.astype(np.float64))
    # Whole numbers up to 127 are exact in bfloat16, and sums are float32's: nothing is lost but in the scale.
    np.testing.assert_allclose(product(), exact, rtol=1e-5, atol=1e-4)
    with jax.set_mesh(make_mesh("data:8")):
        np.testing.assert_allclose(product(), exact, rtol=1e-5, atol=1e-4)


def test_int8_weights_stay_where_they_are_on_a_mesh() -> None:
    mesh = make_mesh("model:8")

    def spread(array: np.ndarray, *names: str) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, parameter_spec(*names)))

    kernel = Quantized(spread(VALUES[:, :256], "embed", "mlp"), spread(SCALE[:256], "mlp"))
    with jax.set_mesh(mesh):
        program = jax.jit(linear, static_argnums=(2, 3)).lower(X, kernel, jnp.float32, jnp.float32).compile()
    assert not re.search("all-(gather|reduce)|collective", program.as_text())
    assert program.output_shardings.shard_shape((2, 3, 256)) == (2, 3, 32)


def test_int8_weights_let_gradients_through() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(linear(x, Quantized(VALUES, SCALE), jnp.float32, jnp.float32) * BIAS)

    exact = np.broadcast_to((VALUES * SCALE.astype(np.float64)) @ BIAS, X.shape)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(X)), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_head_with_int8_weights(tied: bool) -> None:
    given = {} if tied else {"kernel": VALUES, "kernel_scale": SCALE}
    table = Quantized(jnp.asarray(VALUES.T), jnp.asarray(SCALE)) if tied else jnp.zeros((OUT, IN))
    got = Head(OUT, tied).apply({"params": given}, jnp.asarray(X), table)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, X.astype(np.float64) @ (VALUES * SCALE.astype(np.float64)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_look_up_in_an_int8_table(dtype) -> None:
    tokens = np.array([[0, 299, 300], [7, 7, 128]])  # there is no row 300
    params = {"table": VALUES.T, "table_scale": SCALE}
    got = TokenEmbedding(OUT, IN, dtype=dtype).apply({"params": params}, tokens)
    assert got.dtype == dtype
    rows = np.vstack([VALUES.T * SCALE[:, None], np.full((1, IN), np.nan, np.float32)])[tokens]
    np.testing.assert_array_equal(got.astype(jnp.float32), jnp.asarray(rows, dtype).astype(jnp.float32))


def test_look_up_in_a_bfloat16_table() -> None:
    look_up = partial(TokenEmbedding(OUT, IN, dtype=jnp.bfloat16).apply, {"params": {"table": narrow(KERNEL.T)}})
    rows = np.vstack([narrow(KERNEL.T), np.full((1, IN), np.nan)]).astype(np.float32)
    for tokens in ([[0, 299, 300], [7, 7, 128]], [[300]]):
        got = look_up(np.array(tokens))
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(jnp.float32), rows[np.array(tokens)])


# --- in a loop ------------------------------------------------------------------------------------------------------


def linear_step(kernel: Quantized, x: jax.Array) -> jax.Array:
    return jnp.tanh(linear(x, kernel, jnp.float32, jnp.float32))


def tied_step(table: Quantized, x: jax.Array) -> jax.Array:
    logits = linear(x, table, jnp.float32, jnp.float32, transposed=True)
    return x + jnp.argmax(logits, axis=-1)[..., None]


def look_up_step(table: jax.Array, x: jax.Array) -> jax.Array:
    tokens = jnp.argmax(x, axis=-1)
    return TokenEmbedding(512, 512, dtype=jnp.bfloat16).apply({"params": {"table": table}}, tokens)


INT8 = Quantized(jnp.zeros((512, 512), jnp.int8), jnp.ones(512))
BFLOAT16 = jnp.zeros((512, 512), jnp.bfloat16)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is XLA's CPU compiler that would make the copy")
@pytest.mark.parametrize(
    ("step", "weights"),
    [(linear_step, INT8), (tied_step, INT8), (look_up_step, BFLOAT16)],
    ids=["int8 kernel", "int8 table", "bfloat16 table"],
)
def test_a_loop_keeps_no_copy_of_its_weights(step, weights) -> None:
    @jax.jit
    def loop(weights, x: jax.Array, steps: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda _, x: step(weights, x), x)

    x = jnp.zeros((1, 1, 512), BFLOAT16.dtype if step is look_up_step else jnp.float32)
    memory = loop.lower(weights, x, jnp.int32(9)).compile().memory_analysis()
    # A float32 copy has 4 bytes a weight; a block of 128 outputs, with what else a step needs, is a third of that.
    assert memory.temp_size_in_bytes < 2 * 512 * 512
