"""Inference over files: a record for every line, also for one that fails, in shards that survive a `kill -9`.

A shard is written to a partial file, synced and renamed, so one that is there is complete. What it says depends on the
input, the model, its draft and the settings (sampling on the number of the line), up to rounding, which differs between
batches. `manifest.json` beside the shards says what these are: once there is a shard, the same command goes on behind
the last, and any other is refused. An error that is not about a line, since a whole batch has it, ends the run before
it becomes a record.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_lite.data.lines import Line, LineFile
from t5x_lite.errors import InputError
from t5x_lite.language_model import LanguageModel

Record = dict[str, Any]

_FORMAT = "t5x_lite batch inference 1"
_MANIFEST, _LOCK, _PARTIAL = "manifest.json", ".lock", ".partial"


class Observer:
    """Hears how it goes; every method may be left as it is."""

    def note(self, text: str) -> None:
        """Hears a line for the user."""

    def failed(self, line: int, reason: str) -> None:
        """Hears which line failed and why."""

    def progress(self, done: int, total: int) -> None:
        """Hears how many lines are done."""


def generate_records(
    lm: LanguageModel,
    lines: Sequence[Line],
    batch_size: int,
    settings: Mapping[str, Any],
    draft: LanguageModel | None = None,
    progress: Callable[[int], None] = lambda lines: None,
    *,
    first_row: int = 1,
) -> list[Record]:
    """Generates an answer to every line.

    Args:
      lm: the model.
      lines: each with one value, the text.
      batch_size: lines that are decoded together.
      settings: fields of `GenerationConfig`.
      draft: as for `LanguageModel.generate`.
      progress: hears how many more lines are done.
      first_row: the row of `LanguageModel.generate` whose samples line 1 gets, the next for line 2, and so on.

    Returns:
      A record a line: `line` and `input` with `output`, `score` (nats, None if it is not finite) and `num_tokens`, or,
      where there are several answers, with the lists `outputs`, `scores` and `num_tokens`. A line that failed has
      `line` and `error` alone.

    Raises:
      Exception: every line, or every line of a batch of several, failed with it, so it is not about the lines.
    """

    def refusal(line: Line) -> str:
        try:
            lm.check_input(line.values[0], draft=draft, **settings)
        except InputError as error:
            return _reason(error)
        return ""

    def work(part: Sequence[Line]) -> list[Record]:
        texts, rows = [line.values[0] for line in part], [line.number - 1 + first_row for line in part]
        answers = lm.generate_scored(texts, batch_size=batch_size, row_ids=rows, draft=draft, **settings)
        return [_answered(line, several) for line, several in zip(part, answers, strict=True)]

    checked = [line if line.error else dataclasses.replace(line, error=refusal(line)) for line in lines]
    return _records(checked, batch_size, work, progress=progress)


def score_records(lm: LanguageModel, lines: Sequence[Line], batch_size: int) -> list[Record]:
    """Scores every line.

    Args:
      lm: the model.
      lines: each with two values, input and target.
      batch_size: lines that are scored together.

    Returns:
      A record a line: `line` and what `scored` returns. A line that failed has `line` and `error` alone.

    Raises:
      Exception: every line, or every line of a batch of several, failed with it, so it is not about the lines.
    """

    def work(part: Sequence[Line]) -> list[Record]:
        scores = lm.score([line.values[0] for line in part], [line.values[1] for line in part], batch_size=batch_size)
        numbers = zip(scores.log_likelihood.tolist(), scores.num_tokens.tolist(), strict=True)
        return [{"line": line.number, **scored(*pair)} for line, pair in zip(part, numbers, strict=True)]

    return _records(lines, batch_size, work, may_refuse=True)


def _answered(line: Line, answers: Sequence[Any]) -> Record:
    head = {"line": line.number, "input": line.values[0]}
    texts, scores, counts = zip(*answers, strict=True)
    scores = tuple(score if math.isfinite(score) else None for score in scores)
    if len(answers) == 1:
        return {**head, "output": texts[0], "score": scores[0], "num_tokens": counts[0]}
    return {**head, "outputs": texts, "scores": scores, "num_tokens": counts}


def scored(log_likelihood: float, num_tokens: int) -> Record:
    """Returns both with the perplexity: exp of the nats per token, None for no token.

    A log-likelihood that is not finite is None, for JSON has no such number, and so is its perplexity.
    """
    if not math.isfinite(log_likelihood):
        return {"log_likelihood": None, "num_tokens": num_tokens, "perplexity": None}
    perplexity = math.exp(min(-log_likelihood / num_tokens, 700.0)) if num_tokens else None  # e ** 710 is no float
    return {"log_likelihood": log_likelihood, "num_tokens": num_tokens, "perplexity": perplexity}


def _records(
    lines: Sequence[Line],
    batch_size: int,
    work: Callable[[Sequence[Line]], list[Record]],
    *,
    may_refuse: bool = False,
    progress: Callable[[int], None] = lambda lines: None,
) -> list[Record]:
    """Returns a record a line, in their order; of a batch that fails the lines are tried one by one.

    What fails for every line, or for every line of a batch of several, is not a line's fault, and neither is an
    InputError of work that may refuse none.
    """
    records = {line.number: {"line": line.number, "error": line.error} for line in lines if line.error}
    progress(len(records))
    # Lines of like length in one batch have the least padding.
    good = sorted((line for line in lines if not line.error), key=lambda line: sum(map(len, line.values)))
    failures = []

    def alone(line: Line) -> Record:
        try:
            return work([line])[0]
        except Exception as error:
            if not isinstance(error, InputError):
                failures.append(error)
            return {"line": line.number, "error": _reason(error)}

    for start in range(0, len(good), batch_size):
        part = good[start : start + batch_size]
        try:
            results = work(part)
        except Exception as error:
            if isinstance(error, InputError) and not may_refuse:
                raise
            before = len(failures)
            results = [alone(line) for line in part]
            if len(failures) - before == len(part) > 1:
                raise failures[-1] from None
        records |= {record["line"]: record for record in results}
        progress(len(part))
    if len(failures) == len(good) > 1:
        raise failures[-1]
    return [records[line.number] for line in lines]


def _reason(error: Exception) -> str:
    line = " ".join(str(error).split())[:500].encode("utf-8", "backslashreplace").decode()
    return line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"


class Output:
    """Where the records of a file go: `FILE.jsonl`, whose shards are in `FILE.jsonl.parts/` until all are there, or a
    directory of shards, `part-00000.jsonl` and so on.

    Attributes:
      file: None for a directory.
      folder: of the shards.
    """

    def __init__(self, path: str) -> None:
        """Raises InputError for a path of another kind, and for one that holds something else."""
        given = Path(path).expanduser()
        self.name = path
        if path.endswith("/") or given.is_dir():
            self.file, self.folder = None, given
        elif given.suffix == ".jsonl":
            self.file, self.folder = given, given.with_name(f"{given.name}.parts")
        else:
            raise InputError(f"output '{path}' must end in .jsonl, or in / for a directory of shards")
        begun = (self.folder / _MANIFEST).exists()
        if self.file and self.file.exists() and not begun:
            raise InputError(f"output {path} exists already; give another")
        try:
            others = [p.name for p in self.folder.iterdir()] if self.folder.exists() else []
        except OSError as error:
            raise InputError(f"output {self.folder} cannot be a directory of shards: {error.strerror}") from None
        if not begun and any(name != _LOCK and not name.endswith(_PARTIAL) for name in others):
            raise InputError(f"output {self.folder} holds something else ({min(others)}); give another")

    def shard(self, number: int) -> Path:
        """Returns the path of a shard."""
        return self.folder / f"part-{number:05}.jsonl"

    def shards(self) -> list[Path]:
        """Returns the shards that are there, of which none is left out."""
        paths: list[Path] = []
        while (path := self.shard(len(paths))).exists():
            paths.append(path)
        return paths

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing there; one that is killed lets go.

        Raises:
          InputError: another process writes there, or the directory cannot be made.
        """
        import fcntl

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / _LOCK).open("w")
        except OSError as error:
            raise InputError(f"output {self.folder} cannot be a directory of shards: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing output {self.name}") from None
            yield

    def begin(self, manifest: Record) -> Record:
        """Writes the manifest or, where records were written under one, returns that after comparing what decides
        about them.

        Raises:
          InputError: something differs; the message names it.
        """
        path = self.folder / _MANIFEST
        if not path.exists():
            return self._write_manifest(manifest)
        try:
            old = json.loads(path.read_text())
            if old["format"] != _FORMAT:
                raise ValueError
            same_input = old["input"]["sha256"] == manifest["input"]["sha256"]
            same_model = old["model"]["fingerprint"] == manifest["model"]["fingerprint"]
            settings = dict(old["settings"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is not a manifest of this version; give another output") from None
        if "result" not in old and not any(self.folder.glob("part-*.jsonl")):
            return self._write_manifest(manifest)
        begun = f"output {self.name} was begun with"
        if not same_input:
            raise InputError(f"{begun} another input ({old['input']['path']}); give another output")
        for key, value in json.loads(json.dumps(manifest["settings"])).items():
            if settings.get(key) != value:
                raise InputError(f"{begun} {key} {json.dumps(settings.get(key))}, not {json.dumps(value)}")
        if not same_model:
            raise InputError(f"{begun} another model ({old['model']['path']}); give another output")
        return old

    def joined(self, manifest: Record) -> Path | None:
        """Returns the file if it is there, and removes its shards; raises InputError if something else is there."""
        if self.file is None or not self.file.exists():
            return None
        if manifest.get("result") != _sha256([self.file]):
            raise InputError(f"output {self.name} exists already and is not what was written there; give another")
        self._remove_shards()
        return self.file

    def join(self, manifest: Record) -> None:
        """Makes the file of its shards."""
        assert self.file is not None
        shards = self.shards()
        # First the manifest, so that the file is known from the moment that it is there.
        self._write_manifest({**manifest, "result": _sha256(shards)})
        if self.file.exists():
            raise InputError(f"output {self.name} exists already; its records are in {self.folder}")
        _write(self.file, (block for path in shards for block in _blocks(path)), self.folder)
        self._remove_shards()

    def _write_manifest(self, manifest: Record) -> Record:
        _write(self.folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
        return manifest

    def _remove_shards(self) -> None:
        for path in reversed(self.shards()):  # those that are left, if this is cut short, begin with the first
            path.unlink()


def generate_file(
    lm: LanguageModel,
    source: LineFile,
    output: Output,
    *,
    described: Mapping[str, Any],
    settings: Mapping[str, Any],
    batch_size: int = 32,
    shard_size: int = 1000,
    draft: LanguageModel | None = None,
    observer: Observer | None = None,
) -> tuple[int, int]:
    """Generates an answer to every line of a file, or goes on with that where it was cut short.

    Args:
      lm: the model.
      source: the file, of one column.
      output: where the records of `generate_records` go, as JSON, one a line.
      described: what else decides about the records and has to be the same when this is continued, such as dtype, with
        the `path` of the model, which may change.
      settings: fields of `GenerationConfig`.
      batch_size: lines that are decoded together. It may change, though rounding differs between batches.
      shard_size: lines of the file that make a shard.
      draft: as for `LanguageModel.generate`.
      observer: hears how it goes.

    Returns:
      How many lines failed, and how many there are.

    Raises:
      InputError: the output is another input's, model's or setting's, or not of this kind.
    """
    observer = observer or Observer()
    for name, value in {"batch_size": batch_size, "shard_size": shard_size}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    config = dataclasses.asdict(lm.generation_config(**settings))
    rest = {key: value for key, value in described.items() if key != "path"}
    manifest = {
        "format": _FORMAT,
        "input": {"path": str(source.path), "sha256": source.sha256, "lines": source.count},
        "model": {"path": described.get("path"), "fingerprint": fingerprint(lm)},
        "settings": {**config, **rest, "draft": draft and fingerprint(draft), "shard_size": shard_size},
    }
    with output.lock():
        manifest = output.begin(manifest)
        if file := output.joined(manifest):
            observer.note(f"output {output.name} is complete already")
            return _count_failures([file])
        total = math.ceil(source.count / shard_size)
        done = len(output.shards())
        finished = min(done * shard_size, source.count)
        if done == total and not output.file:
            observer.note(f"output {output.name} is complete already")
        elif done:
            observer.note(f"output {output.name} is continued after {finished} of {source.count} lines")
        lines = source.read(finished)

        def progress(count: int) -> None:
            nonlocal finished
            finished += count
            observer.progress(finished, source.count)

        for number in range(done, total):
            part = list(islice(lines, shard_size))
            records = generate_records(lm, part, batch_size, settings, draft, progress)
            _write(output.shard(number), "".join(map(_line, records)).encode())
            for record in records:
                if "error" in record:
                    observer.failed(record["line"], record["error"])
        if output.file:
            output.join(manifest)
        return _count_failures([output.file] if output.file else output.shards())


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _count_failures(paths: Sequence[Path]) -> tuple[int, int]:
    failed = count = 0
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    failed += "error" in json.loads(line)
                except ValueError:
                    raise InputError(f"{path} is damaged; remove it and run again") from None
                count += 1
    return failed, count


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, content: bytes | Iterable[bytes], folder: Path | None = None) -> None:
    """Writes a file completely or not at all, by way of a partial one beside it or in `folder`."""
    partial = (folder or path.parent) / (path.name + _PARTIAL)
    with partial.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    # The name, too, is on the disk only when its directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def fingerprint(lm: LanguageModel) -> str:
    """Returns a digest of a model, wherever it was loaded from: its configuration, its tokens, and a sample of
    every parameter.
    """
    digest = hashlib.sha256(repr(lm.config).encode())
    if lm.tokenizer:
        digest.update(
            lm.tokenizer.decode(i for i in range(lm.tokenizer.vocab_size) if i != lm.tokenizer.eos_id).encode()
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params):
        # Eight to fifteen places along every axis, so that a parameter is neither copied nor gathered.
        sample = leaf[tuple(slice(None, None, max(1, size // 8)) for size in leaf.shape)]
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(sample).tobytes())
    return digest.hexdigest()
