from typing import Any

import jax
import pytest

from t5x_lite import sharding
from t5x_lite.config import resolve
from t5x_lite.errors import InputError
from t5x_lite.models import build
from t5x_lite.training.processes import current
from t5x_lite.training.run_parts import mesh_of, optimizer_of
from t5x_lite.training.state import state_bytes


def mesh(settings: list[str], *more: str) -> str:
    return sharding.describe(mesh_of(resolve(None, [*settings, *more, "out=nowhere"]).config, current()))


@pytest.mark.parametrize(
    ("of_the_state", "wanted"), [(None, "data:8"), (2.1, "data:8"), (1.9, "fsdp:8"), (0.01, "fsdp:8")]
)
def test_a_run_that_names_no_mesh(
    of_the_state: float | None, wanted: str, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(None, [*tiny_settings, "out=nowhere"]).config
    model = build(config.model)
    state = state_bytes(model, optimizer_of(config, model)[1])
    memory = None if of_the_state is None else int(state * of_the_state)
    monkeypatch.setattr(sharding, "device_memory", lambda: memory)
    assert mesh(tiny_settings) == wanted
    assert mesh(tiny_settings, "mesh=data:2,model:4") == "data:2,model:4"


def test_the_fsdp_of_a_default_mesh_divides_the_model(
    tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "device_memory", lambda: 1)
    assert mesh(tiny_settings, "model.embed_dim=36") == "data:2,fsdp:4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["mesh=data:2,context:4", "train.input_length=30"],
            "axis 'length' of size 30 does not divide over mesh axis 'context' of size 4 (mesh data:2,context:4);"
            " train.input_length 30",
        ),
        (
            ["mesh=fsdp:8", "train.microbatches=2"],
            "axis 'batch' of size 4 does not divide over mesh axis 'data x fsdp' of size 8 (mesh fsdp:8);"
            " train.batch_size 8 / train.microbatches 2 = 4 rows at a time",
        ),
        (
            ["mesh=data:2,model:4", "model.num_heads=6"],
            "axis 'heads' of size 6 does not divide over mesh axis 'model' of size 4 (mesh data:2,model:4)",
        ),
    ],
)
def test_what_does_not_divide_is_one_line(settings: list[str], message: str, tiny_settings: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        mesh(tiny_settings, *settings)
    assert str(caught.value) == message


def test_the_optimizer_is_the_configuration_s(tiny_settings: list[str]) -> None:
    config: Any = resolve(None, [*tiny_settings, "out=nowhere", "optimizer.learning_rate=0.5"]).config
    schedule, tx = optimizer_of(config, build(config.model))
    assert 0 < float(schedule(config.train.steps)) <= 0.5
    assert jax.eval_shape(tx.init, build(config.model).param_shapes())
