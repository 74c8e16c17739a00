"""How fast a model generates on this machine, and how fast the machine's memory would let it.

A decoding step does little with every number that it reads: at small batches the time to read the decoder's weights
and caches once is what it cannot go below. That time is the roofline,

    tokens/s = B * copy bandwidth / bytes of a step,

and the share of it that is reached is comparable between machines, models and number formats. At large batches
arithmetic takes over, and the share says little.

The bandwidth is measured, in the same run, by copying arrays that no cache holds; both the bytes read and the bytes
written count, as in McCalpin's STREAM.
"""

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import sharding
from t5x_lite.decoding.generate import cache_slots, generate
from t5x_lite.decoding.generation_config import GenerationConfig
from t5x_lite.errors import InputError
from t5x_lite.language_model import LanguageModel
from t5x_lite.loading import load
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import PRESETS, build
from t5x_lite.models.transformer import Transformer

_COPY_BYTES = 2**28  # of an array that is copied, if four times the last-level cache is not more
_COPIES = 16  # that a device other than the host makes at a time


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
      strategy: `greedy`, `sample`, or `beam` and the number of beams, as in `beam4`.
      batch_size: examples that are decoded together, B.
      input_length: tokens of each: of the encoder's input or, for a decoder alone, of the prompt.
      new_tokens: tokens generated for each, N. None ends earlier.
    """

    strategy: str = "greedy"
    batch_size: int = 1
    input_length: int = 128
    new_tokens: int = 64

    def __post_init__(self) -> None:
        """Raises InputError for a strategy that is unknown or a size below 1."""
        for name in ("batch_size", "input_length", "new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.strategy not in ("greedy", "sample") and not re.fullmatch(r"beam([2-9]|[1-9]\d+)", self.strategy):
            raise InputError(f"strategy '{self.strategy}' is unknown, allowed: greedy, sample, beam2, beam3, ...")

    @property
    def num_beams(self) -> int:
        """Sequences of each example that are decoded together."""
        return int(self.strategy.removeprefix("beam")) if self.strategy.startswith("beam") else 1

    def generation_config(self) -> GenerationConfig:
        """Returns the configuration that decodes this way, without an end token."""
        return GenerationConfig(
            max_new_tokens=self.new_tokens,
            num_beams=self.num_beams,
            do_sample=self.strategy == "sample",
            eos_token_id=(),
        )

    def check(self, model: TransformerConfig) -> None:
        """Raises InputError if a model does not generate, or has no positions for this many tokens."""
        if not model.num_decoder_layers:
            raise InputError("the model has no decoder: it cannot predict what comes next")
        last = self.new_tokens - 1  # the last token is not read again
        sides = {"input_length": self.input_length, "new_tokens": 1 + last}
        if not model.num_encoder_layers:
            sides = {"input_length and new_tokens": self.input_length + last}
        for what, length in sides.items():
            if model.positions == "learned" and length > model.max_positions:
                raise InputError(f"{what} take {length} positions, but the model has {model.max_positions}")


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decoding step must read from memory, of all devices together.

    Attributes:
      weights: of the decoder and the output head, by each group of devices that holds them once. A tied table counts
        once. What serves once per example or as a single row does not count: keys and values of the encoder's output
        are projected when the input is read, and of embedding and position tables a step reads a row.
      self_cache: keys and values that the tokens of a step see, as the mean over all steps: the prompt's once per
        example, since beams share it, and N/2 of each beam's own.
      cross_cache: keys and values of the encoder's output, once per example.
    """

    weights: int
    self_cache: int
    cross_cache: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.self_cache + self.cross_cache


def step_bytes(model: Transformer, params: Any, cell: Cell, mesh: Mesh | None = None) -> StepBytes:
    """Returns what a step reads; caches are in the model's dtype.

    Args:
      model: the model.
      params: its parameters, or their shapes and dtypes.
      cell: how it decodes.
      mesh: over which it is split. Devices that split the batch each read all weights; the caches are counted as if
        they were split over all devices.
    """
    cfg = model.config
    leaves = jax.tree_util.tree_leaves_with_path(params)
    weights = _bytes([leaf for path, leaf in leaves if _read_by_a_step(path, cfg)])
    copies = sharding.batch_ways(mesh) if mesh else 1
    # The keys and values of a token.
    token = 2 * cfg.num_decoder_layers * cfg.kv_heads(True) * cfg.stack_head_dim(True) * jnp.dtype(model.dtype).itemsize
    prompt, source = (1, cell.input_length) if cfg.num_encoder_layers else (cell.input_length, 0)
    # The steps after the first token see 1, 2, ... N - 1 tokens besides the prompt.
    seen = prompt + cell.num_beams * cell.new_tokens / 2
    return StepBytes(
        weights=weights * copies,
        self_cache=round(cell.batch_size * token * seen),
        cross_cache=cell.batch_size * token * source,
    )


def _read_by_a_step(path: Any, config: TransformerConfig) -> bool:
    names = jax.tree_util.keystr(path, simple=True, separator="/")
    if names.startswith("embedding/"):
        return config.tied_head
    once = "cross_attention/key/", "cross_attention/value/", "decoder/positions/"
    return names.startswith(("decoder/", "head/")) and not any(name in names for name in once)


def copy_bandwidth(devices: Sequence[Any], repeats: int = 7) -> float:
    """Returns the bytes per second, read and written, of the fastest of several copies.

    The host's copy is NumPy's, with a thread on every core that this process may use; that of other devices is
    compiled, and all of them copy at once.
    """
    copy, copied = _host_copy() if devices[0].platform == "cpu" else _device_copy(devices)
    copy()
    return 2 * copied / min(_seconds(copy) for _ in range(repeats))


def _host_copy() -> tuple[Callable[[], Any], int]:
    """Returns a function that copies, and the bytes of what it copies."""
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):  # not every system tells
        cache = 0
    source = np.ones(max(_COPY_BYTES, 4 * cache) // 4, np.float32)
    target = np.zeros_like(source)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(target, cores), np.array_split(source, cores)
    threads = ThreadPoolExecutor(cores)
    return lambda: list(threads.map(np.copyto, *parts)), source.nbytes


def _device_copy(devices: Sequence[Any]) -> tuple[Callable[[], Any], int]:
    mesh = jax.make_mesh((len(devices),), ("all",), devices=list(devices))
    source = jnp.ones(_COPY_BYTES // 4 * len(devices), jnp.float32)
    source = jax.device_put(source, NamedSharding(mesh, PartitionSpec("all")))
    copy = jax.jit(jnp.copy)

    def copies() -> Any:
        # One after the other without waiting: what it takes to start one and to hear of its end is no part of it.
        copied = source
        for _ in range(_COPIES):
            copied = copy(source)
        return jax.block_until_ready(copied)

    return copies, _COPIES * source.nbytes


def open_model(name: str, dtype: str = "float32", mesh: str = "") -> LanguageModel:
    """Returns a model whose parameters are unstacked, which is how they decode fastest.

    Args:
      name: of a preset, which has fresh weights and generates nonsense as fast as sense; or a directory, as
        `load` takes it.
      dtype: of computation and parameters, float32 or bfloat16.
      mesh: such as `model:8`; empty: one device.

    Raises:
      InputError: nothing that can be loaded, or a bad dtype or mesh.
    """
    if name in PRESETS:
        model, tokenizer = build(name, dtype), None
        layout = sharding.make_mesh(mesh) if mesh else sharding.make_mesh("data:1", jax.devices()[:1])
        params = _random_params(model, layout)
    else:
        lm = load(name, dtype, mesh)
        model, params, tokenizer, layout = lm.model, lm.params, lm.tokenizer, lm.mesh
    return LanguageModel(model, model.unstacked(params), tokenizer, layout)


def _random_params(model: Transformer, mesh: Mesh) -> Any:
    sharding.check_divides(mesh, model.config.sharded_sizes())
    layouts = sharding.tree_shardings(mesh, model.logical_axes(), model.param_shapes())

    def draw(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(model.dtype), model.init_params(key))

    return jax.jit(draw, out_shardings=layouts)(jax.random.key(0))


class Decoding:
    """A cell that is compiled for a model, and ready to be timed.

    Attributes:
      cell: what is decoded, and how.
      compile_seconds: that tracing and compiling took, or reading from the compilation cache.
    """

    def __init__(self, lm: LanguageModel, cell: Cell):
        """Compiles, and runs once, which allocates what later runs reuse.

        Raises:
          InputError: the model cannot decode such a cell, or the batch does not split over the mesh.
        """
        cell.check(lm.config)
        sharding.check_divides(lm.mesh, {"batch": cell.batch_size})
        self.cell = cell
        self._lm = lm
        self._args = lm.params, sharding.put_batch(lm.mesh, random_batch(lm.config, cell))
        with jax.set_mesh(lm.mesh):
            started = time.perf_counter()
            run = jax.jit(lambda params, batch: generate(lm.model, params, batch, cell.generation_config()))
            self._compiled = run.lower(*self._args).compile()
            self.compile_seconds = time.perf_counter() - started
        self.seconds()

    def seconds(self) -> float:
        """Generates once, reading the input included, and returns how long it took."""
        return _seconds(lambda: jax.block_until_ready(self._compiled(*self._args)))

    def report(self, seconds: float, bandwidth: float) -> dict[str, Any]:
        """Returns what a run says: the cell, speed, memory, and the roofline with the share of it that was reached.

        Args:
          seconds: of one run. It includes reading the input, which the roofline leaves out, so the share is that of
            the steps or less.
          bandwidth: bytes per second.
        """
        cell, lm = self.cell, self._lm
        cfg, reads = lm.config, step_bytes(lm.model, lm.params, cell, lm.mesh)
        tokens = cell.batch_size * cell.new_tokens
        roofline = cell.batch_size * bandwidth / reads.total
        slots = cache_slots(1 if cfg.num_encoder_layers else cell.input_length, cell.new_tokens, cell.num_beams)
        cache = jax.eval_shape(lambda: lm.model.new_cache(cell.batch_size, slots, cell.input_length).layers)
        return {
            "strategy": cell.strategy,
            "batch_size": cell.batch_size,
            "input_length": cell.input_length,
            "new_tokens": cell.new_tokens,
            "dtype": jnp.dtype(lm.model.dtype).name,
            "mesh": sharding.describe(lm.mesh),
            "tokens_per_second": tokens / seconds,
            "ms_per_token": 1000 * seconds / cell.new_tokens,
            "compile_seconds": self.compile_seconds,
            "weights_bytes": _bytes(lm.params),
            "cache_bytes": _bytes(cache),
            "peak_bytes": peak_bytes(self._compiled),
            "step_bytes": reads.total,
            "step_weights_bytes": reads.weights,
            "step_self_cache_bytes": reads.self_cache,
            "step_cross_cache_bytes": reads.cross_cache,
            "copy_bytes_per_second": bandwidth,
            "roofline_tokens_per_second": roofline,
            "roofline_share": tokens / seconds / roofline,
        }


def peak_bytes(compiled: Any) -> int:
    """Returns how many bytes a compiled function holds at most; an argument that it gives back counts once."""
    memory = compiled.memory_analysis()
    # What the compiler calls the peak leaves out the temporaries on some backends.
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - memory.alias_size_in_bytes


def measure(lm: LanguageModel, cell: Cell, repeats: int, bandwidth: float) -> dict[str, Any]:
    """Compiles a cell and returns the report of its median run; see `Decoding.report`."""
    decoding = Decoding(lm, cell)
    return decoding.report(median(decoding.seconds() for _ in range(repeats)), bandwidth)


def random_batch(config: TransformerConfig, cell: Cell) -> dict[str, np.ndarray]:
    """Returns inputs or prompts of random tokens, none of them padding."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (cell.batch_size, cell.input_length), np.int32)
    if config.pad_id is not None:
        tokens = np.where(tokens == config.pad_id, (config.pad_id + 1) % config.vocab_size, tokens)
    return {"encoder_input_tokens" if config.num_encoder_layers else "decoder_input_tokens": tokens}


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
