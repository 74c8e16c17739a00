"""What a run's configuration says, made: its mesh, its optimizer."""

import jax
import optax
from jax.sharding import Mesh

from t5x_lite import sharding
from t5x_lite.config import RunConfig
from t5x_lite.models.registry import build
from t5x_lite.models.transformer import Transformer
from t5x_lite.training.optimizers import make_optimizer
from t5x_lite.training.processes import Group
from t5x_lite.training.schedules import make_schedule
from t5x_lite.training.state import state_bytes


def optimizer_of(config: RunConfig, model: Transformer) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the learning rate and the optimizer of a run.

    Raises:
      InputError: settings that contradict each other, or patterns that no parameter matches.
    """
    opt = config.optimizer
    schedule = make_schedule(
        opt.schedule,
        opt.peak,
        opt.warmup_steps,
        config.train.steps,
        decay_steps=opt.decay_steps,
        final_share=opt.final_share,
    )
    tx = make_optimizer(
        opt.name,
        schedule,
        model.logical_axes(),
        clip_norm=opt.clip_norm,
        weight_decay=opt.weight_decay,
        b1=opt.b1,
        b2=opt.b2,
        frozen=opt.frozen,
        no_decay=opt.no_decay,
    )
    return schedule, tx


def mesh_of(config: RunConfig, group: Group) -> Mesh:
    """Returns the mesh of a run, or where it names none `sharding.default_mesh`: the same in all processes.

    Raises:
      InputError: the mesh does not fit the devices, or something of the run does not divide over it.
    """
    text = config.mesh
    if not text:
        memory = group.gather("comparing the memory of devices", sharding.device_memory())
        known = [each for each in memory if each is not None]
        least = min(known) if len(known) == len(memory) else None
        state = 0
        if least is not None:
            # The size of the vocabulary may not be known yet; until then it is the published model's.
            model = build(config.model, config.train.dtype)
            state = state_bytes(model, optimizer_of(config, model)[1], ema=bool(config.train.ema_decay))
        text = sharding.default_mesh(jax.device_count(), jax.process_count(), state, least, config.model.embed_dim)
    mesh = sharding.make_mesh(text)
    sizes = config.model.sharded_sizes()
    if config.fit_vocabulary:
        del sizes["vocab"]
    sharding.check_divides(mesh, sizes)
    cfg = config.train
    sharding.check_batch(mesh, cfg.batch_size, cfg.microbatches, cfg.input_length, cfg.target_length)
    return mesh
