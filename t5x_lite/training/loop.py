"""The training loop: everything of the other rooms, joined."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from t5x_lite import run_directory, sharding
from t5x_lite.config import RunConfig
from t5x_lite.config import run_directory as run_path
from t5x_lite.data import recipe
from t5x_lite.data.packing import Batch
from t5x_lite.data.pipeline import Dataset, prefetch
from t5x_lite.data.run_tokenizer import run_tokenizer, with_vocabulary
from t5x_lite.data.streaming import StreamingDataset
from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.errors import InputError
from t5x_lite.evaluation.evaluator import evaluate
from t5x_lite.interop import checkpoints
from t5x_lite.models.registry import build
from t5x_lite.models.transformer import Transformer
from t5x_lite.training.checkpoints import Checkpointer, load_params
from t5x_lite.training.monitor import MetricsLog
from t5x_lite.training.nonfinite import NonFinite
from t5x_lite.training.optimizers import make_optimizer
from t5x_lite.training.schedules import make_schedule
from t5x_lite.training.state import TrainState, abstract_state, init_state
from t5x_lite.training.step import make_eval_step, make_train_step


class Observer:
    """Hears what the loop does; the command line's one draws progress bars. Every method may be left as it is."""

    def note(self, text: str) -> None:
        """Hears a line for the user."""

    def building(self, name: str, done: int, total: int, tokens: int) -> None:
        """Hears of a token cache that is built: of which task, its parts done and in all, tokens so far."""

    def step(self, record: Mapping[str, Any], last: int) -> None:
        """Hears of every step, logged or not; `last` is the run's last step."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Hears the metrics of an evaluation."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ends with.

    Attributes:
      config: as resolved, vocabulary size included.
      state: the final state, on the mesh.
      metrics: of the last evaluation on the held-out data.
      tokenizer: the run's.
      mesh: the run's.
    """

    config: RunConfig
    state: TrainState
    metrics: Mapping[str, float]
    tokenizer: Tokenizer
    mesh: Mesh


def train(config: RunConfig, observer: Observer | None = None, data: recipe.RunData | None = None) -> TrainResult:
    """Trains as `config` says, or continues the run that `config.out` holds, and leaves a run directory.

    A run that is killed and started again goes on from its latest checkpoint with the same data, random numbers and
    so the same losses, bit for bit on the same machine and mesh.

    Args:
      config: of the run.
      observer: hears of what happens.
      data: to train on, where it is not what `config.data` names: tasks of one's own, from `data.recipe.open_mixture`.

    Raises:
      InputError: something in the configuration cannot be used.
      FloatingPointError: a loss or gradient is not finite; the message names the step.
    """
    observer = observer or Observer()
    out = Path(config.out).expanduser()
    mesh = sharding.make_mesh(config.mesh)
    data = data or recipe.open_data(config.data)
    recipe.check_objectives(config, data)
    _check_mesh(config, mesh)
    with run_directory.lock(out):
        tokenizer = run_tokenizer(config, recipe.training_texts(data, config.data))
        config = with_vocabulary(config, tokenizer)
        return _train(config, data, tokenizer, mesh, out, observer)


def _train(
    config: RunConfig, data: recipe.RunData, tokenizer: Tokenizer, mesh: Mesh, out: Path, observer: Observer
) -> TrainResult:
    # Everything that can refuse the configuration comes before anything that records it.
    read = recipe.datasets(data, config, tokenizer, observer.building)
    dataset, fingerprint = read.train, read.fingerprint
    for note in read.notes:
        observer.note(note)
    model = build(config.model, config.train.dtype, config.train.remat)
    opt = config.optimizer
    schedule = make_schedule(opt.schedule, opt.peak, opt.warmup_steps, config.train.steps)
    tx = make_optimizer(
        opt.name, schedule, model.logical_axes(), clip_norm=opt.clip_norm, weight_decay=opt.weight_decay
    )
    abstract = abstract_state(model, tx, mesh, ema=bool(config.train.ema_decay))
    if run_directory.has_begun(out):
        for note in run_directory.check_same_run(out, config, fingerprint):
            observer.note(note)

    checkpointer = Checkpointer(out / "checkpoints", config.train.keep_checkpoints)
    try:
        state = _first_state(config, model, tx, mesh, abstract, checkpointer, observer)
        run_directory.record(out, config, fingerprint)
        _announce(config, model, mesh, state, dataset, tokenizer, observer)
        log = MetricsLog(out, int(state.step))
        try:
            run = _Run(config, model, tx, schedule, mesh, tokenizer, read.validation, checkpointer, log, observer)
            state, metrics = run(state, dataset)
        finally:
            log.close()
    finally:
        checkpointer.close()
    return TrainResult(config, state, metrics, tokenizer, mesh)


@dataclasses.dataclass(frozen=True)
class _Made:
    """A step that was started and not reported yet."""

    step: int
    metrics: Any
    tokens: int
    batch: Any


@dataclasses.dataclass
class _Run:
    """The steps of one run, and what happens between them."""

    config: RunConfig
    model: Transformer
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    tokenizer: Tokenizer
    validation: Dataset
    checkpointer: Checkpointer
    log: MetricsLog
    observer: Observer

    def __call__(
        self, state: TrainState, dataset: Dataset | StreamingDataset
    ) -> tuple[TrainState, Mapping[str, float]]:
        """Trains from `state` to the last step; returns the final state and its evaluation."""
        cfg = self.config.train
        train_step = make_train_step(
            self.model,
            self.tx,
            self.schedule,
            self.mesh,
            state,
            microbatches=cfg.microbatches,
            z_loss=cfg.z_loss,
            seed=cfg.seed,
            ema_decay=cfg.ema_decay,
            halt_above=int(state.skipped) if cfg.nonfinite == "stop" and state.loss_scale is None else None,
        )
        self.eval_step = make_eval_step(self.model, self.mesh)
        self.non_finite = NonFinite(cfg.nonfinite)
        self.clock, self.waited = time.perf_counter(), 0.0
        metrics: Mapping[str, float] = {}
        pending: _Made | None = None
        done = int(state.step)
        load = dataset.loader(done, *sharding.batch_share(self.mesh))
        for index, rows in self._timed(prefetch(load, done, cfg.steps, workers=self.config.data.workers)):
            tokens = sum(int(np.sum(value > 0)) for key, value in rows.items() if key.endswith("_segment_ids"))
            batch = sharding.put_batch(self.mesh, rows)
            # The copy to the devices and the step are queued behind the step before, which may still be running.
            state, step_metrics = train_step(state, batch)
            self.checkpointer.seal_finished()
            # The numbers of the step before: reading those of this one would wait for it with nothing queued behind.
            self._report(pending, state)
            step, pending = index + 1, _Made(index + 1, step_metrics, tokens, batch)
            last = step == cfg.steps
            evaluating, saving = last or _due(step, cfg.eval_every), last or _due(step, cfg.checkpoint_every)
            if evaluating or saving:
                self._report(pending, state)
                pending = None
            if evaluating:
                metrics = self._evaluate(state, step)
            if saving:
                self.checkpointer.save(state, metrics["loss"] if evaluating else None)
            if evaluating or saving:
                self.clock, self.waited = time.perf_counter(), 0.0
        return state, metrics or self._evaluate(state, int(state.step), log=False)

    def _timed(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        while True:
            began = time.perf_counter()
            found = next(batches, None)
            self.waited += time.perf_counter() - began
            if found is None:
                return
            yield found

    def _report(self, made: "_Made | None", state: TrainState) -> None:
        if made is None:
            return
        step = made.step
        record = {"step": step, **{name: float(value) for name, value in jax.device_get(made.metrics).items()}}
        now = time.perf_counter()
        record["tokens_per_second"] = made.tokens / (now - self.clock)
        record["data_wait"] = self.waited / (now - self.clock)
        self.clock, self.waited = now, 0.0
        if why := self.non_finite.reason_to_stop(record):
            self.checkpointer.wait()  # one may still be on its way to the disk
            kept = self.checkpointer.steps()
            raise FloatingPointError(
                f"step {step}: {why}; "
                + (f"the last checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint yet")
            )
        if not record["finite"]:
            self.observer.note(f"step {step} was skipped: {_overflow(record)}")
        self.observer.step(record, self.config.train.steps)
        if _due(step, self.config.train.log_every) or step in (1, self.config.train.steps):
            self.log.write(record)

    def _evaluate(self, state: TrainState, step: int, log: bool = True) -> Mapping[str, float]:
        batches = self.validation.eval_batches(*sharding.batch_share(self.mesh))
        metrics = evaluate(
            self.eval_step, state.averaged, batches, self.tokenizer, self.mesh, self.config.train.eval_batches
        )
        record = {"step": step, "split": "validation", **metrics}
        if log:
            self.log.write(record)
        self.observer.evaluation(record)
        return metrics


def _overflow(record: Mapping[str, float]) -> str:
    if "loss_scale" in record:
        return f"float16 overflowed with the loss scaled by {record['loss_scale']:g}"
    return f"the loss is {record['loss']} and the gradient norm {record['gradient_norm']}"


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Checks what can be checked before the data is read; the vocabulary's size is not known yet."""
    sizes = config.model.sharded_sizes()
    if config.fit_vocabulary:
        del sizes["vocab"]
    sharding.check_divides(mesh, sizes)
    rows = config.train.batch_size // config.train.microbatches
    try:
        sharding.check_divides(mesh, {"batch": rows})
    except InputError as error:
        detail = f"train.batch_size {config.train.batch_size} / train.microbatches {config.train.microbatches}"
        raise InputError(f"{error}; {detail} = {rows} rows at a time") from None


def _first_state(
    config: RunConfig,
    model: Transformer,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    abstract: TrainState,
    checkpointer: Checkpointer,
    observer: Observer,
) -> TrainState:
    state, notes = checkpointer.restore(abstract)
    for note in notes:
        observer.note(note)
    if state is not None:
        observer.note(f"continuing {config.out} from step {int(state.step)}")
        return state
    ema = bool(config.train.ema_decay)
    if not config.init_from:
        return init_state(model, tx, mesh, config.train.seed, ema=ema)
    if (run_path(config.init_from) / "config.yaml").exists():
        params, _, notes = load_params(config.init_from, abstract.params)
        for note in notes:
            observer.note(note)
    else:
        params = checkpoints.load_params(config.init_from, config.model, abstract.params)
    return init_state(model, tx, mesh, config.train.seed, params, ema=ema)


def _announce(
    config: RunConfig,
    model: Transformer,
    mesh: Mesh,
    state: TrainState,
    dataset: Dataset | StreamingDataset,
    tokenizer: Tokenizer,
    observer: Observer,
) -> None:
    count = sum(x.size for x in jax.tree.leaves(state.params))
    params, opt = sharding.bytes_per_device(state.params), sharding.bytes_per_device(state.opt_state)
    device = jax.devices()[0].device_kind
    layout = dataset.layout
    lengths = " + ".join(str(length) for length in (layout.input_length, layout.target_length) if length)
    observer.note(f"mesh {sharding.describe(mesh)}: {mesh.size} device(s), {device}")
    observer.note(
        f"{count:,} parameters; each device holds {params / 1e6:.1f} MB of them, {opt / 1e6:.1f} MB of optimizer state"
        f" and {config.train.batch_size // sharding.batch_ways(mesh)} of the batch's rows"
    )
    examples = "training examples as they are read, in rows"
    if isinstance(dataset, Dataset):
        examples = f"{dataset.num_examples:,} training examples"
        examples += f" in {dataset.num_rows:,} rows" if dataset.packed else ""
    observer.note(
        f"{examples} of {lengths} tokens;"
        f" {tokenizer.vocab_size:,} tokens in the vocabulary, {model.config.vocab_size:,} rows in the embedding"
    )
