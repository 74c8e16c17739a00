"""The run configuration: one tree of frozen dataclasses, filled from a preset, a YAML file and `key=value` overrides.

Library users construct `RunConfig` directly. The command line calls `resolve`, which also remembers where every value
came from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from t5x_lite.errors import InputError, nearest
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import preset

DEFAULT_MODEL = "t5-small"

_MAPPINGS = ("data.path", "data.eval_path")  # keys whose value may be a mapping


ObjectiveName = Literal[
    "span_corruption",
    "iid_denoising",
    "prefix_lm",
    "causal_lm",
    "bart",
    "ul2",
    "masked_lm",
    "next_sentence",
    "text_to_text",
    "chat",
]
NoiseName = Literal["masking", "deletion", "infilling", "permutation", "rotation"]


@dataclass(frozen=True)
class TaskConfig:
    """One of the tasks of a mixture. What it leaves out is as `data` has it.

    Attributes:
      task: a published task or mixture, such as glue_sst2; with a `path`, its format for those files.
      path: files, as `data.path`.
      eval_path: files to evaluate on.
      name: in logs; by default that of the task or the file.
      rate: how often it is drawn beside the others, or proportional: by its number of examples.
      objective: as `data.objective`.
      text: as `data.text`.
      inputs: as `data.inputs`.
      targets: as `data.targets`.
      prefix: as `data.prefix`.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    task: str = ""
    path: str | dict[str, Any] = ""
    eval_path: str | dict[str, Any] = ""
    name: str = ""
    rate: float | Literal["proportional"] = "proportional"
    objective: ObjectiveName | None = None
    text: str | None = None
    inputs: str | None = None
    targets: str | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a task of nothing, or a negative rate."""
        if not self.task and not self.path:
            raise InputError("an entry of data.tasks needs a task or a path")
        if not isinstance(self.rate, str):
            _at_least("rate in data.tasks", self.rate, 0)


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      path: files or globs of txt, jsonl, json, tsv, csv, parquet, arrow (plain, .gz, .zst) or array_record;
        `tfds:NAME:SPLIT`; a directory of Hugging Face's datasets or of a token cache; `stdlib`, the embedded corpus; or
        a mapping with `path` and any of format, columns, split, data_dir, encoding, on_error, max_record_bytes.
      eval_path: what to evaluate on; empty: a part of `path` is held out.
      eval_fraction: share of the records to hold out.
      split: what `eval` reads: train or validation.
      task: a published task or mixture, such as glue_sst2 or super_glue; with a `path`, its format for those files.
      tasks: several tasks, mixed: a list of mappings with `path` or `task`, and `rate`.
      temperature: of proportional rates; above 1 small tasks are drawn more often.
      max_examples: the size at which a task stops counting as larger, in proportional rates.
      objective: span_corruption, iid_denoising, prefix_lm, bart or ul2 for an encoder-decoder; causal_lm (also
        prefix_lm, ul2) for a decoder alone; masked_lm or next_sentence for an encoder alone; text_to_text (from
        `inputs` to `targets`) or chat for a model with a decoder.
      text: column of the running text.
      inputs: column of the input text.
      targets: column of the target text.
      prefix: put before every input, as T5 names its tasks.
      noise_density: share of tokens that are masked; null: what is usual for the objective (0.15; bart 0.3;
        prefix_lm 0.5).
      mean_span_length: mean length of a masked span, in tokens.
      random_roll: whether span corruption may mask the first token of a text (T5's `random_roll`).
      whole_words: whether masked_lm, next_sentence and bart mask whole words.
      masking: how masked_lm counts: google (exactly so many) or huggingface (each token by chance).
      noises: what bart does to a text, in this order: masking, deletion, infilling, permutation, rotation.
      mode_tokens: whether ul2 puts the name of its mode before a text.
      packing: whether examples share rows, apart from each other.
      buckets: lengths of inputs, below train.input_length, at which a batch of shorter examples is cut.
      streaming: whether to read the data as it comes, without a token cache; for what is too large to keep.
      cache_dir: where token caches are kept; empty: $T5X_LITE_CACHE, or ~/.cache/t5x_lite.
      data_dir: where TFDS has its datasets; empty: its own default.
      workers: processes that make batches; 0: a thread.
      on_error: what to do with a malformed record: raise, or skip (and count) it.
      encoding: of text files.
      max_record_bytes: records longer than this are malformed.
    """

    path: str | dict[str, Any] = "stdlib"
    eval_path: str | dict[str, Any] = ""
    eval_fraction: float = 0.02
    split: Literal["train", "validation"] = "validation"
    task: str = ""
    tasks: tuple[TaskConfig, ...] = ()
    temperature: float = 1.0
    max_examples: int = 2**21
    objective: ObjectiveName = "span_corruption"
    text: str = "text"
    inputs: str = "inputs"
    targets: str = "targets"
    prefix: str = ""
    noise_density: float | None = None
    mean_span_length: float = 3.0
    random_roll: bool = False
    whole_words: bool = False
    masking: Literal["google", "huggingface"] = "google"
    noises: tuple[NoiseName, ...] = ("permutation", "infilling")
    mode_tokens: bool = True
    packing: bool = False
    buckets: tuple[int, ...] = ()
    streaming: bool = False
    cache_dir: str = ""
    data_dir: str = ""
    workers: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    encoding: str = "utf-8"
    max_record_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        """Raises InputError for a value that makes no sense, or two that exclude each other."""
        for name in ("eval_fraction", "noise_density"):
            if getattr(self, name) is not None and not 0.0 < getattr(self, name) < 1.0:
                raise InputError(f"data.{name} must be above 0 and below 1, not {getattr(self, name)}")
        for name, least in (("mean_span_length", 1), ("workers", 0), ("max_examples", 1), ("max_record_bytes", 1)):
            _at_least(f"data.{name}", getattr(self, name), least)
        if not 0 < self.temperature < math.inf:
            raise InputError(f"data.temperature must be above 0 and finite, not {self.temperature}")
        if list(self.buckets) != sorted(set(self.buckets)) or any(length < 2 for length in self.buckets):
            raise InputError(f"data.buckets must be ascending lengths of at least 2, not {list(self.buckets)}")
        for one, other in (
            ("buckets", "packing"),
            ("buckets", "streaming"),
            ("packing", "streaming"),
            ("streaming", "workers"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise InputError(f"data.{one} and data.{other} exclude each other; leave one of them out")
        if not (self.path or self.task or self.tasks):
            raise InputError("data.path is empty; give it files, or give data.task or data.tasks")
        for name in ("task", "path", "eval_path") if self.tasks else ():
            if getattr(self, name) != getattr(DataConfig, name):
                raise InputError(f"data.{name}={getattr(self, name)} and data.tasks exclude each other; put it there")


@dataclass(frozen=True)
class TrainConfig:
    """How long and on what shape of batch.

    Attributes:
      steps: updates this run makes.
      batch_size: examples in a global batch.
      microbatches: parts a batch is split into, to save memory; the gradients are the same.
      input_length: encoder tokens; of a decoder alone the tokens of a row.
      target_length: decoder tokens; 0: what the objective needs for `input_length`, or as many as that otherwise.
      seed: of initial parameters, data order and dropout.
      log_every: steps between lines of metrics.jsonl.
      eval_every: steps between evaluations on held-out data; 0: only at the end.
      eval_batches: batches of an evaluation during training; 0: all held-out data. `t5x-lite eval` always reads all.
      checkpoint_every: steps between checkpoints; 0: only at the end.
      keep_checkpoints: latest checkpoints to keep, beside the best.
      keep_every: checkpoints of steps that divide by this are kept for good; 0: none.
      remat: what the backward pass recomputes (minimal, full), recomputes or fetches from the host's memory (offload).
      scan_layers: whether a stack is a loop over its layers; false compiles longer and on a CPU trains a little faster.
      dtype: of the computation; parameters are float32. float16 has its loss scaled, by a factor that adapts itself.
      z_loss: coefficient of the z-loss.
      label_smoothing: share of the target's probability that goes to the other tokens.
      label_smoothing_style: t5 (to the others alone, entropy subtracted) or hf (to all tokens evenly).
      loss_chunk: target tokens of a row whose logits are held at a time; 0: all; null: as many as take little memory.
      ema_decay: of the running mean of the parameters, which evaluation and loading then use; 0: none.
      nonfinite: what to do in a step whose loss or gradient is not finite: stop, or skip it.
      profile: steps to trace with JAX's profiler, as FIRST:LAST; empty: none.
      wandb: project of Weights & Biases to log to as well; empty: none.
    """

    steps: int = 1000
    batch_size: int = 32
    microbatches: int = 1
    input_length: int = 512
    target_length: int = 0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 20
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    keep_every: int = 0
    remat: Literal["none", "minimal", "full", "offload"] = "none"
    scan_layers: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    label_smoothing_style: Literal["t5", "hf"] = "t5"
    loss_chunk: int | None = None
    ema_decay: float = 0.0
    nonfinite: Literal["stop", "skip"] = "stop"
    profile: str = ""
    wandb: str = ""

    def __post_init__(self) -> None:
        """Raises InputError for counts that make no sense."""
        for name in ("steps", "batch_size", "microbatches", "log_every", "keep_checkpoints"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("target_length", "eval_every", "eval_batches", "checkpoint_every", "keep_every", "seed", "z_loss"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.loss_chunk is not None:
            _at_least("train.loss_chunk", self.loss_chunk, 0)
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"train.{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.profile:
            self.profiled_steps()
        if self.steps >= 2**31:
            raise InputError(f"train.steps must be below 2**31, not {self.steps}")
        if self.seed >= 2**32:
            raise InputError(f"train.seed must be below 2**32, not {self.seed}")
        _at_least("train.input_length", self.input_length, 2)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"train.microbatches {self.microbatches} does not divide train.batch_size {self.batch_size}"
            )

    def profiled_steps(self) -> range:
        """Returns the steps of the run that `profile` names, none if it is empty.

        Raises:
          InputError: it is not of the form FIRST:LAST, or no step of the run.
        """
        first, _, last = (self.profile or "1:0").partition(":")
        steps = range(int(first), int(last) + 1) if first.isdecimal() and last.isdecimal() else range(0)
        if self.profile and (not steps or steps[0] < 1):
            raise InputError(f"train.profile='{self.profile}' is not of the form FIRST:LAST, two steps such as 100:105")
        if self.profile and steps[0] > self.steps:
            raise InputError(f"train.profile='{self.profile}' begins behind the last step, train.steps={self.steps}")
        return steps[: self.steps + 1 - steps.start]


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients.

    Attributes:
      name: adafactor (T5's), adamw, lion, muon (with AdamW for what is no matrix of a layer) or sgd.
      learning_rate: peak; for inverse_square_root the numerator. Adafactor multiplies it by each parameter's RMS.
        Default: T5's with Adafactor, 1.0 for inverse_square_root and 1e-3 else; the others have none.
      schedule: inverse_square_root, constant, linear, cosine or warmup_stable_decay.
      warmup_steps: linear warm-up, default none; for inverse_square_root the flat part, default 10,000.
      decay_steps: last steps of warmup_stable_decay, in which it falls; default a tenth of the run.
      final_share: of the peak, where linear, cosine and warmup_stable_decay end.
      clip_norm: global gradient norm to clip to; 0: none.
      weight_decay: decoupled, multiplied by the learning rate.
      no_decay: patterns of parameters that do not decay, beside norms, biases and position tables.
      frozen: patterns of parameters that stay as they are, such as encoder/*.
      b1: decay of the first moment (sgd: momentum); null: the optimizer's own.
      b2: decay of the second moment (lion: of its momentum); null: the optimizer's own.
    """

    name: Literal["adafactor", "adamw", "lion", "muon", "sgd"] = "adafactor"
    learning_rate: float | None = None
    schedule: Literal["inverse_square_root", "constant", "linear", "cosine", "warmup_stable_decay"] = (
        "inverse_square_root"
    )
    warmup_steps: int | None = None
    decay_steps: int | None = None
    final_share: float = 0.0
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    b1: float | None = None
    b2: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for values out of range, or an optimizer other than Adafactor without a learning rate."""
        for name in ("learning_rate", "clip_norm", "weight_decay", "warmup_steps"):
            if getattr(self, name) is not None:
                _at_least(f"optimizer.{name}", getattr(self, name), 0)
        if self.decay_steps is not None:
            _at_least("optimizer.decay_steps", self.decay_steps, 1)
        if not 0 <= self.final_share <= 1:
            raise InputError(f"optimizer.final_share must be from 0 to 1, not {self.final_share}")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"optimizer.{name} must be at least 0 and below 1, not {value}")
        if self.name != "adafactor" and self.learning_rate is None:
            raise InputError(f"optimizer.name={self.name} needs optimizer.learning_rate, such as 1e-3")

    @property
    def peak(self) -> float:
        """The learning rate, T5's by default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.schedule == "inverse_square_root" else 1e-3


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes that make one run. Under SLURM, Open MPI, GKE or on a TPU pod all of it is found out.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds after which whoever waits for another process gives up.
    """

    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        """Raises InputError if only some of the three are given, or they contradict each other."""
        _at_least("distributed.timeout", self.timeout, 1)
        three = {"coordinator": self.coordinator or None, "num_processes": self.num_processes}
        three["process_id"] = self.process_id
        missing = [name for name, value in three.items() if value is None]
        if 0 < len(missing) < len(three):
            given = next(name for name in three if name not in missing)
            raise InputError(f"distributed.{given} is given, so distributed.{missing[0]} is needed too")
        if self.num_processes is None or self.process_id is None:
            return
        _at_least("distributed.num_processes", self.num_processes, 1)
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"distributed.process_id {self.process_id} must be from 0 to {self.num_processes - 1}, as"
                f" distributed.num_processes is {self.num_processes}"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(
                f"distributed.coordinator='{self.coordinator}' is not of the form HOST:PORT, with a port below 65536"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs.

    Attributes:
      model: the shape of the model; on the command line `model=PRESET` and `model.FIELD=VALUE`.
      fit_vocabulary: whether a new model's `vocab_size` becomes the tokenizer's, rounded up to a multiple of 128 (as
        T5's 32,128 for 32,100). Off as soon as `model.vocab_size` is given.
      tokenizer: a `.model` file or directory, `bytes`, or one to train on the data: `unigram:8000`, `bpe:8000`,
        `word:8000`, `char`. Empty: that of `init_from`, else `unigram:8000`.
      extra_ids: sentinels of a tokenizer that has none of its own.
      data: what to train on.
      train: how long.
      optimizer: how.
      distributed: over which processes.
      mesh: sizes of the axes data, fsdp, context and model, such as `data:4,model:2`; empty: what fits.
      init_from: what to start from: a run directory, a checkpoint in one, a Hugging Face directory, or a T5X
        checkpoint. On the command line its model is the default for `model.*`.
      out: the run directory. If it holds checkpoints, the run continues from the latest.
    """

    model: TransformerConfig = field(default_factory=lambda: preset(DEFAULT_MODEL))
    fit_vocabulary: bool = True
    tokenizer: str = ""
    extra_ids: int = 100
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    mesh: str = ""
    init_from: str = ""
    out: str = "runs/latest"


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for every key, where its value came from."""

    config: RunConfig
    origins: Mapping[str, str]


def resolve(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Resolved:
    """Fills the configuration: defaults, then the model, then the YAML file, then `key=value` overrides.

    The model is the preset that `model` names, else that of `init_from`, else t5-small.

    Args:
      path: a YAML file, nested as the dataclasses are; `model` may be a preset's name, or a mapping with `preset`.
      overrides: strings such as `train.steps=100`; `null` stands for None.

    Raises:
      InputError: missing or malformed file, unknown key (the message has the nearest one), or a value that does not
        fit its type.
    """
    given: dict[str, tuple[Any, str]] = {}
    if path is not None:
        given.update({key: (value, str(path)) for key, value in _read_yaml(Path(path)).items()})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"'{override}' is not of the form key=value")
        if key == "model.preset":
            key = "model"
        given[key] = (_parse(value), "command line")

    model, model_origin = _base_model(given)
    values = flatten(RunConfig(model=model))
    origins = {key: model_origin if key.startswith("model.") else "default" for key in values}
    unknown = [key for key in given if key not in values]
    if unknown:
        where = given[unknown[0]][1]
        raise InputError(
            f"unknown configuration key '{unknown[0]}' ({where}){nearest(unknown[0], [*values, 'model'])};"
            " `t5x-lite config show` lists all keys"
        )
    for key, (value, origin) in given.items():
        values[key], origins[key] = value, origin
    if "model.vocab_size" in given and "fit_vocabulary" not in given:
        values["fit_vocabulary"], origins["fit_vocabulary"] = False, "model.vocab_size is given"
    if "data.objective" not in given:
        values["data.objective"], origins["data.objective"] = _likely_objective(values, given)
    return Resolved(validate(values), origins)


def _likely_objective(values: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the objective of who names none, and why: what the columns, else the stacks of the model are for."""
    if paired := [key for key in ("data.inputs", "data.targets") if key in given]:
        return "text_to_text", f"{paired[0]} is given"
    if str(values["model.num_encoder_layers"]) == "0":
        return "causal_lm", "the model has no encoder"
    if str(values["model.num_decoder_layers"]) == "0":
        objective = "next_sentence" if values["model.head"] == "pretraining" else "masked_lm"
        return objective, "the model has no decoder"
    return values["data.objective"], "default"


def _parse(value: str) -> Any:
    if value.startswith(("[", "{")):  # a list, such as model.stop_ids=[1,2], or a mapping
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return None if value == "null" else value


def _base_model(given: dict[str, tuple[Any, str]]) -> tuple[TransformerConfig, str]:
    origin = str(given["init_from"][0] or "") if "init_from" in given else ""
    # A saved configuration names every field: it must not need the run it once started from.
    complete = all(f"model.{item.name}" in given for item in fields(TransformerConfig))
    if "model" in given or not origin or complete:
        name = str(given.pop("model", (DEFAULT_MODEL, ""))[0])
        return preset(name), f"preset {name}"
    path = run_directory(origin) / "config.yaml"
    if path.exists():
        return resolve(path).config.model, f"init_from={origin}"
    from t5x_lite.interop import checkpoints  # here, because it imports JAX, which most commands can wait for

    if not checkpoints.is_foreign(origin):
        raise InputError(f"init_from={origin} is not a run directory (there is no {path}), nor {checkpoints.KINDS}")
    return checkpoints.read_config(origin), f"init_from={origin}"


def run_directory(path: str | Path) -> Path:
    """Returns the run directory that `path` is, or that the checkpoint `path` is in."""
    path = Path(path).expanduser()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def validate(values: Mapping[str, Any]) -> RunConfig:
    """Builds the configuration from flat keys and values.

    Raises:
      InputError: a value that does not fit its type or range; the message names the key and the value.
    """
    import pydantic

    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    try:
        return pydantic.TypeAdapter(RunConfig).validate_python(nested)
    except pydantic.ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        raise InputError(str(cause) if isinstance(cause, InputError) else _explained(error.errors())) from None


def _explained(errors: Sequence[Mapping[str, Any]]) -> str:
    """Returns one line about the first of pydantic's errors."""
    first = errors[0]
    *parents, last = map(str, first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        allowed = [item.name for item in fields(TaskConfig)]
        hint = nearest(last, allowed)
        return f"unknown key '{last}' in {'.'.join(parents)}; allowed: {', '.join(allowed)}{hint}"
    if last in ("str", "float"):  # one of the types that the key allows, and each of them reports
        errors = [error for error in errors if error["loc"][:-1] == first["loc"][:-1]]
    else:
        parents, errors = [*parents, last], [first]
    wanted = " or ".join(error["msg"].removeprefix("Input should be ") for error in errors)
    for theirs, ours in (("tuple", "list"), ("dictionary", "mapping"), (" or an instance of TaskConfig", "")):
        wanted = wanted.replace(theirs, ours)
    return f"{'.'.join(parents)}='{first['input']}': input should be {wanted}"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a dataclass tree as `{"train.steps": 1000, ...}`."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{item.name}."))
        else:
            flat[prefix + item.name] = value
    return flat


def save(config: RunConfig, path: Path) -> None:
    """Writes the configuration as YAML that `resolve` reads back to the same values."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"configuration {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"configuration {path} must be a mapping of keys to values")

    def walk(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and name not in _MAPPINGS:
                flat.update(walk(value, f"{name}."))
            else:
                flat["model" if name == "model.preset" else name] = value
        return flat

    return walk(tree, "")


def _at_least(name: str, value: float, minimum: float) -> None:
    if not minimum <= value < math.inf:
        raise InputError(f"{name} must be at least {minimum} and finite, not {value}")
