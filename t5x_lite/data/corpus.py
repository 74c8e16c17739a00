"""The embedded corpus: docstrings and comments of the running Python's standard library.

It costs no download, is at hand wherever the package runs, and is real English prose about a few hundred subjects. Its
content differs a little between Python versions, so figures measured on it name the version.
"""

import ast
import functools
import importlib.util
import itertools
import os
import sysconfig
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

from t5x_lite.errors import InputError

Kind = Literal["docstring", "comment"]

_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_SHORTEST = 20  # characters; below it a comment is a label, not prose


class Document(NamedTuple):
    """One docstring, or one block of consecutive comment lines, as a single line of text.

    `text` has every run of whitespace squeezed into one space; `kind` says where it came from; `package` is the
    top-level package or module (`asyncio`), `module` the dotted module (`asyncio.base_events`).
    """

    text: str
    kind: Kind
    package: str
    module: str


def stdlib_documents() -> Iterator[Document]:
    """Returns the documents of the standard library, in sorted order of file and then by line; exact repeats dropped.

    Test directories, installed packages and files that do not parse are left out. The first call reads and parses the
    library (seconds); the result is kept for the life of the process (some 2.6 million characters).

    Raises:
        InputError: if this Python carries no sources of its standard library.
    """
    return iter(_read_stdlib())


@functools.cache
def _read_stdlib() -> tuple[Document, ...]:
    root = sysconfig.get_path("stdlib")
    documents: dict[str, Document] = {}
    for path in _source_files(root):
        parts = os.path.relpath(path, root).removesuffix(".py").removesuffix("__init__").rstrip(os.sep).split(os.sep)
        for text, kind in _passages(path):
            documents.setdefault(text, Document(text, kind, parts[0], ".".join(parts)))
    if not documents:
        raise InputError(f"no sources of the standard library in '{root}'; give data.path a file instead of 'stdlib'")
    return tuple(documents.values())


def _source_files(root: str) -> list[str]:
    files = []
    for directory, subdirectories, names in os.walk(root):
        # What is not an identifier cannot be imported, so it is no package (`lib-dynload`, `config-3.11-...`).
        subdirectories[:] = [d for d in subdirectories if d.isidentifier() and d not in _SKIPPED_DIRECTORIES]
        files += [os.path.join(directory, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _passages(path: str) -> list[tuple[str, Kind]]:
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = importlib.util.decode_source(file.read())
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # ValueError: bytes that are not in the declared encoding, or a NUL
        return []
    found: list[tuple[int, str, Kind]] = []
    in_string: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node, clean=False):
                found.append((node.body[0].lineno, docstring, "docstring"))
        elif isinstance(node, ast.Constant):
            in_string.update(range(node.lineno + 1, (node.end_lineno or 0) + 1))
    found += _comment_blocks(source, in_string)
    passages: list[tuple[str, Kind]] = []
    for _, text, kind in sorted(found, key=lambda item: item[0]):
        squeezed = " ".join(text.split())
        if len(squeezed) >= _SHORTEST and any(map(str.isalpha, squeezed)):
            passages.append((squeezed, kind))
    return passages


def _comment_blocks(source: str, in_string: set[int]) -> Iterator[tuple[int, str, Kind]]:
    """Yields the first line number, the text and the kind of each run of comment lines, `in_string` lines excepted.

    No `tokenize`, which is slow: outside a string, a line that starts with `#` is a comment.
    """
    # Not splitlines(): it also breaks at form feeds, which the parser does not count as lines.
    lines = [(number, line.strip()) for number, line in enumerate(source.split("\n"), 1)]
    runs = itertools.groupby(lines, key=lambda item: item[1].startswith("#") and item[0] not in in_string)
    for is_comment, run in runs:
        if not is_comment:
            continue
        block = list(run)
        bodies = [line.lstrip("#:").strip() for _, line in block if not line.startswith("#!")]
        text = " ".join(body for body in bodies if any(map(str.isalnum, body)))
        if text:
            yield block[0][0], text, "comment"
