"""From the configuration of a run to its tokenizer and datasets."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.config import DataConfig, RunConfig, TrainConfig, run_directory
from t5x_lite.data.objectives import SpanCorruption
from t5x_lite.data.pipeline import (
    Dataset,
    causal_lm_dataset,
    hold_out,
    span_corruption_dataset,
    text_to_text_dataset,
)
from t5x_lite.data.sources import check_columns, read_records
from t5x_lite.data.tokenizer_files import CONFIG
from t5x_lite.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer, train_sentencepiece
from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import PRESETS
from t5x_lite.run_directory import has_begun

DEFAULT_TOKENIZER = "unigram:8000"
TRAINED_TOKENIZERS = ("unigram", "bpe", "word", "char")

# Running text is held out in blocks of neighbouring records, so that what is held out can still be read as text.
BLOCK_CHARACTERS = 10_000


@dataclasses.dataclass(frozen=True)
class Records:
    """The two parts of a run's data, before tokenisation.

    Attributes:
      train: texts, or (input, target) pairs.
      validation: likewise; no pair has an input that a pair in `train` has. Running text is divided in blocks, and a
        line that the corpus repeats may be on both sides.
    """

    train: Sequence[Any]
    validation: Sequence[Any]

    def fingerprint(self) -> str:
        """Returns a digest of all records and their order, which is what the order of training follows from."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(f"{len(part)} records\n".encode())
            for record in part:
                digest.update(repr(record).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def texts(self) -> Iterable[str]:
        """Yields every training text; both sides of pairs."""
        for record in self.train:
            yield from (record,) if isinstance(record, str) else record


def columns(data: DataConfig) -> tuple[str, ...]:
    """Returns the columns that the objective reads."""
    return (data.inputs, data.targets) if data.objective == "text_to_text" else (data.text,)


def check(data: DataConfig) -> None:
    """Looks at the files and their first records, before anything slow is done.

    Raises:
      InputError: a missing file, an unknown format or a column that is not there.
    """
    for path in filter(None, (data.path, data.eval_path)):
        check_columns(path, columns(data))


def check_objective(config: RunConfig) -> None:
    """Checks that the model can learn what the objective asks for, on rows of these lengths.

    Raises:
      InputError: it has an encoder too many or too few, or no positions for a row.
    """
    model, causal = config.model, config.data.objective == "causal_lm"
    needs = "a decoder and no encoder" if causal else "an encoder and a decoder"
    if bool(model.num_encoder_layers) == causal or not model.num_decoder_layers:
        raise InputError(
            f"data.objective={config.data.objective} needs {needs}; the model, of family {model.family}, has"
            f" {model.num_encoder_layers} encoder and {model.num_decoder_layers} decoder layers"
        )
    longest = max(config.train.input_length, config.train.target_length)
    if model.positions == "learned" and longest > model.max_positions:
        raise InputError(f"rows of {longest} tokens are longer than the model's {model.max_positions} positions")


def read(data: DataConfig) -> Records:
    """Reads the files and divides them into training and validation data.

    Raises:
      InputError: as `check`, and a malformed or empty file.
    """
    check(data)

    def load(path: str) -> list[Any]:
        names = columns(data)
        records = read_records(path, names)
        if data.objective != "text_to_text":
            return [record[data.text] for record in records]
        return [(data.prefix + record[data.inputs], record[data.targets]) for record in records]

    everything = load(data.path)
    if data.eval_path:
        return Records(everything, load(data.eval_path))
    if data.objective == "text_to_text":
        # By the input alone: the same question with two answers is no question to hold out.
        return Records(*hold_out(everything, data.eval_fraction, key=lambda pair: pair[0]))
    train, validation = hold_out(_blocks(everything), data.eval_fraction)
    return Records([text for block in train for text in block], [text for block in validation for text in block])


def datasets(
    records: Records, data: DataConfig, train: TrainConfig, tokenizer: Tokenizer, decoder_start_id: int | None = None
) -> tuple[Dataset, Dataset]:
    """Returns the training and the validation dataset; `decoder_start_id` is the model's, by default the pad.

    Raises:
      InputError: too little data, or lengths that the objective cannot use.
    """

    def build(part: Sequence) -> Dataset:
        if data.objective == "span_corruption":
            objective = SpanCorruption(data.noise_density, data.mean_span_length)
            length = train.target_length or None
            return span_corruption_dataset(
                part,
                tokenizer,
                objective,
                train.input_length,
                length,
                train.batch_size,
                train.seed,
                decoder_start_id,
            )
        if data.objective == "causal_lm":
            return causal_lm_dataset(
                part, tokenizer, train.input_length, train.batch_size, train.seed, decoder_start_id
            )
        length = train.target_length or train.input_length
        return text_to_text_dataset(
            part, tokenizer, train.input_length, length, train.batch_size, train.seed, decoder_start_id
        )

    return build(records.train), build(records.validation)


def obtain_tokenizer(
    spec: str, extra_ids: int, texts: Iterable[str], directory: Path, expected: Path | None = None
) -> Tokenizer:
    """Returns the tokenizer that `spec` names, after saving it to `directory`.

    Args:
      spec: a `.model` file, a directory, `bytes`, or one to train: `unigram:8000`, `bpe:8000`, `word:8000`, `char`.
      extra_ids: sentinels to add if it has none.
      texts: what to train it on.
      directory: the run's `tokenizer/`; written completely or not at all. One that is there is replaced.
      expected: directory of a tokenizer that it has to equal, because parameters were trained with that one.

    Raises:
      InputError: a spec that is none of these, training that fails, or a tokenizer other than the expected.
    """
    kind, _, size = spec.partition(":")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".tokenizer-") as folder:
        if kind in TRAINED_TOKENIZERS:
            if not size.isdigit() and not (kind == "char" and not size):
                raise InputError(f"tokenizer '{spec}': '{kind}' needs a vocabulary size, such as {kind}:8000")
            model = Path(folder) / "trained.model"
            tokenizer: Tokenizer = train_sentencepiece(
                texts, model, int(size or 8000), model_type=kind, extra_ids=extra_ids
            )
        else:
            tokenizer = load_tokenizer(str(Path(spec).expanduser()) if spec != "bytes" else spec, extra_ids)
        saved = Path(folder) / "tokenizer"
        tokenizer.save(saved)
        if expected and not _same(tokenizer, theirs := load_tokenizer(expected), Path(folder)):
            raise InputError(
                f"tokenizer '{spec}' ({tokenizer.vocab_size} tokens) is not the one in {expected} ({theirs.vocab_size}"
                " tokens) that the parameters of init_from were trained with; leave tokenizer= out to use that one"
            )
        if directory.exists():
            directory.rename(Path(folder) / "replaced")
        saved.rename(directory)
    return load_tokenizer(directory)


def run_tokenizer(config: RunConfig, texts: Iterable[str], directory: Path | None = None) -> Tokenizer:
    """Returns the tokenizer of a run: the one it has begun with, or the one its configuration asks for.

    Args:
      config: the run's.
      texts: what to train one on.
      directory: where to write a tokenizer that is not there yet; by default `out/tokenizer`.

    Raises:
      InputError: as `obtain_tokenizer`; with `init_from` the tokenizer has to be the one of that run.
    """
    own = Path(config.out).expanduser() / "tokenizer"
    if has_begun(own.parent):
        return load_tokenizer(own)
    origin = None
    if config.init_from:
        # A run's tokenizer has a directory of its own; a published model's lies beside its weights.
        run = run_directory(config.init_from)
        candidates = run / "tokenizer", Path(config.init_from).expanduser()
        origin = next((path for path in candidates if find_tokenizer(path)), None)
    spec = config.tokenizer or (str(origin) if origin else DEFAULT_TOKENIZER)
    return obtain_tokenizer(spec, config.extra_ids, texts, directory or own, expected=origin)


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Returns the configuration with a model that fits the tokenizer; with `init_from` it must fit as it is.

    Raises:
      InputError: the model has fewer embeddings than the tokenizer has tokens, or other ids for pad or EOS.
    """
    model = config.model
    fields: dict[str, Any] = {}
    if config.fit_vocabulary and not config.init_from:
        fields["vocab_size"] = -(-tokenizer.vocab_size // 128) * 128
    rows = fields.get("vocab_size", model.vocab_size)
    # bart-large-cnn, for one, was fine-tuned without its last token, the mask.
    if rows < tokenizer.vocab_size - (tokenizer.mask_id == tokenizer.vocab_size - 1):
        where = f"the checkpoint {config.init_from}" if config.init_from else "the model"
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, but {where} has embeddings for {rows}")
    # Ids as a preset has them are nobody's wish; others are, and so are those that parameters were trained with.
    presets = [] if config.init_from else [preset for preset in PRESETS.values() if preset.family == model.family]
    for name in ("pad_id", "eos_id"):
        given, ours = getattr(model, name), getattr(tokenizer, name)
        also = model.stop_ids if name == "eos_id" else ()
        if ours not in (given, *also) and given not in (None, *(getattr(preset, name) for preset in presets)):
            raise InputError(f"model.{name} is {given}, but the tokenizer's is {ours}")
    if not config.init_from:
        fields |= _special_ids(model, tokenizer)
    return dataclasses.replace(config, model=dataclasses.replace(model, **fields), fit_vocabulary=False)


def _special_ids(model: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the ids of a new model: those of the tokenizer, each in the roles that it has in the family."""
    bos = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    roles = {model.bos_id: bos, model.eos_id: tokenizer.eos_id, model.pad_id: tokenizer.pad_id}

    def same_role(token: int | None) -> int | None:
        return None if token is None else roles.get(token)

    return {
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "stop_ids": (),
        "decoder_start_id": roles.get(model.decoder_start_id, tokenizer.pad_id),
        "forced_bos_id": same_role(model.forced_bos_id),
        "forced_eos_id": same_role(model.forced_eos_id),
    }


def _same(one: Tokenizer, other: Tokenizer, folder: Path) -> bool:
    """Returns whether two tokenizers have the same vocabulary and special ids; `folder` is for what is compared."""
    saved = []
    for number, tokenizer in enumerate((one, other)):
        tokenizer.save(folder / str(number))
        files = {path.name: path.read_bytes() for path in (folder / str(number)).iterdir() if path.name != CONFIG}
        ids = (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.sentinels)
        saved.append((type(tokenizer), ids, files))
    return saved[0] == saved[1]


def _blocks(texts: Sequence[str]) -> list[tuple[str, ...]]:
    # A small corpus gets smaller blocks, so that there are enough of them to hold out a fair share.
    target = min(BLOCK_CHARACTERS, sum(map(len, texts)) // 100)
    blocks: list[tuple[str, ...]] = []
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= target:
            blocks.append(tuple(block))
            block, size = [], 0
    return [*blocks, tuple(block)] if block else blocks
