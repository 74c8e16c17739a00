"""Files here and, through fsspec, on remote stores (`gs://`, `s3://`): finding, describing and opening them."""

import contextlib
import glob
import gzip
import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from t5x_lite.errors import InputError, nearest

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_BUFFER = 1 << 18


class StoredFile(NamedTuple):
    """A file as it was when it was looked up.

    `path` is what opens it, `size` in bytes, `stamp` its time of modification in ns or what a remote store has for it.
    """

    path: str
    size: int
    stamp: str

    def identity(self) -> list[Any]:
        """Returns what changes when the file may have changed."""
        return [self.path if is_remote(self.path) else os.path.abspath(self.path), self.size, self.stamp]


def is_remote(path: str) -> bool:
    """Whether the path is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", path) is not None


def find(path: str) -> list[str]:
    """Returns the files that a path, a glob (`**` crosses directories) or a URL of either names, sorted.

    Raises:
      InputError: there is none, or what reaches the store is not installed.
    """
    if is_remote(path):
        with _store(path) as (store, name):
            if any(letter in name for letter in "*?["):
                found = store.glob(name, detail=True)
                matches = [store.unstrip_protocol(match) for match, info in found.items() if info["type"] == "file"]
            else:
                matches = [path] if store.isfile(name) else []
    elif os.path.isfile(path):  # a name may itself hold a bracket
        matches = [path]
    else:
        matches = [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
    if not matches:
        raise InputError(f"no file matches '{path}'")
    return sorted(matches)


def look_up(path: str) -> StoredFile:
    """Returns size and stamp of a file; raises InputError if there is none."""
    if not is_remote(path):
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"cannot read '{path}': {error.strerror}") from error
        return StoredFile(path, status.st_size, str(status.st_mtime_ns))
    with _store(path) as (store, name):
        info = store.info(name)
    # What stores say about a version; the first that there is.
    keys = ("etag", "ETag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
    stamp = next((str(info[key]) for key in keys if info.get(key)), "")
    return StoredFile(path, int(info.get("size") or 0), stamp)


def is_file(path: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    with _store(path) as (store, name):
        return store.isfile(name)


def is_directory(path: str) -> bool:
    """Whether there is such a directory."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _store(path) as (store, name):
        return store.isdir(name)


def open_binary(path: str) -> BinaryIO:
    """Opens a file for reading bytes, buffered and seekable; raises OSError as `open` does."""
    if not is_remote(path):
        return open(path, "rb", buffering=_BUFFER)
    with _store(path) as (store, name):
        raw = store.open(name, "rb")
    # fsspec's own readline is Python, this one is C.
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER))


def compression(path: str) -> str:
    """Returns `.gz`, `.zst` or, for a file that is not compressed, `""`."""
    suffix = os.path.splitext(path.lower())[1]
    return suffix if suffix in (".gz", ".zst") else ""


def open_decompressed(path: str) -> BinaryIO:
    """Opens a file for reading what it says, uncompressed; raises OSError, EOFError or zlib.error, also later."""
    suffix = compression(path)
    if suffix == ".gz":
        file = open_binary(path)
        unzipped = gzip.GzipFile(fileobj=file)
        unzipped.myfileobj = cast(Any, file)  # so that it is closed with it
        # gzip's own readline is Python, this one is C.
        return cast(BinaryIO, io.BufferedReader(unzipped, _BUFFER))
    if suffix == ".zst":
        # Not the zstandard package: its stream reader ends quietly, with no error, where a file is cut short.
        import pyarrow

        source = pyarrow.PythonFile(open_binary(path), mode="r") if is_remote(path) else path
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(source, compression="zstd"), _BUFFER))
    return open_binary(path)


@contextlib.contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """Gives the file system of a URL and the path in it; what their library raises becomes InputError."""
    # Not at the top: most runs read local files.
    import fsspec

    protocol = url.partition("://")[0]
    try:
        store = fsspec.core.url_to_fs(url)
    except ImportError as error:
        if extra := _EXTRAS.get(protocol):
            raise InputError(f"'{url}' needs an extra: pip install 't5x_lite[{extra}]'") from error
        raise InputError(f"cannot open '{url}': {' '.join(str(error).split())}") from error
    except ValueError as error:
        known = sorted(fsspec.available_protocols())
        raise InputError(f"'{url}': unknown protocol '{protocol}'{nearest(protocol, known)}") from error
    try:
        yield store
    except InputError:
        raise
    except Exception as error:  # the libraries of stores have exceptions of their own
        raise InputError(f"cannot open '{url}': {type(error).__name__} {' '.join(str(error).split())}") from error
