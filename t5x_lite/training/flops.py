"""How many floating-point operations a training step takes, by formula and as XLA counts them; what a device can do.

The formula's convention, which every figure made from it names:

* a multiplication and an addition are two operations; only products of matrices count, not what is done elementwise;
* looking up an embedding costs nothing, the output head is a product like any other;
* the backward pass costs twice the forward pass: a training step is 3 x forward, and what is recomputed (remat) is not
  counted, which makes it the *model's* operations (Chowdhery et al. 2022, appendix B: MFU) and not the hardware's;
* causal attention counts in full, as if every query saw every key (`halved`: half of it, as MaxText has counted since
  2025); a window counts as many keys as it is wide;
* padding counts: the operations follow from the shapes of the batch, whatever is in it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from jax.extend import core

from t5x_lite.models.config import TransformerConfig

CONVENTION = "3 x forward, causal attention in full, padding counted, embedding look-ups not"

Causal = Literal["full", "halved"]


def forward_flops(
    config: TransformerConfig, input_length: int = 0, target_length: int = 0, causal: Causal = "full"
) -> int:
    """Returns the operations of the forward pass of one row, by the formula of this module.

    Args:
      config: the model.
      input_length: tokens of the encoder's row, padding included; nothing without an encoder.
      target_length: tokens of the decoder's row; nothing without a decoder.
      causal: whether a causal self-attention counts in full, or by half.
    """
    total = 0
    if config.num_encoder_layers:
        total += _stack(config, False, input_length, input_length, causal) + _encoder_head(config, input_length)
    if config.num_decoder_layers:
        total += _stack(config, True, target_length, input_length, causal)
        total += 2 * target_length * config.embed_dim * config.vocab_size
    return total


def _stack(config: TransformerConfig, is_decoder: bool, length: int, input_length: int, causal: Causal) -> int:
    queries = config.heads(is_decoder) * config.stack_head_dim(is_decoder)
    keys = config.kv_heads(is_decoder) * config.stack_head_dim(is_decoder)
    layers = config.num_decoder_layers if is_decoder else config.num_encoder_layers

    def projections(tokens: int, width: int) -> int:  # a pair of them: query and output, or key and value
        return 2 * 2 * tokens * config.embed_dim * width

    def attention(seen: int) -> int:  # scores, and the values they weigh
        return 2 * 2 * length * seen * queries

    mlp = 2 * length * config.embed_dim * config.stack_mlp_dim(is_decoder) * (3 if config.gated else 2)
    layer = projections(length, queries) + projections(length, keys) + mlp
    if is_decoder and config.num_encoder_layers:
        layer += projections(length, queries) + projections(input_length, keys) + attention(input_length)
    total = layers * layer
    for index in range(layers):
        windowed = config.attention_window and not (config.alternating_window and index % 2 == 0)
        seen = min(config.attention_window, length) if windowed else length
        # Of a window, only the few queries at the beginning see less than all of it.
        half = is_decoder and causal == "halved" and seen == length
        total += attention(seen) // (2 if half else 1)
    return total


def _encoder_head(config: TransformerConfig, length: int) -> int:
    """Returns the operations of the head of an encoder alone; other models have none there."""
    total = 2 * config.embed_dim**2 if config.pooler else 0
    if config.head in ("masked_lm", "pretraining"):
        total += 2 * length * config.embed_dim * (config.embed_dim + config.vocab_size)
    if config.head == "pretraining":
        total += 2 * config.embed_dim * 2
    if config.head == "sequence_classification":
        total += 2 * config.embed_dim * config.num_labels
    if config.head in ("token_classification", "span"):
        total += 2 * length * config.embed_dim * config.num_labels
    return total


def training_flops(config: TransformerConfig, batch: Mapping[str, Any], causal: Causal = "full") -> int:
    """Returns the operations of a training step on a batch: 3 x forward of every row, padding included.

    Args:
      config: the model.
      batch: arrays, or anything with a `shape`, by the names of the batch contract; `[B, S]` and `[B, T]`.
      causal: see `forward_flops`.
    """
    shapes = {name: batch[name].shape for name in ("encoder_input_tokens", "decoder_input_tokens") if name in batch}
    rows = next(iter(shapes.values()))[0]
    inputs, targets = (shapes.get(name, (rows, 0))[1] for name in ("encoder_input_tokens", "decoder_input_tokens"))
    return 3 * rows * forward_flops(config, inputs, targets, causal)


def xla_flops(function: Callable[..., Any], *args: Any) -> float:
    """Returns XLA's own count of the operations of a function, loops included; nothing is compiled or run.

    XLA's analysis counts the body of a loop as often as it is written, however often it runs. So each `scan` is found
    in the traced program, its body is counted by itself, and the count is taken times the number of its iterations,
    which is known. It is the program as it is handed to XLA: all elementwise operations, and what the backward pass
    recomputes, are in it, which the formula leaves out. Call it outside of a mesh: the count is then the whole
    program's, on all devices.

    Args:
      function: to be counted.
      args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    return _count(jax.make_jaxpr(function)(*args))[0]


def _count(program: core.ClosedJaxpr) -> tuple[float, float]:
    """Returns the count with every loop as often as it runs, and with every loop's body as often as it is written."""
    as_written = _as_written(program)
    total = as_written
    for length, written, body in _loops(program.jaxpr):
        body_total, body_as_written = _count(body)
        total += length * body_total - written * body_as_written
    return total, as_written


def _as_written(program: core.ClosedJaxpr) -> float:
    analysis: Any = jax.jit(core.jaxpr_as_fun(program)).lower(*program.in_avals).cost_analysis()
    return float(analysis.get("flops", 0.0)) if analysis else 0.0


def _loops(program: core.Jaxpr) -> Iterator[tuple[int, int, core.ClosedJaxpr]]:
    """Yields the outermost loops of a program, wherever functions hide them: iterations, times written, and body."""
    for equation in program.eqns:
        if equation.primitive.name == "scan":
            length, unroll = equation.params["length"], equation.params["unroll"]
            yield length, unroll + length % unroll, equation.params["jaxpr"]
        elif platforms := equation.params.get("branches_platforms"):
            yield from _loops(equation.params["branches"][_branch_here(platforms)].jaxpr)
        else:
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                        yield from _loops(inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner)


def _branch_here(platforms: tuple[tuple[str, ...] | None, ...]) -> int:
    """Returns which branch of a `platform_dependent` this process compiles; None stands for all other platforms."""
    backend = jax.default_backend()
    names = {"cuda", "rocm"} if backend == "gpu" else {backend}
    return next(index for index, those in enumerate(platforms) if those is None or names & set(those))


_T = 10**12

# Dense peaks in operations per second of one JAX device, by `device_kind`: products of bfloat16 (on GPUs float16 as
# well), of float32 as JAX does them by default (TF32 on GPUs, one pass of bfloat16 on TPUs), and of float32 in full.
# Sources: cloud.google.com/tpu/docs (v2, v3, v4, v5e, v5p and v6e system architecture pages; a v2 or v3 chip is two JAX
# devices, 45 and 123 TFLOP/s between them); NVIDIA's data sheets, whose tensor core figures "with sparsity" are twice
# the dense ones: A100 (nvidia-a100-datasheet-us), H100 (h100-tensor-core-gpu-datasheet: SXM5, PCIe; H100 NVL product
# brief), H200 (hopper-h200-datasheet: SXM, NVL), GH200 (grace-hopper-superchip-datasheet), B200 (HGX B200, per GPU).
_PEAKS: Mapping[str, tuple[float, float, float | None]] = {
    "TPU v2": (22.5 * _T, 22.5 * _T, None),
    "TPU v3": (61.5 * _T, 61.5 * _T, None),
    "TPU v4": (275 * _T, 275 * _T, None),
    "TPU v5 lite": (197 * _T, 197 * _T, None),
    "TPU v5e": (197 * _T, 197 * _T, None),
    "TPU v5": (459 * _T, 459 * _T, None),
    "TPU v5p": (459 * _T, 459 * _T, None),
    "TPU v6 lite": (918 * _T, 918 * _T, None),
    "TPU v6e": (918 * _T, 918 * _T, None),
    "NVIDIA A100-SXM4-40GB": (312 * _T, 156 * _T, 19.5 * _T),
    "NVIDIA A100-SXM4-80GB": (312 * _T, 156 * _T, 19.5 * _T),
    "NVIDIA A100-PCIE-40GB": (312 * _T, 156 * _T, 19.5 * _T),
    "NVIDIA A100 80GB PCIe": (312 * _T, 156 * _T, 19.5 * _T),
    "NVIDIA H100 80GB HBM3": (989.4 * _T, 494.7 * _T, 66.9 * _T),
    "NVIDIA H100 PCIe": (756 * _T, 378 * _T, 51 * _T),
    "NVIDIA H100 NVL": (835.5 * _T, 417.5 * _T, 60 * _T),
    "NVIDIA H200": (989.4 * _T, 494.7 * _T, 66.9 * _T),
    "NVIDIA H200 NVL": (835.5 * _T, 417.5 * _T, 60 * _T),
    "NVIDIA GH200 480GB": (989.4 * _T, 494.7 * _T, 66.9 * _T),
    "NVIDIA B200": (2250 * _T, 1125 * _T, 75 * _T),
}


def peak_flops(device_kind: str, dtype: str, precision: str | None = None) -> float | None:
    """Returns the published peak of one device in operations per second, or None where none is known.

    A name has to be in the table as it is: a slice of a GPU (MIG) has a name of its own and a peak that nobody
    publishes. So has a CPU.

    Args:
      device_kind: `jax.Device.device_kind`.
      dtype: of the computation: float32, bfloat16 or float16.
      precision: JAX's `jax_default_matmul_precision`; None: the default.
    """
    if device_kind not in _PEAKS:
        return None
    half, default, full = _PEAKS[device_kind]
    if dtype == "float32":
        if precision in (None, "default", "fastest", "tensorfloat32") or (half == default and precision == "bfloat16"):
            return default
        return full if precision in ("highest", "float32") else None
    if dtype == "float16" and device_kind.startswith("TPU"):
        return None  # there are no such units; what XLA does instead is not published
    return half
