"""`t5x-lite bench decode`: what it prints, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from t5x_lite import benchmarking


@pytest.fixture
def bench(t5x, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `bench decode` in this process, with short copies; returns status, stdout and stderr."""
    monkeypatch.setattr(benchmarking, "_COPY_BYTES", 2**20)
    return lambda *argv: t5x("bench", "decode", *argv)


SMALL = "--input-length", 8, "--new-tokens", 4, "--repeats", 2


def test_a_run_is_measured(bench, pair_run: Path) -> None:
    settings = "--batch-size", 2, "--strategies", "greedy,beam2", "--json"
    status, out, err = bench(pair_run, *SMALL, "--new-tokens", 16, *settings)
    assert status == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["strategy"], row["batch_size"]) for row in rows] == [("greedy", 2), ("beam2", 2)]
    for row in rows:
        assert row["model"] == str(pair_run)
        assert row["tokens_per_second"] > 0
        assert row["tokens_per_second"] * row["ms_per_token"] == pytest.approx(1000 * row["batch_size"])
        assert row["compile_seconds"] > 0
        parts = (row[f"step_{part}_bytes"] for part in ("weights", "self_cache", "cross_cache"))
        assert row["step_bytes"] == sum(parts)
        roofline = row["batch_size"] * row["copy_bytes_per_second"] / row["step_bytes"]
        assert row["roofline_tokens_per_second"] == pytest.approx(roofline)
        assert row["roofline_share"] == pytest.approx(row["tokens_per_second"] / roofline)
        # The program is given all weights and holds the cache beside them.
        assert row["peak_bytes"] > row["weights_bytes"] + row["cache_bytes"]
    # Two layers of 2 heads of 8: a token's keys and values are 64 numbers of 4 bytes. The cache has slots for the
    # input, the start token and, for each beam, all new tokens but the last, which is not read again: 16 or 31 behind
    # the input, and whole tiles of 16.
    assert [row["cache_bytes"] for row in rows] == [2 * 64 * 4 * (8 + slots) for slots in (16, 32)]


def test_the_table_has_a_row_a_cell(bench, decoder_run: Path) -> None:
    status, out, err = bench(
        decoder_run, *SMALL, "--batch-size", "1,2", "--strategies", "sample", "--dtype", "bfloat16"
    )
    assert status == 0, err
    head, titles, *rows = out.splitlines()
    assert head.startswith(f"{decoder_run}: bfloat16, 8 tokens read and 4 generated on 1 x cpu")
    assert titles.split()[:3] == ["strategy", "batch", "tokens/s"]
    assert [row.split()[:2] for row in rows] == [["sample", "1"], ["sample", "2"]]
    assert all(row.endswith("%") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["t5-smal"], ["'t5-smal'", "'t5-small'"]),
        (["t5-small", "gpt-2"], ["'gpt-2'", "'gpt2'"]),
        (["--batch-size", "1,0"], ["batch_size", "at least 1", "0"]),
        (["--batch-size", "1;8"], ["--batch-size", "1;8"]),
        (["--new-tokens", "0"], ["new_tokens", "at least 1"]),
        (["--input-length", "-3"], ["input_length", "at least 1", "-3"]),
        (["--repeats", "0"], ["--repeats", "at least 1"]),
        (["--strategies", "greedy,beam1"], ["'beam1'", "beam2"]),
        (["gpt2", "--input-length", "1000"], ["1063", "1024"]),
        (["bart-base", "--input-length", "1025"], ["input_length", "1025", "1024"]),
        (["bert-base-uncased"], ["no decoder"]),
        (["--dtype", "float8"], ["float8", "bfloat16"]),
        (["--mesh", "modle:2"], ["modle", "model"]),
    ],
)
def test_bad_input_is_one_line(bench, arguments: list[str], words: list[str]) -> None:
    status, out, err = bench(*arguments)
    assert (status, out) == (2, ""), err
    assert err.startswith("t5x-lite: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_a_directory_without_a_model_is_refused(bench, tmp_path: Path) -> None:
    status, _, err = bench(tmp_path)
    assert status == 2
    assert str(tmp_path) in err
