"""The linear map under every other layer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t5x_lite.nn.parameters import Initializer, fan_in_normal, parameter

# Rows of an input that are few beside the outputs: a CPU multiplies faster with the weights as the left factor, by 1.3
# to 2 times with 2 to 32 rows, and as fast with 128. In bfloat16 it is up to twice as fast with 1 row as well.
FEW_ROWS = 64

_TURNED = "kernel_turned"

_BLOCK = 128  # outputs whose int8 weights a CPU converts at a time: few enough for its cache


@struct.dataclass
class Quantized:
    """A matrix in int8, which stands for `values * scale`; see `models.quantization`.

    Attributes:
      values: int8 `[in, out]`, or transposed `[out, in]`.
      scale: float32 `[out]`.
    """

    values: jax.Array
    scale: jax.Array


Matrix = jax.Array | Quantized


def matrix(
    module: nn.Module, name: str, initializer: Initializer, shape: tuple[int, int], axes: tuple[str, str]
) -> Matrix:
    """Returns the module's parameter of that name, with its scale if there is a `{name}_scale` beside it.

    Arguments are those of `parameter`. No scale is created here: what is quantised has been trained.
    """
    values = parameter(module, name, initializer, shape, axes)
    scale = module.get_variable("params", f"{name}_scale")
    return values if scale is None else Quantized(values, scale)


def linear(x: jax.Array, kernel: Matrix, dtype: Any, out_dtype: Any, *, transposed: bool = False) -> jax.Array:
    """Returns `x @ kernel`.

    Args:
      x: `[..., in]`.
      kernel: `[in, out]`.
      dtype: of the factors.
      out_dtype: of the result `[..., out]`.
      transposed: whether the kernel is `[out, in]` instead.
    """
    x, axis = x.astype(dtype), int(transposed)
    if isinstance(kernel, Quantized):
        # Blocks would run across what the devices of a mesh hold.
        on_cpu = _in_blocks if jax.sharding.get_abstract_mesh().size <= 1 else _converted
        y = jax.lax.platform_dependent(
            x, kernel.values, cpu=partial(on_cpu, axis=axis), default=partial(_converted, axis=axis)
        )
        return (y * kernel.scale).astype(out_dtype)
    if kernel.dtype == x.dtype == jnp.bfloat16:
        on_cpu, plain = (partial(product, axis=axis, dtype=out_dtype) for product in (_unconverted, _product))
        return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)
    kernel = kernel.astype(dtype)
    if transposed and _has_few_rows(x):
        on_cpu, plain = partial(_kernel_first, dtype=out_dtype), partial(_product, axis=axis, dtype=out_dtype)
        return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)
    return _product(x, kernel, axis, out_dtype)


def turned(layer: Any) -> Any:
    """Returns the parameters of a layer with the kernel `[in, out]` of every `Dense` as `[out, in]`, by another name.

    So all weights of an output follow each other in memory, which is how a CPU reads them fastest when there are few
    rows to multiply. Quantised kernels stay as they are.
    """
    if not isinstance(layer, Mapping):
        return layer
    if "kernel" in layer and "kernel_scale" not in layer:
        return {_TURNED if name == "kernel" else name: x.T if name == "kernel" else x for name, x in layer.items()}
    return {name: turned(part) for name, part in layer.items()}


def larger_first(
    larger: jax.Array,
    few: jax.Array,
    over: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: Any,
) -> jax.Array:
    """Returns the product of two arrays over their last axes, as `[..., few, larger]`, with the larger as left factor.

    Args:
      larger: of many rows.
      few: of few rows.
      over: axes of either that are summed over.
      batch: axes of either that are not.
      dtype: of the result.
    """
    y = jax.lax.dot_general(larger, few, (over, batch), preferred_element_type=dtype)
    # Without the barrier XLA turns the product round instead of its small result.
    return jnp.swapaxes(jax.lax.optimization_barrier(y), -1, -2)


def _kernel_first(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    y = larger_first(kernel, x.reshape(-1, x.shape[-1]), ((1,), (1,)), ((), ()), dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _has_few_rows(x: jax.Array) -> bool:
    return x.size <= FEW_ROWS * x.shape[-1]


def _dot(x: jax.Array, kernel: jax.Array, axis: int, dtype: Any) -> jax.Array:
    over = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, kernel, over, preferred_element_type=dtype)


_product = jax.custom_vjp(_dot, nondiff_argnums=(2, 3))


def _product_fwd(x: jax.Array, kernel: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, Any]:
    return _dot(x, kernel, axis, dtype), (x, kernel)  # `_product` would hide the product from a policy of remat


def _product_bwd(axis: int, dtype: Any, factors: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # JAX would multiply dy by x and turn the result; XLA's CPU compiler then turns dy instead, which is larger.
    x, kernel = factors
    dy = dy.astype(x.dtype)
    dx = jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1 - axis,)), ((), ())), preferred_element_type=x.dtype)
    left, right = (x, dy) if axis == 0 else (dy, x)
    if jax.sharding.get_abstract_mesh().size <= 1:  # to join axes that a mesh divides it would have to gather them
        # A matrix behind a barrier: otherwise XLA's CPU compiler transposes the left factor first, and slowly, since it
        # does so number by number, along with whatever was computed last.
        left, right = (y.reshape(-1, y.shape[-1]) for y in (left, right))
        left = jax.lax.platform_dependent(left, cpu=jax.lax.optimization_barrier, default=lambda left: left)
    rows = tuple(range(left.ndim - 1))
    d_kernel = jax.lax.dot_general(left, right, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)
    return dx, d_kernel


_product.defvjp(_product_fwd, _product_bwd)


def _converted(x: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    return _product(x, values.astype(x.dtype), axis, jnp.float32)


# In a loop that reads the same weights in every step, as decoding does, XLA's CPU compiler converts those that are not
# float32 once for all steps, and keeps the copy. The next two give it nothing to convert ahead of the loop.


def _in_blocks(x: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    outputs = values.shape[1 - axis]
    block = min(_BLOCK, outputs)
    x = x.astype(jnp.float32)

    def fill(index: jax.Array, y: jax.Array) -> jax.Array:
        start = index * block  # both move the last block back as far as it would stick out
        part = _converted(x, jax.lax.dynamic_slice_in_dim(values, start, block, 1 - axis), axis)
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, y.ndim - 1)

    return jax.lax.fori_loop(0, -(-outputs // block), fill, jnp.zeros((*x.shape[:-1], outputs), jnp.float32))


def _unconverted(x: jax.Array, kernel: jax.Array, axis: int, dtype: Any) -> jax.Array:
    # XLA has a bfloat16 product for a CPU if the sum is float32 and there are two rows at least.
    product: Any = _kernel_first if axis and _has_few_rows(x) else partial(_product, axis=axis)
    if x.size != x.shape[-1]:
        return product(x, kernel, dtype=jnp.float32).astype(dtype)
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
    return product(rows, kernel, dtype=jnp.float32)[0].astype(dtype).reshape(*x.shape[:-1], -1)


def stream_dtype(dtype: Any) -> Any:
    """Returns the dtype of the residual stream, and of what is added to it, when the computation has `dtype`.

    It is the same, but for float16, which ends at 65504: sums over a feed-forward block of trained T5s are larger
    (Hugging Face keeps T5's `wo` in float32, and with it the stream), and float32 has room for them.
    """
    return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype


class Dense(nn.Module):
    """`x @ kernel`, over the last axis, plus a bias if asked for.

    Attributes:
      features: size of the output.
      axes: logical names of the kernel's two axes. Kernels are always 2-D: attention joins heads and head size into
        one axis, so that Adafactor factors the second moment (it looks at axes of 128 and more).
      kernel_init: initializer; sees the 2-D shape.
      use_bias: whether there is a bias `[features]`, which starts at 0.
      dtype: of the factors and the sum; parameters are stored in float32, or for decoding as they are given.
      out_dtype: of the sum, if that is another.
    """

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer = fan_in_normal()
    use_bias: bool = False
    dtype: Any = jnp.float32
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., in]` to `[..., features]`."""
        out_dtype = self.out_dtype or self.dtype
        kernel = self.get_variable("params", _TURNED)
        if kernel is None:
            kernel = matrix(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
            x = linear(x, kernel, self.dtype, out_dtype)
        else:
            x = linear(x, kernel, self.dtype, out_dtype, transposed=True)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
            x = x + bias.astype(out_dtype)
        return x
