"""The tokenizer of a run: given, trained on its data, or that of what it starts from; and the model's vocabulary."""

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t5x_lite.config import RunConfig, run_directory
from t5x_lite.data.tokenizer_files import CONFIG
from t5x_lite.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer, train_sentencepiece
from t5x_lite.errors import InputError
from t5x_lite.models.config import TransformerConfig
from t5x_lite.models.registry import PRESETS
from t5x_lite.run_directory import has_begun

DEFAULT_TOKENIZER = "unigram:8000"
TRAINED_TOKENIZERS = ("unigram", "bpe", "word", "char")


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
