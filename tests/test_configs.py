"""Every recipe in configs/ is complete: it resolves, and says how to run it and what to expect."""

from pathlib import Path

import pytest

from t5x_lite.config import resolve

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_resolves_and_explains_itself(path: Path) -> None:
    resolve(path)
    text = path.read_text()
    assert text.startswith("# ")
    assert f"t5x-lite train configs/{path.name}" in text
    assert "# Expected:" in text


def test_there_are_some() -> None:
    assert CONFIGS
