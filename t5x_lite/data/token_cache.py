"""Text is turned into token ids once, and read from memory-mapped files from then on.

`root/<key>/` is complete or not there at all; the key is a hash of source, encoder and format. While it is being built,
`root/<key>.<division>.building/` has a directory for each part of the source that is done. A part is written under a
name of its own and then renamed, so whatever ends the building leaves what was complete, and building goes on from
there. The parts are joined in the source's order: the files do not depend on who built what.

A lock makes a second builder on the machine wait. On file systems that do not lock between machines two builders do the
same work twice under different names, and the one that is late takes what the other has finished.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.data import worker_processes
from t5x_lite.data.cache_parts import (
    KEYS,
    PART,
    REASONS,
    SIZES,
    PartedSource,
    accumulate,
    concatenate,
    host,
    little_endian,
    part_tokens,
    removed_on_failure,
    unique,
    write,
    write_part,
)
from t5x_lite.data.encoders import Encoder
from t5x_lite.data.tokenizers import Tokenizer
from t5x_lite.data.tokens import Tokens, tokenizer_identity
from t5x_lite.errors import InputError

FORMAT = 1
_INDEX = "index.json"
_SMALL = 4 << 20  # bytes, of sources that are not worth starting processes for
_POLL = 0.5  # seconds between two looks at another builder

Progress = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCache:
    """The token ids of all records of a source, in memory-mapped files. Pickled as its path.

    Attributes:
        directory: where it is.
        features: the tokens of each feature of the encoder, one text for each record.
        keys: uint64 [records], `text_hashes` of what decides on which side of a hold-out a record is.
        sizes: int64 [records], characters.
        digest: SHA-256 of the contents, in hexadecimal.
        skipped: how many records could not be used.
        reasons: where the first of them are, and why.
        tokenizer, source, encoder: their identities.
    """

    directory: Path
    features: Mapping[str, Tokens]
    keys: np.ndarray
    sizes: np.ndarray
    digest: str
    skipped: int
    reasons: tuple[str, ...]
    tokenizer: str
    source: str
    encoder: str

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.directory,)


def cache_key(source: PartedSource, encoder: Encoder) -> str:
    """Returns the name of the cache's directory."""
    content = json.dumps([FORMAT, source.identity, encoder.identity])
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:32]


def open_cache(directory: str | Path, tokenizer: Tokenizer | str | None = None, *, verify: bool = False) -> TokenCache:
    """Opens a complete cache; reads only its index, unless `verify` is true.

    Args:
        directory: as `build_cache` made it.
        tokenizer: that the ids should be of, or its identity.
        verify: whether to compare the contents with their SHA-256 sums.

    Raises:
        InputError: no cache, one of another format or tokenizer, or files that are not as the index says.
    """
    directory = Path(directory)
    try:
        index = json.loads((directory / _INDEX).read_bytes())
        found = index["format"]
    except OSError as error:
        raise InputError(f"no token cache in '{directory}': {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(directory, f"{_INDEX} is not readable") from error
    if found != FORMAT:
        raise InputError(f"the token cache '{directory}' has format {found}, and this version reads {FORMAT}")
    if tokenizer is not None:
        wanted = tokenizer if isinstance(tokenizer, str) else tokenizer_identity(tokenizer)
        if index["tokenizer"] != wanted:
            raise InputError(
                f"the token cache '{directory}' is of {index['tokenizer']}; the tokenizer here is {wanted}"
            )
    for name, file in index["files"].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            has = "is missing" if size is None else f"has {size} bytes, not {file['bytes']}"
            raise _damaged(directory, f"{name} {has}")
        if verify and _file_sum(path) != file["sha256"]:
            raise _damaged(directory, f"{name} is not what was written")
    features = {
        name: Tokens(_mapped(directory / f"{name}.bin", kind), _mapped(directory / f"{name}.offsets", "int64"))
        for name, kind in index["features"].items()
    }
    return TokenCache(
        directory=directory,
        features=features,
        keys=_mapped(directory / KEYS, "uint64"),
        sizes=_mapped(directory / SIZES, "int64"),
        digest=index["digest"],
        skipped=index["skipped"],
        reasons=tuple(index["reasons"]),
        tokenizer=index["tokenizer"],
        source=index["source"],
        encoder=index["encoder"],
    )


def is_cache(directory: str | Path) -> bool:
    """Returns whether there is a token cache, complete or not usable, in a directory."""
    # Not Path.is_file, which raises for a directory that may not be looked into, or a name that is too long.
    return os.path.isfile(os.path.expanduser(os.path.join(directory, _INDEX)))


def _damaged(directory: Path, reason: str) -> InputError:
    return InputError(f"the token cache '{directory}' is damaged: {reason}; delete it, and it is built again")


def _file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mapped(path: Path, kind: str) -> np.ndarray:
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros(0, little_endian(kind))
    # As a plain array: a memmap's slices are memmaps, which cost a microsecond each to make.
    return np.asarray(np.memmap(path, little_endian(kind), "r"))


def build_cache(
    source: PartedSource,
    encoder: Encoder,
    root: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    patience: float = 3600.0,
) -> TokenCache:
    """Returns the cache of a source, which is built if it is not there yet.

    Args:
        source: what to read. Records that cannot be used are left out and counted if its `reading.on_error` is "skip".
        encoder: what makes tokens of it.
        root: the directory of caches.
        workers: processes; None means one for each core, or none beside this one where the data is small, and 1 means
            this one. It is this one too, and a warning says so, where the source or the encoder is made of something
            that another process cannot import.
        progress: called with the parts that are done, all parts, and the tokens so far; also while another process
            builds the same cache.
        patience: seconds that another builder may take over one part.

    Raises:
        InputError: a record that cannot be used, no records at all, a damaged cache, or another builder that stands
            still.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}: must be at least 1")
    progress = progress or (lambda done, total, tokens: None)
    final = Path(root) / cache_key(source, encoder)
    if final.is_dir():
        return open_cache(final)
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        _lock_file(final).touch()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"'{root}' cannot be a directory of token caches: {error.strerror}") from None
    # Parts are told apart by their numbers, so another division of the same source needs another directory.
    division = hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(tuple(source.parts))).encode()).hexdigest()[:8]
    building = _Building(final.with_name(f"{final.name}.{division}.building"), source, encoder, progress)
    with _lock(final, building, patience) as locked:
        if final.is_dir():
            return open_cache(final)
        try:
            building.directory.mkdir(exist_ok=True)
            building.tidy(alone=locked)
            building.encode(workers)
            building.join(final)
        except BaseException as error:
            building.tidy(alone=locked)
            # Another builder, on a machine that the lock does not reach, may have come first and cleared up.
            gone = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
            if not (gone and final.is_dir()):
                if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a disk that is full
                    error.filename = str(root)
                raise
        for path in Path(root).glob(f"{final.name}.*.building"):
            shutil.rmtree(path, ignore_errors=True)
    return open_cache(final)


class _Building:
    """A cache that is being built: the directory of its parts."""

    def __init__(self, directory: Path, source: PartedSource, encoder: Encoder, progress: Progress) -> None:
        self.directory = directory
        self._source = source
        self._encoder = encoder
        self._progress = progress
        self._total = len(source.parts)

    def tidy(self, alone: bool) -> None:
        """Removes what processes of this machine have left incomplete, if they are surely ended: the lock was got."""
        if alone:
            for path in self.directory.glob(f"*.{host()}-*"):
                shutil.rmtree(path, ignore_errors=True)

    def done(self) -> dict[int, int]:
        """Returns the number of tokens of each part that is complete."""
        tokens = ((index, part_tokens(self._part(index))) for index in range(self._total))
        return {index: count for index, count in tokens if count is not None}

    def _part(self, index: int) -> Path:
        return self.directory / f"part-{index:05d}"

    def report(self) -> int:
        """Calls `progress` with what is there; returns how many parts that is."""
        done = self.done()
        self._progress(len(done), self._total, sum(done.values()))
        return len(done)

    def encode(self, workers: int | None) -> None:
        """Makes the parts that are missing."""
        done = self.done()
        missing = [index for index in range(self._total) if index not in done]
        for index in missing:  # one that is there all the same is not whole: of a machine that lost its power, perhaps
            shutil.rmtree(self._part(index), ignore_errors=True)
        count, tokens = len(done), sum(done.values())
        self._progress(count, self._total, tokens)
        work = functools.partial(write_part, self._source, self._encoder, self.directory)
        # Closed at once, and with it the processes, if `progress` raises.
        with contextlib.closing(_each(work, missing, workers or self._worth(missing))) as results:
            for _, more in results:
                count, tokens = count + 1, tokens + more
                self._progress(count, self._total, tokens)

    def _worth(self, missing: Sequence[int]) -> int:
        sizes = [getattr(self._source.parts[index], "size", 0) for index in missing]  # 0: not known
        return 1 if all(sizes) and sum(sizes) < _SMALL else worker_processes.available_cores()

    def join(self, final: Path) -> None:
        """Writes the files of the cache and gives it its name."""
        parts = [self._part(index) for index in range(self._total)]
        told = [json.loads((part / PART).read_bytes()) for part in parts]
        if not sum(part["records"] for part in told):
            skipped = sum(part["skipped"] for part in told)
            raise InputError(f"no records in '{self._source.spec}'" + f"; {skipped} were skipped" * bool(skipped))
        target = self.directory / f"joined.{unique()}"
        target.mkdir()
        files = {}
        with removed_on_failure(target):
            for name in self._encoder.features:
                files[f"{name}.bin"] = concatenate([part / f"{name}.bin" for part in parts], target / f"{name}.bin")
                files[f"{name}.offsets"] = accumulate(
                    [part / f"{name}.lengths" for part in parts], target / f"{name}.offsets"
                )
            for name in (KEYS, SIZES):
                files[name] = concatenate([part / name for part in parts], target / name)
            contents = {
                "features": dict(zip(self._encoder.features, self._encoder.types, strict=True)),
                "files": files,
            }
            index = {
                "format": FORMAT,
                "source": self._source.identity,
                "encoder": self._encoder.identity,
                "tokenizer": self._encoder.tokenizer_identity,
                "digest": hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
                "records": sum(part["records"] for part in told),
                **contents,
                "skipped": sum(part["skipped"] for part in told),
                "reasons": list(itertools.chain.from_iterable(part["reasons"] for part in told))[:REASONS],
            }
            write(target / _INDEX, json.dumps(index, indent=1).encode())
            target.rename(final)


def _each(work: Callable[[int], int], pieces: Sequence[int], workers: int) -> Generator[tuple[int, int], None, None]:
    if min(workers, len(pieces)) > 1:
        try:
            yield from worker_processes.run(work, pieces, workers)
            return
        except worker_processes.NotPortable as error:
            warnings.warn(f"the text is tokenised in one process, not {workers}: {error}", stacklevel=4)
    for piece in pieces:
        yield piece, work(piece)


def _lock_file(final: Path) -> Path:
    return final.with_name(f"{final.name}.lock")


@contextlib.contextmanager
def _lock(final: Path, building: _Building, patience: float) -> Iterator[bool]:
    """Keeps other builders on this machine out; yields whether it does, which not every file system allows.

    While another one is at work, what it has done is reported; when it has finished, there is nothing to lock.
    """
    import fcntl

    with _lock_file(final).open("w") as file:
        locked, seen, deadline = False, -1, 0.0
        while not (locked or final.is_dir()):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                count = building.report()
                if count != seen:
                    seen, deadline = count, time.monotonic() + patience
                elif time.monotonic() > deadline:
                    raise InputError(
                        f"another process is building the token cache '{final}' and has completed no part for"
                        f" {patience:.0f} seconds; end it and run again"
                    ) from None
                time.sleep(_POLL)
            except OSError:
                break
        yield locked
