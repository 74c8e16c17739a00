"""The training loop: everything of the other rooms, joined."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from t5x_lite import run_directory, sharding
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.config import run_directory as run_path
from t5x_lite.data import recipe
from t5x_lite.data.packing import Batch
from t5x_lite.data.pipeline import Dataset, prefetch
from t5x_lite.data.run_tokenizer import run_tokenizer, with_vocabulary
from t5x_lite.data.streaming import StreamingDataset
from t5x_lite.data.tokenizers import Tokenizer, load_tokenizer
from t5x_lite.errors import InputError
from t5x_lite.evaluation.evaluator import evaluate
from t5x_lite.interop import checkpoints
from t5x_lite.models.registry import build
from t5x_lite.models.transformer import Transformer
from t5x_lite.training.checkpoints import Checkpointer, load_params
from t5x_lite.training.diagnosis import Finding, diagnose, first_update
from t5x_lite.training.losses import LossSettings
from t5x_lite.training.monitor import EventLog, read_metrics
from t5x_lite.training.nonfinite import NonFinite, only_the_update, what_was_not
from t5x_lite.training.optimizers import trained_parameters
from t5x_lite.training.processes import Group, current
from t5x_lite.training.run_parts import mesh_of, optimizer_of
from t5x_lite.training.scalars import Scalars
from t5x_lite.training.state import TrainState, abstract_state, init_state
from t5x_lite.training.step import dropout_key, loss_gradients, make_eval_step, make_train_step
from t5x_lite.training.watching import Watch
from t5x_lite.training.weights_and_biases import check_installed


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
      ended_by: the signal that ended it before its last step, such as `SIGTERM`; empty: it is complete.
    """

    config: RunConfig
    state: TrainState
    metrics: Mapping[str, float]
    tokenizer: Tokenizer
    mesh: Mesh
    ended_by: str = ""


def train(
    config: RunConfig,
    observer: Observer | None = None,
    data: recipe.RunData | None = None,
    group: Group | None = None,
) -> TrainResult:
    """Trains as `config` says, or continues the run that `config.out` holds, and leaves a run directory.

    A run that is killed and started again goes on from its latest checkpoint with the same data, random numbers and
    so the same losses, bit for bit on the same machine and mesh. So does one that a signal asked to end.

    Args:
      config: of the run.
      observer: hears of what happens.
      data: to train on, where it is not what `config.data` names: tasks of one's own, from `data.recipe.open_mixture`.
      group: the processes that train together, from `processes.join`; by default the one that was joined, or this
        process alone.

    Raises:
      InputError: something in the configuration cannot be used.
      FloatingPointError: a loss or gradient is not finite; the message names the step.
    """
    group = group or current()
    observer = Observer() if observer is None or group.index else observer
    out = Path(config.out).expanduser()
    group.check_same(config)
    check_installed(config.train.wandb)
    with group.waiting("the devices of all processes"):
        mesh = mesh_of(config, group)
    data = data or recipe.open_data(config.data)
    recipe.check_objectives(config, data)
    with contextlib.nullcontext() if group.index else run_directory.lock(out):
        texts = recipe.training_texts(data, config.data)
        group.working("making the tokenizer")
        tokenizer = group.first(
            "the tokenizer", lambda: run_tokenizer(config, texts), lambda: _tokenizer_of_process_0(out, group)
        )
        return _train(with_vocabulary(config, tokenizer), data, tokenizer, mesh, out, observer, group)


def _tokenizer_of_process_0(out: Path, group: Group) -> Tokenizer:
    for _ in range(50):  # other machines may see it a little later
        if (out / "tokenizer").exists():
            return load_tokenizer(out / "tokenizer")
        time.sleep(0.1)
    raise InputError(
        f"process {group.index} does not find {out / 'tokenizer'}, which process 0 has written: out= must be a"
        " directory that all processes share"
    )


def _read(
    config: RunConfig, data: recipe.RunData, tokenizer: Tokenizer, observer: Observer, group: Group
) -> recipe.Datasets:
    """Opens the datasets; token caches are built by process 0, and by others only if they do not see its."""

    def building(name: str, done: int, total: int, tokens: int) -> None:
        group.working(f"building the token cache of {name}, {done} of {total} parts")
        observer.building(name, done, total, tokens)

    def read() -> recipe.Datasets:
        return recipe.datasets(data, config, tokenizer, building)

    group.working("reading the data")
    found = group.first("the token cache", read, read)
    prints = group.gather("comparing data", found.fingerprint)
    other = next((index for index, value in enumerate(prints) if value != prints[0]), None)
    if other is not None:
        raise InputError(f"process {other} reads other data of {config.data.path} than process 0")
    return found


def _train(
    config: RunConfig,
    data: recipe.RunData,
    tokenizer: Tokenizer,
    mesh: Mesh,
    out: Path,
    observer: Observer,
    group: Group,
) -> TrainResult:
    # Everything that can refuse the configuration comes before anything that records it.
    read = _read(config, data, tokenizer, observer, group)
    dataset, fingerprint = read.train, read.fingerprint
    for note in read.notes:
        observer.note(note)
    model = build(config.model, config.train.dtype, config.train.remat, scan_layers=config.train.scan_layers)
    schedule, tx = optimizer_of(config, model)
    abstract = abstract_state(model, tx, mesh, ema=bool(config.train.ema_decay))
    if group.index == 0 and run_directory.has_begun(out):
        for note in run_directory.check_same_run(out, config, fingerprint):
            observer.note(note)

    group.gather("whether the run can go on")
    events = None if group.index else EventLog(out)
    checkpointer = Checkpointer(
        out / "checkpoints",
        config.train.keep_checkpoints,
        keep_every=config.train.keep_every,
        timeout=config.distributed.timeout,
        saved=None if events is None else lambda step: events.write("saved", step),
    )
    try:
        with group.waiting("the state to begin with"):
            state = _first_state(config, model, tx, mesh, abstract, checkpointer, observer, events)
        if group.index == 0:
            run_directory.record(out, config, fingerprint)
        _announce(config, model, mesh, state, dataset, tokenizer, observer)
        watch = Watch(config, mesh, out, int(state.step), events)
        run = _Run(config, model, tx, schedule, mesh, tokenizer, read.validation, checkpointer, watch, observer, group)
        try:
            state, metrics = run(state, dataset)
        except BaseException as error:
            watch.ended(error, run.reported)
            raise
        finally:
            watch.close(hurried=bool(run.ended_by))
    finally:
        with group.waiting("the last checkpoint"):
            checkpointer.close()
    ended_by = run.ended_by
    if ended_by:
        watch.event("preempted", int(state.step), by=ended_by)
    else:
        watch.event("finished", int(state.step), **metrics)
    if ended_by:
        observer.note(f"{ended_by}: ended after step {int(state.step)}; the same command goes on from there")
    return TrainResult(config, state, metrics, tokenizer, mesh, ended_by)


@dataclasses.dataclass(frozen=True)
class _Made:
    """A step that was started and not reported yet."""

    step: int
    metrics: Scalars
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
    watch: Watch
    observer: Observer
    group: Group
    ended_by: str = ""
    reported: int = 0  # the latest step whose numbers are known
    diagnoses: int = 5  # how many skipped steps are still looked into: it takes as long as compiling
    kept: int = 0  # the step of the latest checkpoint
    pending: "_Made | None" = None

    def __call__(
        self, state: TrainState, dataset: Dataset | StreamingDataset
    ) -> tuple[TrainState, Mapping[str, float]]:
        """Trains from `state` to the last step; returns the final state and its evaluation, if it came to that."""
        self.state, self.pending = state, None
        try:
            metrics = self._steps(state, dataset)
            return self.state, metrics
        except _Asked:
            self._report(self.pending, self.state)
            if int(self.state.step) > self.kept:
                self._save(None)
            self.ended_by = self.group.asked
            return self.state, {}

    def _steps(self, state: TrainState, dataset: Dataset | StreamingDataset) -> Mapping[str, float]:
        cfg = self.config.train
        train_step = make_train_step(
            self.model,
            self.tx,
            self.schedule,
            self.mesh,
            state,
            loss=_loss(cfg),
            microbatches=cfg.microbatches,
            seed=cfg.seed,
            ema_decay=cfg.ema_decay,
            trained=trained_parameters(self.model.logical_axes(), self.config.optimizer.frozen),
            halt_above=int(state.skipped) if cfg.nonfinite == "stop" and state.loss_scale is None else None,
        )
        self.eval_step = make_eval_step(self.model, self.mesh, LossSettings(chunk=cfg.loss_chunk))
        self.non_finite = NonFinite(cfg.nonfinite)
        metrics: Mapping[str, float] = {}
        done = self.kept = self.reported = int(state.step)
        self._warm_up()
        if self._lacks_evaluation(done):
            metrics = self._evaluate(done)
        self.watch.pace.pause()
        load = dataset.loader(done, *sharding.batch_share(self.mesh))
        for index, rows in self._timed(prefetch(load, done, cfg.steps, workers=self.config.data.workers)):
            self._tick(f"step {index + 1}")
            batch = sharding.put_batch(self.mesh, rows)
            # The copy to the devices and the step are queued behind the step before, which may still be running.
            with self.group.waiting(f"step {index + 1}"), self.watch.profiler.step(index + 1, self.state.step):
                self.state, step_metrics = train_step(self.state, batch)
            self.watch.count(index + 1, self._gradients, self.state.params, batch)
            if self.watch.profiler.made(index + 1, step_metrics):
                self.watch.event("profiled", index + 1)
            # The numbers of the step before: reading those of this one would wait for it with nothing queued behind.
            self._report(self.pending, self.state)
            step, self.pending = index + 1, _Made(index + 1, step_metrics, batch)
            last = step == cfg.steps
            evaluating, saving = last or _due(step, cfg.eval_every), last or _due(step, cfg.checkpoint_every)
            if evaluating or saving:
                self._report(self.pending, self.state)
                self.pending = None
            if evaluating:
                metrics = self._evaluate(step)
            if saving:
                self._save(metrics["loss"] if evaluating else None)
            if evaluating or saving:
                self.watch.pace.pause()
        return metrics or self._evaluate(int(self.state.step), log=False)

    def _tick(self, doing: str) -> None:
        if self.group.tick(doing):
            raise _Asked

    def _warm_up(self) -> None:
        """Compiles the evaluation at once: later, while steps wait to be saved, a signal would wait for it."""
        first = next(iter(self.validation.eval_batches(*sharding.batch_share(self.mesh))), None)
        if first is not None:
            with self.group.waiting("the first evaluation"):
                jax.block_until_ready(self.eval_step(self.state.averaged, sharding.put_batch(self.mesh, first)))

    def _lacks_evaluation(self, step: int) -> bool:
        """Returns whether a signal came before the evaluation that this step should have had."""
        lacks = False
        if self.watch.log and step and (_due(step, self.config.train.eval_every) or step == self.config.train.steps):
            records = read_metrics(Path(self.config.out).expanduser())
            lacks = not any("split" in record and record["step"] == step for record in records)
        return self.group.gather("whether an evaluation is missing", lacks)[0]

    def _save(self, loss: float | None) -> None:
        self.kept = int(self.state.step)
        with self.group.waiting(f"the checkpoint of step {self.kept}"):
            self.checkpointer.save(self.state, loss)

    def _timed(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        while True:
            began = time.perf_counter()
            found = next(batches, None)
            self.watch.pace.waited(time.perf_counter() - began)
            if found is None:
                return
            yield found

    def _report(self, made: "_Made | None", state: TrainState) -> None:
        if made is None:
            return
        step = made.step
        with self.group.waiting(f"the result of step {step}"):
            record: dict[str, Any] = {"step": step, **made.metrics.fetch()}
        self.group.settled()
        self.reported = step
        self._check_finite(record, made)
        cfg = self.config.train
        logged = _due(step, cfg.log_every) or step in (1, cfg.steps)
        self.observer.step(self.watch.step(record, made.batch, logged), cfg.steps)

    def _check_finite(self, record: Mapping[str, Any], made: "_Made") -> None:
        """Says what a step that was not finite is traced back to, and raises if the run cannot go on."""
        step, why = made.step, self.non_finite.reason_to_stop(record)
        if record["finite"]:
            return
        if why:
            self.checkpointer.wait()  # one may still be on its way to the disk
            kept = self.checkpointer.steps()
            raise FloatingPointError(
                f"step {step}: {why}; {self._diagnose(record, made)}; "
                + (f"the last checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint yet")
            )
        why, details = what_was_not(record), dict[str, Any]()
        if "loss_scale" in record and not only_the_update(record):
            # That is how the loss scale is found, and nobody's fault.
            details = {"loss_scale": record["loss_scale"]}
            why = f"float16 overflowed with the loss scaled by {record['loss_scale']:g}"
        elif self.diagnoses:
            self.diagnoses -= 1
            finding = self._diagnose(record, made)
            why, details = f"{why}; {finding}", finding.as_details()
        self.observer.note(f"step {step} was skipped: {why}")
        self.watch.event("skipped", step, **details)

    def _diagnose(self, record: Mapping[str, Any], made: "_Made") -> Finding:
        if only_the_update(record):
            return first_update(record)
        cfg = self.config.train
        with self.group.waiting(f"what was not finite in step {made.step}"):
            return diagnose(
                self.model,
                self.state.params,
                made.batch,
                dropout_key(cfg.seed, made.step - 1),
                mesh=self.mesh,
                settings=_loss(cfg),
                microbatches=cfg.microbatches,
                scale=record.get("loss_scale", 1.0),
            )

    def _gradients(self, params: Any, batch: Any) -> Any:
        """Returns what a step computes, without the optimizer's part."""
        cfg, key = self.config.train, dropout_key(self.config.train.seed, 0)
        return loss_gradients(self.model, params, batch, settings=_loss(cfg), microbatches=cfg.microbatches, key=key)

    def _evaluate(self, step: int, log: bool = True) -> Mapping[str, float]:
        batches = self._until_asked(self.validation.eval_batches(*sharding.batch_share(self.mesh)), step)
        with self.group.waiting(f"the evaluation of step {step}"):
            metrics = evaluate(
                self.eval_step, self.state.averaged, batches, self.tokenizer, self.mesh, self.config.train.eval_batches
            )
        record = {"step": step, "split": "validation", **metrics}
        if log:
            self.watch.write(record)
        self.observer.evaluation(record)
        return metrics

    def _until_asked(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches, 1):
            self._tick(f"batch {number} of the evaluation of step {step}")
            yield batch


class _Asked(Exception):
    """A signal has asked the processes to end, and this is where they do."""


def _loss(config: TrainConfig) -> LossSettings:
    return LossSettings(config.z_loss, config.label_smoothing, config.label_smoothing_style, config.loss_chunk)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _first_state(
    config: RunConfig,
    model: Transformer,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    abstract: TrainState,
    checkpointer: Checkpointer,
    observer: Observer,
    events: EventLog | None,
) -> TrainState:
    state, notes = checkpointer.restore(abstract)
    for note in notes:
        observer.note(note)
        if events is not None:
            events.write("checkpoint_unreadable", 0 if state is None else int(state.step), note=note)
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
