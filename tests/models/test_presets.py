import json
import time
from pathlib import Path

import jax
import pytest

from t5x_lite.models import PRESETS, build, count_parameters
from t5x_lite.models.registry import module_for

TABLE = json.loads(Path(__file__).with_name("published_counts.json").read_text())
SECONDS = {"spent": 0.0}


def test_every_preset_has_a_count_and_a_source_and_the_other_way_round() -> None:
    assert set(PRESETS) == set(TABLE["counts"])
    sourced = [name for source in TABLE["sources"].values() for name in source["presets"]]
    assert sorted(sourced) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    began = time.process_time()
    assert count_parameters(name) == TABLE["counts"][name]
    SECONDS["spent"] += time.process_time() - began


def test_counting_allocates_nothing() -> None:
    # A model of 405e9 parameters takes as long as one of 60e6; all of them together, some tens of seconds.
    assert SECONDS["spent"] < 1.5 * len(PRESETS)


@pytest.mark.parametrize("name", TABLE["rounded"])
def test_parameter_counts_are_what_the_authors_say(name: str) -> None:
    value, unit = TABLE["rounded"][name]
    assert abs(TABLE["counts"][name] - value) < unit


# One of each shape of table: the rest differ in sizes alone.
TABLES = (
    *("t5-small", "t5-v1.1-small", "umt5-small", "bart-base", "mbart-large-50", "openai-gpt", "gpt2", "llama-7b"),
    *("llama-3.2-1b", "palm-8b", "bert-base-uncased", "roberta-base"),
)


@pytest.mark.parametrize("name", TABLES)
def test_the_weight_table_has_exactly_the_parameters(name: str) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(build(name).param_shapes())
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    table = module_for(PRESETS[name]).weights(PRESETS[name])
    assert table.keys() == paths.keys()
    for path, stored in table.items():
        assert ("{}" in stored.name) == ("/layers/" in path), path
        # Kernels of torch.nn.Linear are turned, Conv1D's are not, and nothing else is.
        assert stored.transposed <= path.endswith("kernel"), path
