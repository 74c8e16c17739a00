"""From the configuration of a run to its datasets."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from t5x_lite.config import DataConfig, ObjectiveName, RunConfig, TaskConfig
from t5x_lite.data import objectives, published_tasks
from t5x_lite.data.encoders import ChatEncoder, Encoder, PairEncoder, TextEncoder, in_batches
from t5x_lite.data.examples import Records, examples_of
from t5x_lite.data.hold_out import held_out, held_out_blocks
from t5x_lite.data.objectives import Objective, Sides, Vocabulary
from t5x_lite.data.packing import Layout
from t5x_lite.data.pipeline import Component, Dataset, plan_rows
from t5x_lite.data.prepared_datasets import TFDS
from t5x_lite.data.preprocessors import Preprocessor
from t5x_lite.data.sources import Reading, Record, Source, check_columns, open_source
from t5x_lite.data.streaming import StreamComponent, StreamingDataset
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.data.token_cache import TokenCache, build_cache, is_cache, open_cache
from t5x_lite.data.tokenizers import ByteTokenizer, Tokenizer
from t5x_lite.data.tokens import text_hashes
from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig

T = TypeVar("T")

CACHE_VARIABLE = "T5X_LITE_CACHE"

# Characters that a tokenizer is trained on; of more text a sample is taken, evenly.
TOKENIZER_CHARACTERS = 200_000_000

Progress = Callable[[str, int, int, int], None]
"""Is told of a token cache that is being built: of what, its parts that are done, all its parts, tokens so far."""

_PAIRED = ("text_to_text", "chat")
_SIDES: Mapping[str, tuple[Sides, ...]] = {
    "span_corruption": ("encoder_decoder",),
    "iid_denoising": ("encoder_decoder",),
    "bart": ("encoder_decoder",),
    "prefix_lm": ("encoder_decoder", "decoder"),
    "ul2": ("encoder_decoder", "decoder"),
    "text_to_text": ("encoder_decoder", "decoder"),
    "chat": ("encoder_decoder", "decoder"),
    "causal_lm": ("decoder",),
    "masked_lm": ("encoder",),
    "next_sentence": ("encoder",),
}
_MODELS = {
    "encoder_decoder": "an encoder and a decoder",
    "decoder": "a decoder and no encoder",
    "encoder": "an encoder and no decoder",
}


@dataclasses.dataclass(frozen=True, eq=False)
class TaskData:
    """The data of one task, before it is tokens.

    Attributes:
      name: in messages and metrics.
      objective: what is asked.
      source: of the training examples, or the directory of a token cache; None: there are none.
      eval_source: of the examples to evaluate on; None: a part of `source` is held out.
      preprocessors: what each record goes through.
      text, inputs, targets, prefix: as in `DataConfig`.
      metrics, labels: as in `tasks.Task`.
    """

    name: str
    objective: ObjectiveName
    source: Source | Path | None
    eval_source: Source | Path | None
    preprocessors: tuple[Preprocessor, ...] = ()
    text: str = "text"
    inputs: str = "inputs"
    targets: str = "targets"
    prefix: str = ""
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Those that have records, for training and for evaluation."""
        return tuple(source for source in (self.source, self.eval_source) if isinstance(source, Source))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the files must have; what a preprocessor or a conversation needs shows when it is read."""
        if self.preprocessors or self.objective == "chat":
            return ()
        return (self.inputs, self.targets) if self.objective == "text_to_text" else (self.text,)

    def encoder(self, tokenizer: Tokenizer) -> Encoder:
        """Returns what makes tokens of the records."""
        if self.objective == "chat":
            return ChatEncoder(tokenizer, preprocessors=self.preprocessors)
        if self.objective == "text_to_text":
            return PairEncoder(tokenizer, self.preprocessors, self.inputs, self.targets, self.prefix)
        return TextEncoder(tokenizer, self.text, self.preprocessors)

    def held_out(self, keys: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
        """Returns bool [records], which records of `source` are kept apart for evaluation."""
        if self.eval_source is not None:
            return np.zeros(len(keys), bool)
        return held_out(keys, fraction) if self.objective in _PAIRED else held_out_blocks(keys, sizes, fraction)


@dataclasses.dataclass(frozen=True, eq=False)
class RunData:
    """What a run trains on.

    Attributes:
      tasks: the data of each task.
      mixture: how often each is drawn.
    """

    tasks: tuple[TaskData, ...]
    mixture: Mixture


@dataclasses.dataclass(frozen=True, eq=False)
class Datasets:
    """What a run reads.

    Attributes:
      train: the training data.
      validation: the held-out data, each task a component.
      fingerprint: a digest of all tokens and their order, which is what the order of training follows from.
      notes: what a user should know: records that were left out, examples that were cut.
    """

    train: Dataset | StreamingDataset
    validation: Dataset
    fingerprint: str
    notes: tuple[str, ...]


def open_data(data: DataConfig) -> RunData:
    """Opens the sources that a configuration names; see `open_mixture`.

    Raises:
      InputError: as `open_mixture`, and a task that is not known.
    """
    entries = data.tasks or (TaskConfig(task=data.task, path=_given_path(data), eval_path=data.eval_path, rate=1.0),)
    members: dict[Task | Mixture, float | str] = {}
    settings: dict[str, TaskConfig] = {}
    for entry in entries:
        member = _member(entry)
        if member in members:
            raise InputError(f"data.tasks names '{member.name}' twice; give one of them another name")
        # A mixture within a mixture has no size of its own.
        by_number = isinstance(member, Mixture) and entry.rate == "proportional"
        members[member] = 1.0 if by_number else entry.rate
        settings |= {task.name: entry for task in (member.tasks if isinstance(member, Mixture) else (member,))}
    mixture = Mixture(members, limit=data.max_examples, temperature=data.temperature)
    return open_mixture(mixture, data, settings)


def open_mixture(mixture: Mixture, data: DataConfig, settings: Mapping[str, TaskConfig] | None = None) -> RunData:
    """Opens the sources of tasks, and looks at the columns of their first records, before anything slow is done.

    Args:
      mixture: of tasks, published ones or one's own.
      data: how files are read; columns and objective of the tasks that do not say.
      settings: of single tasks, by name; a task that is not here is taken to give `inputs` and `targets`.

    Raises:
      InputError: a missing file, an unknown format, a column that is not there.
    """
    own = settings or {}
    tasks = tuple(_open_task(task, own.get(task.name, TaskConfig(task=task.name)), data) for task in mixture.tasks)
    for task in tasks:
        for source in task.sources:
            check_columns(source, task.columns)
    if data.streaming and (missing := [task.name for task in tasks if task.eval_source is None]):
        raise InputError(f"data.streaming holds nothing out: give data.eval_path for {', '.join(missing)}")
    return RunData(tasks, mixture)


def _given_path(data: DataConfig) -> str | dict[str, Any]:
    # The embedded corpus is the default of those who name no task.
    return "" if data.task and data.path == DataConfig.path else data.path


def _member(entry: TaskConfig) -> Task | Mixture:
    if not entry.task:
        path = entry.path if isinstance(entry.path, str) else str(entry.path.get("path"))
        name = entry.name or Path(path).name.split(".")[0] or path
        return Task(name, entry.path, eval_source=entry.eval_path or None)
    member = published_tasks.find(entry.task)
    if isinstance(member, Mixture):
        if entry.path or entry.eval_path:
            raise InputError(f"'{entry.task}' is a mixture; only a single task can be given files")
        return member
    if entry.path or entry.eval_path:
        member = member.with_source(entry.path or member.source, entry.eval_path or None)
    return dataclasses.replace(member, name=entry.name) if entry.name else member


def open_records(source: str | Mapping[str, Any], data: DataConfig) -> Source | Path:
    """Returns a source, read as `data` says where it does not say itself, or the directory of a token cache.

    Raises:
      InputError: as `sources.open_source`.
    """
    spec = {"path": source} if isinstance(source, str) else dict(source)
    path = spec.get("path")
    if isinstance(path, str) and is_cache(path):
        return Path(path).expanduser()
    if isinstance(path, str) and path.startswith(TFDS) and data.data_dir:
        spec.setdefault("data_dir", data.data_dir)
    return open_source(spec, Reading(data.on_error, data.encoding, data.max_record_bytes))


def _open_task(task: Task, entry: TaskConfig, data: DataConfig) -> TaskData:
    def opened(source: str | Mapping[str, Any] | None) -> Source | Path | None:
        found = None if source is None else open_records(source, data)
        if isinstance(found, Source) and found.is_stream:
            raise InputError("data.path=-: the standard input can be read only once, training reads it again and again")
        return found

    def setting(name: str) -> Any:
        own = getattr(entry, name)
        return getattr(data, name) if own is None else own

    published = bool(entry.task)
    return TaskData(
        name=task.name,
        objective=task.objective or ("text_to_text" if published else setting("objective")),
        source=opened(task.source),
        eval_source=opened(task.eval_source),
        preprocessors=task.preprocessors,
        text=setting("text"),
        inputs="inputs" if published else setting("inputs"),
        targets="targets" if published else setting("targets"),
        prefix=entry.prefix or "" if published else setting("prefix"),
        metrics=task.metrics,
        labels=task.labels,
    )


def model_sides(model: TransformerConfig) -> Sides:
    """Returns which stacks a model has."""
    if not model.num_decoder_layers:
        return "encoder"
    return "encoder_decoder" if model.num_encoder_layers else "decoder"


def check_objectives(config: RunConfig, data: RunData) -> None:
    """Checks that the model can learn what the objectives ask for, on rows of these lengths.

    Raises:
      InputError: it has a stack too many or too few, another head, or no positions for a row.
    """
    model, sides = config.model, model_sides(config.model)
    for name in sorted({task.objective for task in data.tasks}):
        allowed = _SIDES[name]
        if sides not in allowed:
            raise InputError(
                f"data.objective={name} needs {' or '.join(_MODELS[side] for side in allowed)}; the model, of family"
                f" {model.family}, has {model.num_encoder_layers} encoder and {model.num_decoder_layers} decoder layers"
            )
        head = {"masked_lm": "masked_lm", "next_sentence": "pretraining"}.get(name)
        if head and model.head != head:
            raise InputError(f"data.objective={name} needs model.head={head}, not {model.head}")
    longest = max(config.train.input_length, config.train.target_length)
    if model.positions == "learned" and longest > model.max_positions:
        raise InputError(f"rows of {longest} tokens are longer than the model's {model.max_positions} positions")


def make_objective(name: ObjectiveName, config: RunConfig) -> Objective:
    """Returns the objective with the settings of a configuration.

    Raises:
      InputError: a setting that it cannot use.
    """
    data, train, sides = config.data, config.train, model_sides(config.model)
    pair_sides: Any = sides
    density = data.noise_density

    def masking() -> objectives.Masking:
        return objectives.Masking(density or 0.15, style=data.masking, whole_words=data.whole_words)

    match name:
        case "span_corruption":
            return objectives.SpanCorruption(density or 0.15, data.mean_span_length, data.random_roll)
        case "iid_denoising":
            return objectives.IidDenoising(density or 0.15)
        case "prefix_lm":
            return objectives.PrefixLM(density or 0.5, pair_sides)
        case "causal_lm":
            return objectives.CausalLM()
        case "bart":
            return objectives.Bart(tuple(_noise(noise, data) for noise in data.noises))
        case "ul2":
            names = dict(objectives.MODE_TOKENS) if data.mode_tokens else None
            return objectives.UL2(mode_tokens=names, sides=pair_sides)
        case "masked_lm":
            return objectives.MaskedLM(masking())
        case "next_sentence":
            return objectives.NextSentence(masking())
    pairs = objectives.Chat if name == "chat" else objectives.TextToText
    if sides == "decoder":
        return pairs(train.input_length, train.input_length, sides)
    return pairs(train.input_length, train.target_length or train.input_length, pair_sides)


def _noise(name: str, data: DataConfig) -> Any:
    rate, whole = data.noise_density or 0.3, data.whole_words
    match name:
        case "masking":
            return objectives.TokenMasking(rate, whole)
        case "deletion":
            return objectives.TokenDeletion(rate, whole)
        case "infilling":
            return objectives.TextInfilling(rate, data.mean_span_length, whole)
        case "permutation":
            return objectives.SentencePermutation()
    return objectives.DocumentRotation()


def training_texts(data: RunData, config: DataConfig) -> Iterator[str]:
    """Yields the texts that are trained on, both sides of pairs, without what is held out; for a tokenizer.

    Of more than `TOKENIZER_CHARACTERS` a sample is taken, the same every time.
    """
    for task in data.tasks:
        if isinstance(task.source, Path):
            raise InputError(f"'{task.source}' holds tokens, not text: give the tokenizer= that it was made with")
        if task.source is None:
            continue
        encoder = task.encoder(ByteTokenizer())  # which is not asked for tokens
        keys, sizes = _keys_and_sizes(encoder, task.source)
        kept = ~task.held_out(keys, sizes, config.eval_fraction)
        share = TOKENIZER_CHARACTERS / max(int(sizes[kept].sum()) * len(data.tasks), 1)
        if share < 1:
            # Not by the keys themselves, whose order decides on the hold-out.
            kept &= keys * np.uint64(0x9E3779B97F4A7C15) < np.uint64(int(share * 2**64))
        for texts in itertools.compress(texts_of(encoder, task.source), kept):
            yield from texts


def texts_of(encoder: Encoder, source: Source) -> Iterator[tuple[str, ...]]:
    """Yields the texts of the examples that a token cache of this source has, in its order."""
    return _made(encoder.texts, source, encoder.columns)


def _made(make: Callable[..., Iterable[T]], source: Source, columns: Sequence[str] = ()) -> Iterator[T]:
    # Records that cannot be used are counted where the cache is built, which leaves out the same ones.
    on_skip = None if source.reading.on_error == "raise" else lambda where, reason: None
    batches = in_batches(make, source.records(columns=columns), on_skip)
    return itertools.chain.from_iterable(batches)


def _keys_and_sizes(encoder: Encoder, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a token cache would have of these records, without tokens."""
    keys, sizes = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    texts = texts_of(encoder, source)
    while chunk := list(itertools.islice(texts, 1000)):
        keys.append(text_hashes([example[0] for example in chunk]))
        sizes.append(np.array([sum(map(len, example)) for example in chunk], np.int64))
    return np.concatenate(keys), np.concatenate(sizes)


def cache_root(data: DataConfig) -> Path:
    """Returns the directory of token caches."""
    return Path(data.cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/t5x_lite").expanduser()


def datasets(data: RunData, config: RunConfig, tokenizer: Tokenizer, progress: Progress | None = None) -> Datasets:
    """Returns the training and the validation data of a run; builds the token caches that are not there yet.

    Args:
      data: from `open_data`.
      config: the run's; its model has the vocabulary of the tokenizer.
      tokenizer: the run's.
      progress: is told of caches that are built.

    Raises:
      InputError: too little data, or lengths that an objective cannot use.
    """
    build = _Builder(config, tokenizer, progress or (lambda *told: None))
    train: list[Component | StreamComponent] = []
    validation, contents = [], []
    for task in data.tasks:
        objective = make_objective(task.objective, config)
        size = build.add_rows(objective)
        whole = build.cache(task, task.source) if not config.data.streaming else None
        if whole is not None:
            held = task.held_out(whole.keys, whole.sizes, config.data.eval_fraction)
            train.append(build.component(task, whole, ~held, objective, size))
            contents.append(whole.digest)
            if task.eval_source is None:
                validation.append(build.component(task, whole, held, objective, size))
        elif isinstance(task.source, Source):
            train.append(StreamComponent(task.source, task.encoder(tokenizer), objective, size, task.name))
            contents.append(task.source.identity)
        if (apart := build.cache(task, task.eval_source)) is not None:
            kept = np.ones(len(apart), bool)
            validation.append(build.component(task, apart, kept, objective, size))
            contents.append(apart.digest)
    if not (config.data.packing or config.data.streaming):
        build.trim([component for component in (*train, *validation) if isinstance(component, Component)])
    rates = _rates(data, train)
    train = [dataclasses.replace(component, rate=rates[component.name]) for component in train]
    settings = config.data
    layout, batch, seed = build.layout(), config.train.batch_size, config.train.seed
    heldout = Dataset(tuple(validation), layout, batch, seed, settings.packing)
    digest = hashlib.sha256(json.dumps([contents, settings.eval_fraction]).encode()).hexdigest()
    drawn: Any = tuple(component for component in train if component.rate > 0)
    if settings.streaming:
        streaming = StreamingDataset(drawn, layout, batch, seed, build.vocabulary)
        return Datasets(streaming, heldout, digest, tuple(build.notes))
    if settings.buckets and settings.buckets[-1] >= config.train.input_length:
        raise InputError(
            f"data.buckets {list(settings.buckets)}: must be below train.input_length {config.train.input_length}"
        )
    row = layout.input_length or layout.target_length
    shares = tuple(length / row for length in settings.buckets if length < row)
    dataset = Dataset(drawn, layout, batch, seed, settings.packing, shares)
    return Datasets(dataset, heldout, digest, tuple(build.notes))


def _rates(data: RunData, train: Sequence[Component | StreamComponent]) -> dict[str, float]:
    sizes = {component.name: len(component.examples) for component in train if isinstance(component, Component)}
    rates = data.mixture.rates(sizes)
    return dict(zip((task.name for task in data.mixture.tasks), rates.tolist(), strict=True))


class _Builder:
    """Caches and components, and the one layout that all tasks share."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, progress: Progress) -> None:
        self.config, self.tokenizer, self.progress = config, tokenizer, progress
        self.vocabulary = Vocabulary.of(tokenizer)
        self.notes: list[str] = []
        self._layouts: list[Layout] = []

    def add_rows(self, objective: Objective) -> int:
        train = self.config.train
        start = self.config.model.decoder_start_id
        target_length = train.target_length or (train.input_length if "inputs" in objective.arrays else None)
        size, layout = plan_rows(objective, train.input_length, target_length, self.vocabulary, start)
        self._layouts.append(layout)
        return size

    def layout(self) -> Layout:
        if len({layout.extras for layout in self._layouts}) > 1:
            raise InputError(
                "data.tasks with masked_lm and next_sentence: the tasks of a run must ask for the same kind"
            )
        # The longest rows that a task needs are the rows of all.
        longest = max(layout.target_length for layout in self._layouts)
        return dataclasses.replace(self._layouts[0], target_length=longest)

    def trim(self, components: Sequence[Component]) -> None:
        """Makes rows no longer than the longest pair of the data, rounded up to a multiple of 8."""
        if not all(isinstance(component.examples, Records) for component in components):
            return
        longest = np.max([component.examples.sizes().max(axis=0, initial=1) for component in components], axis=0)
        lengths = (-(-longest // 8) * 8).tolist()
        for index, layout in enumerate(self._layouts):
            shorter = min(layout.input_length, lengths[0]), min(layout.target_length, lengths[1])
            self._layouts[index] = dataclasses.replace(layout, input_length=shorter[0], target_length=shorter[1])

    def cache(self, task: TaskData, source: Source | Path | None) -> TokenCache | None:
        if source is None:
            return None
        encoder = task.encoder(self.tokenizer)
        if isinstance(source, Path):
            cache = open_cache(source, self.tokenizer)
            if tuple(cache.features) != encoder.features:
                raise InputError(
                    f"the token cache '{source}' holds {', '.join(cache.features)}; data.objective={task.objective}"
                    f" needs {', '.join(encoder.features)}"
                )
        else:
            told = functools.partial(self.progress, task.name)
            cache = build_cache(source, encoder, cache_root(self.config.data), progress=told)
        if cache.skipped:
            self.notes.append(f"{task.name}: {cache.skipped} records were skipped, such as {'; '.join(cache.reasons)}")
        return cache

    def component(
        self, task: TaskData, cache: TokenCache, kept: np.ndarray, objective: Objective, size: int
    ) -> Component:
        packed = self.config.data.packing
        examples = examples_of(cache, kept, objective, size, self.vocabulary, packed=packed)
        if isinstance(examples, Records):
            for side, cut in zip(("inputs", "targets"), examples.truncated(), strict=True):
                if cut:
                    self.notes.append(f"{task.name}: {cut} of {len(examples)} {side} are longer than the row, and cut")
        return Component(examples, name=task.name)


def pairs(task: TaskData, data: DataConfig, split: str) -> Iterator[tuple[tuple[str, str], Record]]:
    """Yields ((inputs, targets), record) for one side of the pairs of a task, as texts; `split` as in `DataConfig`."""
    apart = task.eval_source is not None and split == "validation"
    source = task.eval_source if apart else task.source
    if not isinstance(source, Source) or task.objective != "text_to_text":
        return
    encoder = cast(PairEncoder, task.encoder(ByteTokenizer()))
    keys, sizes = _keys_and_sizes(encoder, source)
    chosen = np.ones(len(keys), bool)
    if not apart:
        held = task.held_out(keys, sizes, data.eval_fraction)
        chosen = held if split == "validation" else ~held
    yield from itertools.compress(_made(encoder.examples, source), chosen)
