"""Fingerprints say the same on any mesh and of what was read back; seals name the file that is not as it was."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite import sharding
from t5x_lite.training import integrity
from t5x_lite.training.integrity import Findings, compare, digests, fingerprints, part_of_fingerprint, seal

SHAPES = [(), (1,), (7,), (5, 3), (4, 6, 2), (1, 40_000), (70_000, 1), (3, 1, 20_000)]
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"]


def draw(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(len(shape)).normal(size=shape) * 50
    return np.asarray(values > 0 if dtype == "bool" else np.abs(values), jnp.dtype(dtype))


def whole(values: np.ndarray) -> int:
    return part_of_fingerprint(values, [0] * values.ndim, values.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_devices_and_host_agree(shape: tuple[int, ...]) -> None:
    values = draw(shape)
    assert fingerprints({"x": jnp.asarray(values)}) == {"x": whole(values)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_devices_and_host_agree_in_every_dtype(dtype: str) -> None:
    values = draw((5, 6), dtype)
    assert fingerprints({"x": jnp.asarray(values)}) == {"x": whole(values)}


def test_eight_bytes_count_as_two_halves() -> None:
    values = draw((5, 6)).astype(np.float64)
    halves = values.view(np.uint32).reshape(5, 6, 2)
    assert whole(values) == whole(halves)
    changed = values.copy()
    changed.view(np.uint32)[2, 3] ^= 1
    assert whole(changed) != whole(values)


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:4,model:2", "fsdp:2,model:4"])
def test_the_layout_has_no_part_in_it(mesh: str) -> None:
    values = draw((16, 24))
    layout = NamedSharding(sharding.make_mesh(mesh), PartitionSpec("fsdp", "model"))
    assert fingerprints({"x": jax.device_put(values, layout)}) == {"x": whole(values)}


def test_many_arrays_of_a_mesh_at_once() -> None:
    # As many programs, each reducing over groups of devices, would wait for each other until XLA ended the process.
    mesh = sharding.make_mesh("data:2,fsdp:2,model:2")
    specs = [PartitionSpec("fsdp"), PartitionSpec(None, "model"), PartitionSpec("fsdp", "model"), PartitionSpec("data")]
    values = {f"{n}": draw((8 * (n % 7 + 1), 16)) for n in range(60)}
    arrays = {name: jax.device_put(x, NamedSharding(mesh, specs[int(name) % 4])) for name, x in values.items()}
    assert fingerprints(arrays) == {name: whole(x) for name, x in values.items()}


def test_parts_add_up() -> None:
    values = draw((12, 10, 3))
    total = 0
    for i in range(0, 12, 5):
        for j in range(0, 10, 4):
            total += part_of_fingerprint(values[i : i + 5, j : j + 4], (i, j, 0), values.shape)
    assert total % 2**32 == whole(values)


def test_every_bit_and_every_place_count() -> None:
    values = draw((8, 8))
    seen = {whole(values)}
    for bit in range(32):
        changed = values.copy()
        changed.view(np.uint32)[3, 5] ^= np.uint32(1) << bit
        seen.add(whole(changed))
    for place in range(1, 64):  # two numbers change places
        changed = values.copy().reshape(-1)
        changed[[0, place]] = changed[[place, 0]]
        seen.add(whole(changed.reshape(8, 8)))
    seen.add(whole(values.T))
    assert len(seen) == 1 + 32 + 63 + 1


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    for name, text in (("a", "one"), ("folder/b", "two"), ("folder/c", "three"), ("d", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    seal(tmp_path, digests(tmp_path, fresh=True))
    return tmp_path


def test_nothing_is_found_where_nothing_has_changed(sealed: Path) -> None:
    assert compare(sealed) == Findings(sealed=True)
    assert compare(sealed / "folder") == Findings(sealed=False)


def test_every_file_that_is_not_as_it_was_is_named(sealed: Path) -> None:
    (sealed / "a").write_text("onf")
    (sealed / "folder" / "b").write_text("tw")
    (sealed / "folder" / "c").unlink()
    (sealed / "d").write_text("more")
    (sealed / "folder" / "new").write_text("")
    found = compare(sealed)
    assert found == Findings(True, ("a", "d", "folder/b"), ("folder/c",), ("folder/new",))
    assert found.damage == ["a has changed", "d has changed", "folder/b has changed", "folder/c is missing"]


def test_processes_share_the_reading_and_nothing_falls_between(sealed: Path) -> None:
    (sealed / "a").write_text("onf")
    (sealed / "folder" / "b").write_text("tw")
    found = [compare(sealed, (index, 3)).changed for index in range(3)]
    assert sorted(name for names in found for name in names) == ["a", "folder/b"]
    parts = [digests(sealed, (index, 3)) for index in range(3)]
    assert {name: text for part in parts for name, text in part.items()} == digests(sealed)


def test_the_seal_is_sealed_and_need_not_be(sealed: Path) -> None:
    text = (sealed / integrity.SEAL).read_text()
    digit = text.index('"a": "') + 6
    (sealed / integrity.SEAL).write_text(text[:digit] + ("1" if text[digit] == "0" else "0") + text[digit + 1 :])
    with pytest.raises(integrity.UnreadableCheckpoint, match=r"checksums\.json has changed"):
        compare(sealed)
    (sealed / integrity.SEAL).write_text(json.dumps(digests(sealed)))  # as they were before
    assert compare(sealed) == Findings(sealed=True)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7"])
def test_a_seal_that_cannot_be_read_is_damage(sealed: Path, text: str) -> None:
    (sealed / integrity.SEAL).write_text(text)
    with pytest.raises(integrity.UnreadableCheckpoint, match=r"checksums\.json cannot be read"):
        compare(sealed)
