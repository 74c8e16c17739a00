"""A command line in this process, and the smallest models of texts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5x_lite import config
from t5x_lite.cli.main import main
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.models import PRESETS, TransformerConfig
from t5x_lite.training.checkpoints import save_params

SMALL = {"vocab_size": 264, "embed_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "num_decoder_layers": 2}


@pytest.fixture
def t5x(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; returns status, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        status = main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return call


def save_run(run: Path, model: TransformerConfig, params: Any) -> Path:
    """Writes a run directory of a model over bytes."""
    save_params(run / "checkpoints" / "0", params)
    ByteTokenizer().save(run / "tokenizer")
    config.save(config.RunConfig(model=model, fit_vocabulary=False, out=str(run)), run / "config.yaml")
    return run


def decoder(positions: int) -> TransformerConfig:
    """Returns a GPT-2 whose texts begin with no token."""
    ids = {"bos_id": None, "eos_id": 1, "decoder_start_id": 1}
    return dataclasses.replace(PRESETS["gpt2"], **SMALL, **ids, max_positions=positions)


@pytest.fixture(scope="session")
def decoder_run(sharp_params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 64 positions."""
    model = decoder(64)
    return save_run(tmp_path_factory.mktemp("decoder") / "run", model, sharp_params(model))


@pytest.fixture(scope="session")
def short_draft(sharp_params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of 32 positions."""
    model = decoder(32)
    return save_run(tmp_path_factory.mktemp("draft") / "run", model, sharp_params(model, seed=1))


@pytest.fixture(scope="session")
def pair_run(random_params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5."""
    model = dataclasses.replace(PRESETS["t5-v1.1-small"], **SMALL, num_encoder_layers=2)
    return save_run(tmp_path_factory.mktemp("pair") / "run", model, random_params(model))
