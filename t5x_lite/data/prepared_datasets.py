"""Data sets that others have prepared: those of TensorFlow Datasets, and directories of Hugging Face's `datasets`.

Neither TensorFlow nor `datasets` is needed.
"""

import json
import os
import posixpath
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.data import parts, storage
from t5x_lite.data.binary_files import ArrowPart, arrow_parts
from t5x_lite.data.parts import OnSkip, Reading, Rows
from t5x_lite.errors import InputError, nearest

TFDS = "tfds:"

_BATCH = 256  # records


class Tfds(NamedTuple):
    """A split of a prepared TFDS dataset.

    `name` is `DATASET[/CONFIG]:VERSION`, `directory` where it is, `split` with slices as TFDS has them: `train[:1%]`.
    """

    name: str
    directory: str
    split: str

    def identity(self) -> list[Any]:
        """Returns what changes when the data may have changed."""
        written = storage.look_up(os.path.join(self.directory, "dataset_info.json"))
        return [self.name, self.split, *written.identity()]


@dataclass(frozen=True)
class TfdsPart:
    """A range of the records of a split.

    Attributes:
      split: of which dataset.
      start: the first record.
      stop: the record behind the last.
      size: see `Part`.
    """

    split: Tfds
    start: int
    stop: int
    size: int = 0

    @property
    def name(self) -> str:  # noqa: D102
        return f"{TFDS}{self.split.name}:{self.split.split}"

    def read(self, reading: Reading, bad: OnSkip, columns: tuple[str, ...]) -> Rows:  # noqa: D102
        with parts.readable(self.name):
            source = _data_source(self.split)
            for start in range(self.start, self.stop, _BATCH):
                numbers = range(start, min(start + _BATCH, self.stop))
                for number, record in zip(numbers, source.__getitems__(numbers), strict=True):
                    yield f"{self.name}:{number + 1}", _plain(record)


def open_tfds(spec: str, split: str | None, data_dir: str | None, part_bytes: int) -> tuple[Tfds, list[TfdsPart]]:
    """Opens `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`.

    Args:
      spec: as above.
      split: the same as in `spec`; without either it is `train`, or the only one.
      data_dir: where TFDS has its data; None: where it usually is.
      part_bytes: about how much a part reads.

    Raises:
      InputError: a dataset or version that is not prepared (the message has the command that prepares it), one prepared
        in a format without random access, a split that it does not have.
    """
    match = re.fullmatch(r"tfds:([\w\-]+(?:/[\w.\-]+)?)(?::(\d+\.\d+\.\d+))?(?::(.+))?", spec)
    if not match:
        raise InputError(f"'{spec}' is not of the form tfds:NAME[/CONFIG][:VERSION][:SPLIT], such as tfds:squad:train")
    if match[3] and split:
        raise InputError(f"'{spec}' names a split, and so does split={split}; give one of them")
    name = match[1] + (f":{match[2]}" if match[2] else "")
    builder = _builder(name, data_dir)
    splits = list(builder.info.splits)
    split = str(match[3] or split or ("train" if "train" in splits or len(splits) != 1 else splits[0]))
    directory = os.fspath(builder.data_dir)
    found = Tfds(str(builder.info.full_name).rpartition("/")[0] + f":{builder.version}", directory, split)
    try:
        instructions = builder.info.splits[split].file_instructions
    except Exception as error:  # TFDS checks with assertions, KeyError and ValueError, depending on the mistake
        bare = re.match(r"[\w\-]*", split)[0]  # type: ignore[index]
        reason = f" ({parts.one_line(error)})" if bare in splits else nearest(bare, splits)
        listed = f"its splits are: {', '.join(splits)}, also sliced as in {splits[0]}[:1%]"
        raise InputError(f"'{TFDS}{name}' has no split '{split}'{reason}; {listed}") from error
    count = sum(instruction.take for instruction in instructions)
    if not count:
        raise InputError(f"no records in '{TFDS}{found.name}:{split}'")
    names = {re.match(r"[\w\-]*", term)[0] for term in split.split("+")}  # type: ignore[index]
    infos = [builder.info.splits[name] for name in splits if name in names] or list(builder.info.splits.values())
    record = sum(info.num_bytes for info in infos) // max(1, sum(info.num_examples for info in infos)) or 1
    spans = parts.spans(count, max(1, part_bytes // record))
    return found, [TfdsPart(found, start, stop, (stop - start) * record) for start, stop in spans]


def is_tfds_directory(directory: str) -> bool:
    """Whether TFDS has prepared a version of a dataset in this directory."""
    return all(storage.is_file(posixpath.join(directory, name)) for name in ("features.json", "dataset_info.json"))


def _builder(name: str, data_dir: str | None) -> Any:
    # From the files alone: the code that generates a dataset may need TensorFlow, or the network.
    from tensorflow_datasets.core import read_only_builder, registered

    data_dir = os.path.expanduser(data_dir) if data_dir else None
    where = data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except registered.DatasetNotFoundError:
        others = _others(name, Path(where).expanduser())
        raise InputError(
            f"'{TFDS}{name}' is not prepared in {where}{others}; to prepare it: {_command(name, data_dir)}"
        ) from None
    except Exception as error:  # metadata that is damaged, or the same dataset in several places
        raise InputError(f"cannot open '{TFDS}{name}' in {where}: {parts.one_line(error)}") from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise InputError(
            f"'{TFDS}{name}' in {where} is prepared as {', '.join(sorted(formats))}, not as array_record; to prepare it"
            f" again in another place: {_command(name, where.rstrip('/') + '_array_record')}"
        )
    return builder


def _command(name: str, data_dir: str | None) -> str:
    # Not `tfds build`, which starts only where TensorFlow is installed.
    where = f"data_dir='{data_dir}', " if data_dir else ""
    call = f"tfds.builder('{name}', {where}file_format='array_record').download_and_prepare()"
    return f'python -c "import tensorflow_datasets as tfds; {call}"'


def _others(name: str, root: Path) -> str:
    """Returns, as part of a message, what else is prepared there under this name or one like it."""
    dataset = re.split("[/:]", name)[0]
    found = sorted(str(file.parent.relative_to(root)) for file in (root / dataset).rglob("dataset_info.json"))
    if found:
        return f" (but {', '.join(found[:10])} is)"
    return nearest(dataset, os.listdir(root)).rstrip("?") if root.is_dir() else ""


@lru_cache(maxsize=8)
def _data_source(split: Tfds) -> Any:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(split.directory)
    return builder.as_data_source(split.split, file_format="array_record")


def _plain(value: Any) -> Any:
    """Returns Python's own lists, numbers and strings; bytes that are no UTF-8 (encoded images) stay bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # a NumPy array or number
        return _plain(value.tolist()) if value.dtype.kind in "OS" else value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def is_saved_dataset(directory: str) -> bool:
    """Whether this is a directory that Hugging Face's `save_to_disk` writes."""
    names = ("state.json", "dataset_dict.json")
    return any(storage.is_file(posixpath.join(directory, name)) for name in names)


def open_saved_dataset(
    directory: str, split: str | None, part_bytes: int
) -> tuple[list[storage.StoredFile], list[ArrowPart]]:
    """Opens what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written.

    Args:
      directory: of the one or the other.
      split: of a DatasetDict; without, the only one.
      part_bytes: about how much a part reads.

    Raises:
      InputError: no split or one that is not there, damaged metadata.
    """
    collection = posixpath.join(directory, "dataset_dict.json")
    if storage.is_file(collection):
        splits = _metadata(collection, "splits", list)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split is None or split not in splits:
            example = posixpath.join(directory, splits[0] if splits else "SPLIT")
            asked = "needs a split" if split is None else f"has no split '{split}'"
            hint = nearest(split, splits) if split else ""
            raise InputError(f"'{directory}' {asked}; give one, such as '{example}', of: {', '.join(splits)}{hint}")
        return open_saved_dataset(posixpath.join(directory, split), None, part_bytes)
    state = posixpath.join(directory, "state.json")
    if split is not None and split != (own := _metadata(state, "_split", str | None)):
        raise InputError(f"'{directory}' is the split '{own}', not '{split}'")
    entries = _metadata(state, "_data_files", list)
    files = [storage.look_up(posixpath.join(directory, entry["filename"])) for entry in entries]
    return files, [part for file in files for part in arrow_parts(file, part_bytes)]


def _metadata(path: str, key: str, kind: Any) -> Any:
    with parts.readable(path), storage.open_binary(path) as file:
        try:
            value = json.load(file)[key]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}' is damaged: it has no '{key}'") from error
    if not isinstance(value, kind):
        raise InputError(f"'{path}' is damaged: '{key}' is {value!r}")
    return value
