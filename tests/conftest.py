"""What all tests share: eight CPU devices, one compilation cache, tiny models and random batches.

The environment is set here, before anything imports JAX, and not through `jax.config`, so that the processes which
tests start see the same devices and reuse what was compiled already.
"""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    # Most of a test's time is compiling. Without LLVM's optimisations that takes half as long, and models this small
    # run no slower to speak of.
    "--xla_backend_optimization_level": 0,
    # The older way of fusing operations compiles in half the time again; an XLA that no longer has it ignores the word.
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters",
    # By default a program is compiled in up to 32 parts, side by side. That is for idle cores, of which tests that run
    # beside each other leave none, and takes a seventh more work.
    "--xla_cpu_parallel_codegen_split_count": 1,
}
for _flag, _value in FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="t5x_lite-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
_tokens = tempfile.mkdtemp(prefix="t5x_lite-tests-")
os.environ["T5X_LITE_CACHE"] = _tokens  # the caches of whoever runs the tests are none of their business
atexit.register(shutil.rmtree, _tokens, ignore_errors=True)

import dataclasses  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from t5x_lite.models import TransformerConfig, build  # noqa: E402

# Tracing makes millions of objects, few of them garbage: by default Python goes through all of them again and again.
gc.set_threshold(50_000, 20, 100)

RandomBatch = Callable[..., dict[str, np.ndarray]]
RandomParams = Callable[..., Any]


# Whatever runs longest begins first, so that two processes that share the files between them end together.
LONGEST = (
    "test_readme.py",
    "test_notebooks.py",
    "test_loop.py",
    "test_meshes.py",
    "test_language_model_families.py",
    "test_step.py",
    "test_language_model.py",
    "test_families.py",
    "test_generation.py",
    "test_cached_families.py",
    "test_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of `LONGEST` in front, for `--no-loadscope-reorder`: the other order is by how many tests."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Leaves out of every later search for garbage what is there for good: modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_config() -> TransformerConfig:
    """A T5 v1.1 of 97 thousand parameters, every size different; it divides over any mesh of eight devices.

    `num_heads * head_dim` is not `embed_dim` (as in T5-11B), so a test that mixes them up fails.
    """
    return TransformerConfig(
        vocab_size=256,
        embed_dim=32,
        num_heads=8,
        head_dim=6,
        mlp_dim=64,
        num_encoder_layers=2,
        num_decoder_layers=3,
        activation="gelu_tanh",
        gated=True,
        tied_head=False,
        scaled_head=False,
    )


@pytest.fixture(scope="session")
def v1_0_config(tiny_config: TransformerConfig) -> TransformerConfig:
    """The same as a T5 v1.0: relu without a gate, the head tied to the embedding and scaled."""
    return dataclasses.replace(tiny_config, activation="relu", gated=False, tied_head=True, scaled_head=True)


@pytest.fixture(scope="session")
def umt5_config(tiny_config: TransformerConfig) -> TransformerConfig:
    """The same as a umT5: a position bias in every layer."""
    return dataclasses.replace(tiny_config, relative_bias_per_layer=True)


@pytest.fixture(scope="session")
def random_params() -> RandomParams:
    """A function `(config, seed=0) -> params`, as NumPy arrays.

    Sizes are those of a fresh T5, but norm scales and bias tables are not constant or small: what a model does with
    them shows. And nothing is compiled, whereas `Transformer.init` takes longer to compile than anything else.
    """

    def make(config: TransformerConfig, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)

        def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
            names = jax.tree_util.keystr(path, simple=True, separator="/")
            value = rng.uniform(0.5, 1.5, shape.shape) if names.endswith("scale") else rng.normal(size=shape.shape)
            if names.endswith("kernel"):
                value *= (shape.shape[-2] * (config.head_dim if "query" in names else 1)) ** -0.5
            return value.astype(np.float32)

        return jax.tree_util.tree_map_with_path(leaf, build(config).param_shapes())

    return make


@pytest.fixture(scope="session")
def sharp_params(random_params: RandomParams) -> RandomParams:
    """What `random_params` draws for T5, for the others: queries that make attention choose, small biases.

    T5's queries are 1/sqrt(head_dim) smaller; and biases of size 1 after every norm would make all tokens alike.
    """

    def make(config: TransformerConfig, seed: int = 0) -> Any:
        def leaf(path: Any, value: np.ndarray) -> np.ndarray:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            factor = (
                2 * config.head_dim**0.5 if name.endswith("query/kernel") else 0.2 if name.endswith("bias") else 1.0
            )
            return value * np.float32(factor)

        return jax.tree_util.tree_map_with_path(leaf, random_params(config, seed))

    return make


@pytest.fixture(scope="session")
def random_batch() -> RandomBatch:
    """A function `(rng, rows, input_length, target_length, vocab) -> batch` of random tokens.

    Inputs and targets end in EOS (1) and are padded with 0; their lengths differ from row to row. The first row's
    target is as long as it may be and the last row's is EOS alone, so no two ways of averaging over tokens agree.
    There are no segment ids: models derive them from the pads.
    """

    def make(
        rng: np.random.Generator, rows: int, input_length: int, target_length: int, vocab: int
    ) -> dict[str, np.ndarray]:
        def tokens(length: int, sizes: np.ndarray) -> np.ndarray:
            ids = rng.integers(2, vocab, (rows, length))
            place = np.arange(length)[None, :]
            return np.where(place < sizes[:, None] - 1, ids, np.where(place == sizes[:, None] - 1, 1, 0)).astype(
                np.int32
            )

        target_sizes = rng.integers(1, target_length + 1, rows)
        target_sizes[-1], target_sizes[0] = 1, target_length
        targets = tokens(target_length, target_sizes)
        return {
            "encoder_input_tokens": tokens(input_length, rng.integers(1, input_length + 1, rows)),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1] * (targets > 0),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.float32),
        }

    return make


TINY_RUN = (
    "model=t5-v1.1-small",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.num_heads=8",
    "model.head_dim=8",
    "model.num_encoder_layers=2",
    "model.num_decoder_layers=2",
    "tokenizer=unigram:384",
    "train.batch_size=8",
    "train.input_length=32",
    "train.steps=12",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "train.eval_every=4",
    "train.eval_batches=2",
    "optimizer.warmup_steps=100",
)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 1,500 sentences in a language of 400 invented words."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(400)]
    # Some words are frequent and most are rare, as in any language.
    lines = [" ".join(words[int(400 * x**3)] for x in rng.random(rng.integers(5, 12))) + "." for _ in range(1500)]
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_settings(corpus_file: Path) -> list[str]:
    """Settings of a run that takes seconds; add `out=`."""
    return [*TINY_RUN, f"data.path={corpus_file}"]


@pytest.fixture(scope="session")
def trained_run(tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run directory. Tests that change it copy it first."""
    from t5x_lite.config import resolve
    from t5x_lite.training.loop import train

    out = tmp_path_factory.mktemp("runs") / "trained"
    train(resolve(None, [*tiny_settings, f"out={out}"]).config)
    return out
