"""What a step reads, what a copy moves, and what fits."""

from dataclasses import replace

import jax
import pytest
from jax.sharding import Mesh

from t5x_lite import benchmarking, sharding
from t5x_lite.benchmarking import Cell, StepBytes, copy_bandwidth, random_batch, step_bytes
from t5x_lite.errors import InputError
from t5x_lite.models import PRESETS, TransformerConfig, build


def reads(config: TransformerConfig, cell: Cell, dtype: str = "float32", mesh: Mesh | None = None) -> StepBytes:
    model = build(config, dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), model.param_shapes())
    return step_bytes(model, params, cell, mesh)


def test_the_longest_prompt_that_fits() -> None:
    # The last new token is never read, and so needs no position.
    Cell(input_length=961, new_tokens=64).check(PRESETS["gpt2"])
    with pytest.raises(InputError, match="1025 positions"):
        Cell(input_length=962, new_tokens=64).check(PRESETS["gpt2"])


def test_bytes_of_a_step(tiny_config: TransformerConfig) -> None:
    # D 32, 8 heads of 6 (48), F 64, V 256; three layers of four norms, of which one is the final one's.
    layer = 4 * 32 * 48 + 2 * 32 * 48 + 3 * 32 * 64 + 3 * 32
    numbers = 3 * layer + 32 * 8 + 32 + 32 * 256  # with bias table, final norm and head
    token = 3 * 2 * 48
    greedy = reads(tiny_config, Cell("greedy", 1, input_length=10, new_tokens=4))
    assert greedy == StepBytes(weights=4 * numbers, self_cache=4 * token * 3, cross_cache=4 * token * 10)
    beams = reads(tiny_config, Cell("beam4", 5, input_length=10, new_tokens=4), "bfloat16")
    # Beams share the start token and the encoder, and each has its own N / 2 tokens.
    assert beams == StepBytes(2 * numbers, 2 * 5 * token * (1 + 4 * 2), 2 * 5 * token * 10)
    assert beams.total == beams.weights + beams.self_cache + beams.cross_cache


def test_a_tied_table_counts_once(tiny_config: TransformerConfig, v1_0_config: TransformerConfig) -> None:
    cell = Cell()
    gate = 3 * 32 * 64
    assert reads(tiny_config, cell).weights - reads(v1_0_config, cell).weights == 4 * gate


def test_bytes_of_a_step_of_a_decoder_alone(tiny_config: TransformerConfig) -> None:
    gpt = replace(
        tiny_config, family="gpt", num_encoder_layers=0, positions="learned", max_positions=64, tied_head=True,
        num_kv_heads=2,
    )  # fmt: skip
    layer = 2 * 32 * 48 + 2 * 32 * 12 + 3 * 32 * 64 + 2 * 32
    token = 3 * 2 * 12  # two heads of keys and values
    # The table of positions is read a row at a time; beams share their prompt.
    expected = StepBytes(4 * (3 * layer + 32 + 32 * 256), 4 * token * (10 + 4 * 2), 0)
    assert reads(gpt, Cell("beam4", 1, input_length=10, new_tokens=4)) == expected


def test_devices_that_split_the_batch_each_read_the_weights(tiny_config: TransformerConfig) -> None:
    cell = Cell(batch_size=8)
    meshes = [sharding.make_mesh(text) for text in ("model:8", "data:2,fsdp:2,model:2")]
    one, split = (reads(tiny_config, cell, mesh=mesh) for mesh in meshes)
    assert split.weights == 4 * one.weights == 4 * reads(tiny_config, cell).weights
    assert split.cross_cache == one.cross_cache


def test_inputs_have_no_padding() -> None:
    config = TransformerConfig(vocab_size=5, eos_id=4, pad_id=0)
    assert set(random_batch(config, Cell(batch_size=8))["encoder_input_tokens"].flat) == {1, 2, 3, 4}


def test_copies_are_counted_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarking, "_COPY_BYTES", 2**20)
    monkeypatch.setattr(benchmarking.os, "sysconf", lambda name: 0)
    monkeypatch.setattr(benchmarking, "_seconds", lambda work: work() and 0.5)
    assert copy_bandwidth(jax.devices()) == 2 * 2**20 / 0.5


def test_the_cache_is_smaller_than_what_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarking, "_COPY_BYTES", 2**10)
    monkeypatch.setattr(benchmarking.os, "sysconf", lambda name: 2**20)
    _, copied = benchmarking._host_copy()
    assert copied == 4 * 2**20


def test_other_devices_copy_by_a_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarking, "_COPY_BYTES", 2**20)
    copy, copied = benchmarking._device_copy(jax.devices()[:2])
    assert copied == benchmarking._COPIES * 2 * 2**20
    result = copy()
    assert result.nbytes * benchmarking._COPIES == copied
    assert len(result.sharding.device_set) == 2
