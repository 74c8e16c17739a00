"""A program starts anew for large pages once, as the same process and with the same arguments; or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_lite import __main__ as program
from t5x_lite import large_pages

SCRIPT = """
import os, sys
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
from t5x_lite import large_pages
large_pages.restart()
print("runs")
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that gives large pages to whoever asks."""
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    monkeypatch.setattr(large_pages, "_KERNEL", path)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return path


def test_only_where_it_changes_something(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert large_pages.environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    for others in ("[always] madvise never\n", "always madvise [never]\n"):
        kernel.write_text(others)
        assert large_pages.environment() == {}
    kernel.unlink()
    assert large_pages.environment() == {}
    kernel.write_text("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # whoever has set it meant something
    assert large_pages.environment() == {}


@pytest.mark.skipif(not large_pages.environment(), reason="this kernel gives no large pages to those who ask")
def test_the_same_process_with_the_same_arguments(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-X", "dev", script, "train", "a b", "--c"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    first, second, last = done.stdout.splitlines()
    assert first.replace("None", "glibc.malloc.hugetlb=1") == second
    assert "['train', 'a b', '--c']" in second
    assert last == "runs"


@pytest.mark.parametrize(
    ("command", "starts"), [("train", True), ("demo", True), ("generate", True), ("doctor", False), (None, False)]
)
def test_commands_that_compute_for_long(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, command: str | None, starts: bool
) -> None:
    calls = list[tuple[str, list[str]]]()
    monkeypatch.setattr(os, "execve", lambda path, words, env: calls.append((path, words)))
    monkeypatch.setattr(sys, "argv", ["t5x-lite", *([command] if command else []), "--help"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "t5x-lite", "train", "--help"])
    with pytest.raises(SystemExit):
        program.start()
    assert calls == [(sys.executable, [sys.executable, "t5x-lite", "train", "--help"])] * starts
