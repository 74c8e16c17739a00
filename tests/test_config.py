"""The configuration tree: precedence, origins, round trip, errors."""

import shutil
from pathlib import Path

import pytest

from t5x_lite.config import RunConfig, flatten, resolve, save
from t5x_lite.errors import InputError
from t5x_lite.models import preset


def test_defaults_are_a_valid_run() -> None:
    assert resolve().config == RunConfig()


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {preset: t5-base, dropout_rate: 0.0}\ntrain: {steps: 5, batch_size: 4}\nmesh: data:2\n")
    resolved = resolve(path, ["train.steps=6", "optimizer.warmup_steps=null"])
    assert resolved.config.model.embed_dim == preset("t5-base").embed_dim
    assert resolved.config.model.dropout_rate == 0.0
    assert resolved.config.train.steps == 6
    assert resolved.config.train.batch_size == 4
    assert resolved.config.optimizer.warmup_steps is None
    assert resolved.origins["train.steps"] == "command line"
    assert resolved.origins["train.batch_size"] == str(path)
    assert resolved.origins["model.mlp_dim"] == "preset t5-base"
    assert resolved.origins["train.seed"] == "default"


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    settings = ["model=umt5-small", "optimizer.learning_rate=3e-4", "data.prefix=yes: ", "fit_vocabulary=false"]
    config = resolve(None, settings).config
    save(config, tmp_path / "config.yaml")
    assert resolve(tmp_path / "config.yaml").config == config
    save(resolve(tmp_path / "config.yaml").config, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()


def test_the_model_of_init_from_is_the_default(tmp_path: Path) -> None:
    origin, tuned = tmp_path / "origin", tmp_path / "tuned"
    save(resolve(None, ["model=t5-v1.1-small", "model.embed_dim=96"]).config, origin / "config.yaml")
    resolved = resolve(None, [f"init_from={origin}", "model.dropout_rate=0.3"])
    assert resolved.config.model.embed_dim == 96
    assert resolved.config.model.dropout_rate == 0.3
    assert resolved.origins["model.embed_dim"] == f"init_from={origin}"
    save(resolved.config, tuned / "config.yaml")
    shutil.rmtree(origin)
    assert resolve(tuned / "config.yaml").config == resolved.config
    with pytest.raises(InputError, match=r"init_from=.* is not a run directory"):
        resolve(None, [f"init_from={origin}"])


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optimizer: {learning_rate: 1e-3}\n")
    assert resolve(tmp_path / "run.yaml").config.optimizer.learning_rate == 1e-3


def test_giving_the_vocabulary_size_fixes_it() -> None:
    assert resolve().config.fit_vocabulary
    assert not resolve(None, ["model.vocab_size=512"]).config.fit_vocabulary


def test_at_most_eighty_keys() -> None:
    keys = flatten(RunConfig())
    # A preset or a checkpoint fills those of the model; the others are what a user of any family meets.
    assert len([key for key in keys if not key.startswith("model.")]) <= 80
    assert len([key for key in keys if key.startswith("model.")]) <= 55


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1, 2]\n", "train"),
        ("- a\n", "must be a mapping"),
        ("a: b: c\n", "is not YAML"),
        ("trian: {steps: 3}\n", "unknown configuration key 'trian.steps'.*did you mean 'train.steps'"),
        ("train: {steps: 3.5}\n", "train.steps='3.5'"),
        ("train: {profile: '7:9', steps: 6}\n", "train.profile='7:9' begins behind the last step, train.steps=6"),
        ("train: {steps: 2147483648}\n", r"train.steps must be below 2\*\*31, not 2147483648"),
        (
            "distributed: {coordinator: 'a:70000', num_processes: 2, process_id: 0}\n",
            "'a:70000' is not of the form HOST:PORT, with a port below 65536",
        ),
        ("train: {batch_size: 6, microbatches: 4}\n", "train.microbatches 4 does not divide train.batch_size 6"),
        ("model: {activation: swish}\n", "model.activation='swish'"),
        ("model: {embed_dim: 0}\n", "model.embed_dim must be at least 1, not 0"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        resolve(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)


def test_a_list_on_the_command_line() -> None:
    model = resolve(None, ["model.stop_ids=[3, 4]", "model.rotary_scaling=[8, 1, 4, 64]"]).config.model
    assert (model.stop_ids, model.rotary_scaling) == ((3, 4), (8.0, 1.0, 4.0, 64))
    with pytest.raises(InputError, match="stop_ids"):
        resolve(None, ["model.stop_ids=[3, x"])


@pytest.mark.parametrize(
    ("settings", "objective", "origin"),
    [
        ([], "span_corruption", "default"),
        (["data.inputs=question"], "text_to_text", "data.inputs is given"),
        (["model=decoder-small", "data.targets=answer"], "text_to_text", "data.targets is given"),
        (["model=gpt2"], "causal_lm", "the model has no encoder"),
        (["model=bert-base-uncased"], "next_sentence", "the model has no decoder"),
        (["model=roberta-base"], "masked_lm", "the model has no decoder"),
        (["model=gpt2", "data.objective=chat"], "chat", "command line"),
    ],
)
def test_the_objective_follows_from_columns_and_model(settings: list[str], objective: str, origin: str) -> None:
    resolved = resolve(None, settings)
    assert (resolved.config.data.objective, resolved.origins["data.objective"]) == (objective, origin)
