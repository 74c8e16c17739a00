"""The parts of a token cache that is being built, each a directory that is complete or not there, and their joining."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from t5x_lite.data.encoders import Encoded, Encoder, in_batches
from t5x_lite.data.parts import Record
from t5x_lite.data.tokens import text_hashes

PART = "part.json"
KEYS, SIZES = "keys.u64", "sizes.i64"
REASONS = 5  # of skipped records that are kept
_CHUNK = 2**20  # bytes that are copied at once


class PartedSource(Protocol):
    """What building needs of a `t5x_lite.data.sources.Source`."""

    @property
    def spec(self) -> Any:
        """What names it in messages."""
        ...

    @property
    def identity(self) -> str:
        """Changes when the data may have changed."""
        ...

    @property
    def parts(self) -> Sequence[Any]:
        """What is read, each by itself; a part may have a `size` in bytes."""
        ...

    def read(
        self, index: int, on_skip: Callable[[str, str], None], columns: Sequence[str], /
    ) -> Iterator[tuple[str, Record]]:
        """Yields where each record of a part is, and the record, of which only these columns are needed (none: all)."""
        ...


def little_endian(kind: str) -> np.dtype:
    """Returns the type of the numbers in a file."""
    return np.dtype(kind).newbyteorder("<")


def part_tokens(part: Path) -> int | None:
    """Returns the number of tokens of a part; None unless it is there and whole."""
    try:
        told = json.loads((part / PART).read_bytes())
        whole = all((part / name).stat().st_size == size for name, size in told["files"].items())
    except (OSError, ValueError):
        return None
    return told["tokens"] if whole else None


def write_part(source: PartedSource, encoder: Encoder, building: Path, index: int) -> int:
    """Encodes a part of the source; returns how many tokens it has."""
    part = building / f"part-{index:05d}"
    target = building / f"{part.name}.{unique()}"
    target.mkdir()
    with removed_on_failure(target):
        with _PartFiles(target, encoder) as files:
            skips = getattr(getattr(source, "reading", None), "on_error", "raise") == "skip"
            records = source.read(index, files.skip, encoder.columns)
            for encoded in in_batches(encoder, records, files.skip if skips else None):
                files.add(encoded)
            tokens = files.finish()
        try:
            target.rename(part)
        except OSError:
            if not part.is_dir():
                raise
            shutil.rmtree(target)  # another builder's is there
    return tokens


class _PartFiles:
    """The files of a part."""

    def __init__(self, directory: Path, encoder: Encoder) -> None:
        self._directory = directory
        self._types = [little_endian(kind) for kind in encoder.types]
        names = [file for name in encoder.features for file in (f"{name}.bin", f"{name}.lengths")]
        self._open = contextlib.ExitStack()
        self._files = {name: self._open.enter_context((directory / name).open("wb")) for name in (*names, KEYS, SIZES)}
        self._records = self._tokens = self._skipped = 0
        self._reasons: list[str] = []

    def __enter__(self) -> "_PartFiles":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._open.__exit__(*failure)

    def skip(self, where: str, reason: str) -> None:
        """Counts a record that cannot be used."""
        self._skipped += 1
        if len(self._reasons) < REASONS:
            self._reasons.append(reason if where in reason else f"{where}: {reason}")

    def add(self, batch: Sequence[Encoded]) -> None:
        """Writes examples."""
        files = iter(self._files.values())
        for number, kind in enumerate(self._types):
            values = [encoded.features[number] for encoded in batch]
            lengths = np.fromiter(map(len, values), little_endian("int64"), len(values))
            total = int(lengths.sum())
            next(files).write(_joined(values, kind, total).data)
            next(files).write(lengths.data)
            self._tokens += total * (kind == self._types[0])  # and not the counts or masks that go with them
        self._files[KEYS].write(text_hashes([encoded.key for encoded in batch]).data)
        sizes = np.fromiter((encoded.size for encoded in batch), little_endian("int64"), len(batch))
        self._files[SIZES].write(sizes.data)
        self._records += len(batch)

    def finish(self) -> int:
        """Completes the part; returns how many tokens it has."""
        sizes = {name: file.tell() for name, file in self._files.items()}
        for file in self._files.values():
            _flush(file)
        told = {
            "records": self._records,
            "tokens": self._tokens,
            "skipped": self._skipped,
            "reasons": self._reasons,
            "files": sizes,
        }
        write(self._directory / PART, json.dumps(told).encode())
        return self._tokens


def _joined(values: Sequence[Any], kind: np.dtype, total: int) -> np.ndarray:
    if values and isinstance(values[0], np.ndarray):
        return np.concatenate(values, dtype=kind, casting="unsafe")  # every id is below the size that `kind` is for
    return np.fromiter(itertools.chain.from_iterable(values), kind, total)


def concatenate(paths: Sequence[Path], target: Path) -> dict[str, Any]:
    """Writes files one behind the other; returns the size and the sum of the result."""
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as out:
        for path in paths:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    size += out.write(chunk)
        _flush(out)
    return {"bytes": size, "sha256": digest.hexdigest()}


def accumulate(paths: Sequence[Path], target: Path) -> dict[str, Any]:
    """Writes where each text begins and the last one ends, from the files of their lengths."""
    digest, size, total = hashlib.sha256(), 0, np.int64(0)
    with target.open("wb") as out:
        chunks = (chunk for path in paths for chunk in _numbers(path))
        for lengths in itertools.chain([np.zeros(1, little_endian("int64"))], chunks):
            offsets = np.cumsum(lengths, dtype=little_endian("int64")) + total
            total = offsets[-1]
            digest.update(offsets.tobytes())
            size += out.write(offsets.tobytes())
        _flush(out)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _numbers(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield np.frombuffer(chunk, little_endian("int64"))


def write(path: Path, content: bytes) -> None:
    """Writes a file."""
    with path.open("wb") as file:
        file.write(content)
        _flush(file)


def _flush(file: BinaryIO) -> None:
    """Brings what was written to the disk, so that a name which is given afterwards is not that of an empty file."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def removed_on_failure(directory: Path) -> Iterator[None]:
    """Leaves no incomplete directory behind, unless the process itself is ended."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def host() -> str:
    """Returns what names this machine in the names of incomplete directories."""
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname()) or "host"


def unique() -> str:
    """Returns a name that no other process on any machine uses."""
    return f"{host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
