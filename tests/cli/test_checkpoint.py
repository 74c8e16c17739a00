"""Checkpoints on the command line: which there are and why, what is wrong with them, and how two differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import config
from t5x_lite.training import checkpoint_files
from t5x_lite.training.checkpoints import Checkpointer, save_params
from t5x_lite.training.integrity import SEAL, UnreadableCheckpoint
from t5x_lite.training.state import TrainState

LARGE = (600, 700)  # of 4 bytes; stored in several parts where those are small


def make_state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    return TrainState(
        step=jnp.int32(step),
        params={"kernel": jnp.asarray(rng.normal(size=LARGE), jnp.float32), "scale": jnp.ones(8)},
        opt_state={"count": jnp.int32(step), "mu": jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16)},
        skipped=jnp.int32(0),
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    checkpointer = Checkpointer(run / "checkpoints", keep=2, keep_every=4)
    for step, loss in ((2, 1.5), (4, 3.0), (5, None), (6, None), (7, None)):
        checkpointer.save(make_state(step), loss)
    checkpointer.close()
    settings = ["model=t5-small", f"out={run}", "train.keep_checkpoints=2", "train.keep_every=4"]
    config.save(config.resolve(None, settings).config, run / "config.yaml")
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def one_line(result: tuple[int, str, str], status: int) -> str:
    assert result[0] == status, result
    (line,) = result[2].strip().splitlines()
    assert line.startswith("t5x-lite: ")
    return line


def test_list_says_what_is_kept_and_why(t5x, run: Path) -> None:
    (run / "checkpoints" / "9.unreadable").mkdir()
    (run / "checkpoints" / ".8.partial").mkdir()
    (run / "checkpoints" / "6" / SEAL).unlink()
    status, out, err = t5x("checkpoint", "list", run)
    assert (status, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    assert [line[0] for line in lines] == [
        "step",
        *"2467",
        "9.unreadable was damaged and set aside",
        ".8.partial is being written, or was cut short",
    ]
    text = dict(zip("2467", out.splitlines()[1:5], strict=True))
    assert all(
        reason in text[step] for step, reason in zip("2467", ("best", "every 4", "last 2", "latest"), strict=True)
    )
    assert "1.5000" in text["2"]
    assert "optimizer params progress" in text["2"]
    status, out, _ = t5x("checkpoint", "list", run, "--json")
    entries = json.loads(out)["checkpoints"]
    assert [entry["kept"] for entry in entries] == [["best"], ["every 4"], ["last 2"], ["latest"]]
    assert [entry["sealed"] for entry in entries] == [True, True, False, True]
    assert [entry["loss"] for entry in entries] == [1.5, 3.0, None, None]
    assert all(LARGE[0] * LARGE[1] * 4 < entry["bytes"] < LARGE[0] * LARGE[1] * 4.2 for entry in entries)
    assert entries == sorted(entries, key=lambda entry: entry["time"])


def test_verify_reads_every_file(t5x, run: Path) -> None:
    status, out, err = t5x("checkpoint", "verify", run)
    assert (status, err) == (0, "")
    assert out.count(": intact") == 4
    checkpoint = run / "checkpoints" / "7"
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.stat().st_size]
    assert len(files) > 15
    for file in files:
        content = file.read_bytes()
        spoilt = bytearray(content)
        spoilt[len(content) // 2] ^= 0x10
        file.write_bytes(spoilt)
        status, out, err = t5x("checkpoint", "verify", checkpoint)
        assert status == 1
        assert str(file.relative_to(checkpoint)) in err, file
        file.write_bytes(content[:-1])
        assert str(file.relative_to(checkpoint)) in one_line(t5x("checkpoint", "verify", checkpoint), 1)
        file.write_bytes(content)
    assert t5x("checkpoint", "verify", checkpoint)[0] == 0


def largest(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_verify_names_what_is_lost(t5x, run: Path) -> None:
    checkpoint = run / "checkpoints" / "4"
    file = largest(checkpoint / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (checkpoint / "params" / "new").touch()
    line = one_line(t5x("checkpoint", "verify", run), 1)
    assert "1 of 4 checkpoints are damaged" in line
    assert f"{file.relative_to(checkpoint)} has changed" in line
    _, out, _ = t5x("checkpoint", "verify", run)
    assert "arrays that are lost: params/kernel\n" in out
    assert "params/new is no part of it" in out
    _, out, _ = t5x("checkpoint", "verify", run, "--json")
    found = json.loads(out)
    assert found["intact"] is False
    assert [verdict["arrays"] for verdict in found["checkpoints"]] == [[], ["params/kernel"], [], []]
    file.unlink()
    assert f"{file.relative_to(checkpoint)} is missing" in one_line(t5x("checkpoint", "verify", checkpoint), 1)


def test_a_seal_that_is_gone_is_damage_too(t5x, run: Path) -> None:
    (run / "checkpoints" / "7" / SEAL).unlink()
    assert "checksums.json is missing" in one_line(t5x("checkpoint", "verify", run / "checkpoints" / "7"), 1)
    # Those from before there were records may have none.
    (run / "checkpoints" / "7" / checkpoint_files.RECORD).unlink()
    status, out, _ = t5x("checkpoint", "verify", run / "checkpoints" / "7")
    assert status == 0
    assert "all arrays can be read, but there is no seal" in out
    truncated = largest(run / "checkpoints" / "7" / "params")
    truncated.write_bytes(truncated.read_bytes()[:1000])
    assert t5x("checkpoint", "verify", run / "checkpoints" / "7")[0] == 1


def test_diff_of_a_checkpoint_with_itself(t5x, run: Path) -> None:
    status, out, _ = t5x("checkpoint", "diff", run, run / "checkpoints" / "7")
    assert status == 0
    assert "5 arrays are the same, 0 differ, 0 are only in a, 0 only in b" in out


def test_damage_is_no_difference(t5x, run: Path) -> None:
    file = largest(run / "checkpoints" / "6" / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for pair in ((run / "checkpoints" / "6", run), (run, run / "checkpoints" / "6")):
        line = one_line(t5x("checkpoint", "diff", *pair), 1)
        assert f"checkpoints/6 is damaged: {file.relative_to(run / 'checkpoints' / '6')} has changed" in line


@pytest.mark.parametrize("record", ["[]", '{"loss": "x"}', '{"time": []}', '{"fingerprints": null}', '{"other": 1}'])
def test_a_record_of_other_types_is_damage(t5x, run: Path, record: str) -> None:
    (run / "checkpoints" / "6" / checkpoint_files.RECORD).write_text(record)
    status, out, _ = t5x("checkpoint", "list", run)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["2", "4", "6", "7"]
    assert "checkpoint.json has changed" in one_line(t5x("checkpoint", "verify", run / "checkpoints" / "6"), 1)
    with pytest.raises(UnreadableCheckpoint, match=r"checkpoint\.json cannot be read"):
        checkpoint_files.read_record(run / "checkpoints" / "6")


def write(path: Path, **changed: Any) -> Path:
    """Writes parameters alone, as an imported model has them."""
    path.parent.mkdir(parents=True)
    params = {name: value for name, value in {**make_state(7).params, **changed}.items() if value is not None}
    save_params(path, params)
    return path


def test_diff_tells_where_and_how_much(t5x, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t5x_lite.training import checkpoint_inspection, checkpoint_writing

    monkeypatch.setattr(checkpoint_writing, "_PART_BYTES", 2**17)
    monkeypatch.setattr(checkpoint_inspection, "_BLOCK", 1000)
    read, sizes = checkpoint_files.StoredArray.read, []

    def spy(self: Any, part: Any = None) -> np.ndarray:
        value = read(self, part)
        sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(checkpoint_files.StoredArray, "read", spy)
    kernel = np.array(make_state(7).params["kernel"])
    a = write(tmp_path / "a" / "checkpoints" / "0", kernel=jnp.asarray(kernel))
    other = kernel.copy()
    other[123, 456] += 0.5
    other[599, 699] -= 2
    b = write(tmp_path / "b" / "checkpoints" / "0", kernel=jnp.asarray(other), scale=None, bias=jnp.ones(3))
    sizes.clear()
    status, out, _ = t5x("checkpoint", "diff", a, b, "--json")
    assert status == 0
    assert max(sizes) <= 2**17  # no more than a stored part at a time
    found = json.loads(out)
    assert (found["only_a"], found["only_b"]) == (["params/scale"], ["params/bias"])
    (array,) = found["arrays"]
    assert (array["name"], array["differing"], array["where"]) == ("params/kernel", 2, [599, 699])
    # Two steps of float32 beside numbers of about 1.
    assert array["largest"] == pytest.approx(2, rel=1e-6)
    expected = [np.linalg.norm(np.float64(x)) for x in (kernel, other)]
    assert array["norms"] == pytest.approx(expected, rel=1e-12)
    assert array["relative"] == pytest.approx(np.linalg.norm(np.float64(other) - kernel) / expected[0], rel=1e-12)
    # A run with its optimizer beside parameters alone, as they are stored elsewhere in other parts.
    status, out, _ = t5x("checkpoint", "diff", run / "checkpoints" / "7", b)
    assert status == 0
    assert "0 arrays are the same, 1 differ, 4 are only in a, 1 only in b" in out
    (row,) = [line for line in out.splitlines() if line.startswith("params/kernel")]
    assert row.split()[:6] == ["params/kernel", "600x700", "float32", "2", "2", "599,699"]


def test_diff_of_other_shapes_dtypes_and_no_numbers(t5x, tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    bad = values.copy()
    bad[1, 2] = np.nan
    pairs = {
        "dtype": (values, values.astype(jnp.bfloat16)),
        "shape": (values, values[:2]),
        "nan": (values, bad),
        "both_nan": (bad, bad),
        "infinite": (values, np.where(values == 5, np.inf, values).astype(np.float32)),
        "scalar": (np.float32(3), np.float32(4)),
        "zeros": (np.zeros(3, np.float32), np.zeros(3, np.float32)),
        "from_zero": (np.zeros(3, np.float32), np.ones(3, np.float32)),
    }
    paths = []
    for index in (0, 1):
        path = tmp_path / str(index) / "checkpoints" / "0"
        path.parent.mkdir(parents=True)
        save_params(path, {name: jnp.asarray(pair[index]) for name, pair in pairs.items()})
        paths.append(path)
    status, out, _ = t5x("checkpoint", "diff", *paths, "--json")
    assert status == 0
    found = {array["name"].removeprefix("params/"): array for array in json.loads(out)["arrays"]}
    assert {name: array["differing"] for name, array in found.items()} == {
        "dtype": 0,
        "shape": None,
        "nan": 1,
        "both_nan": 0,
        "infinite": 1,
        "scalar": 1,
        "zeros": 0,
        "from_zero": 3,
    }
    assert found["dtype"]["dtypes"] == ["float32", "bfloat16"]
    assert found["shape"]["shapes"] == [[3, 4], [2, 4]]
    assert np.isnan(found["nan"]["largest"])
    assert found["nan"]["where"] == [1, 2]
    assert np.isinf(found["infinite"]["largest"])
    assert found["infinite"]["where"] == [1, 1]
    assert (found["scalar"]["largest"], found["scalar"]["where"]) == (1.0, [])
    assert np.isinf(found["from_zero"]["relative"])
    status, out, _ = t5x("checkpoint", "diff", *paths)
    assert "2 arrays are the same, 6 differ" in out
    assert "float32 / bfloat16" in out
    assert "3x4 / 2x4" in out


def test_wrong_paths_are_one_line(t5x, run: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert "does not exist" in one_line(t5x("checkpoint", "list", nowhere), 2)
    assert "holds no checkpoint" in one_line(t5x("checkpoint", "list", tmp_path), 2)
    (tmp_path / "file").touch()
    assert "file' is a file; give a run directory" in one_line(t5x("checkpoint", "list", tmp_path / "file"), 2)
    assert "does not exist" in one_line(t5x("checkpoint", "verify", nowhere), 2)
    assert "steps that are there: 2, 4, 6, 7" in one_line(t5x("checkpoint", "verify", run / "checkpoints" / "3"), 2)
    assert "holds no checkpoint" in one_line(t5x("checkpoint", "diff", run, tmp_path), 2)
    assert "one of the words list, verify, diff" in one_line(t5x("checkpoint"), 2)
    (run / "checkpoints" / "7" / "params" / "_METADATA").unlink()
    line = one_line(t5x("checkpoint", "verify", run / "checkpoints" / "7"), 1)
    assert "params/_METADATA is missing" in line
    (run / "checkpoints" / "6" / "params" / "_METADATA").write_text("{}")
    assert "checkpoint verify` says more" in one_line(t5x("checkpoint", "diff", run / "checkpoints" / "6", run), 1)


def test_no_device_is_touched(run: Path) -> None:
    import os
    import subprocess
    import sys

    command = [sys.executable, "-m", "t5x_lite", "checkpoint", "diff", str(run), str(run / "checkpoints" / "2")]
    env = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert jax.devices()
