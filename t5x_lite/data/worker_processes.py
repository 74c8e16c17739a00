"""Python processes that each do one piece of work after another.

They are started as programs of their own, not forked (threads of JAX or of a tokenizer may hold locks) and not by
`multiprocessing`, which would run the user's script a second time in each of them.
"""

import contextlib
import functools
import io
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from t5x_lite.errors import InputError

_LENGTH = 8  # bytes, of the pickled work that opens a process's input
# One thread in each: the processes are as many as the cores.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class NotPortable(Exception):
    """Work that another process cannot do, because it cannot import what the work is made of."""


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def pickled(work: object) -> bytes:
    """Returns `work` pickled; raises NotPortable where it holds something that has no name in an importable module."""
    stream = io.BytesIO()
    if not sys.executable:
        raise NotPortable("this program has no Python interpreter of its own to start")
    try:
        _Pickler(stream).dump(work)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise NotPortable(" ".join(str(error).split())) from error
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | type(pickled)) and obj.__module__ == "__main__":
            raise pickle.PicklingError(f"{obj.__qualname__} is defined in the program itself, not in a module")
        return NotImplemented


def run(work: Callable[[int], int], pieces: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """Yields (piece, work(piece)) as they are done; the processes end with the iterator, or with this process.

    Args:
        work: something that can be pickled; it runs with its stdout sent to stderr.
        pieces: what to call it with.
        count: the number of processes.

    Raises:
        NotPortable: before any work is done, as `pickled`.
        InputError, OSError: as raised by `work`.
        RuntimeError: another exception of `work`, with its traceback as a note; or a process that died.
    """
    payload = pickled(work)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for piece in pieces:
        todo.put(piece)
    results: queue.SimpleQueue[tuple[int, int] | BaseException] = queue.SimpleQueue()
    with contextlib.ExitStack() as ending:
        for _ in range(min(count, len(pieces))):
            process = _start()
            ending.callback(_end, process)
            thread = threading.Thread(target=_feed, args=(process, payload, todo, results), daemon=True)
            thread.start()
            ending.callback(thread.join)
            ending.callback(process.kill)
        for _ in pieces:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result


def _start() -> subprocess.Popen[bytes]:
    # The search path of this process, with nothing put before it (-P), so that the same modules are found.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not yet written to a dead process
            cast(BinaryIO, stream).close()


def _feed(
    process: subprocess.Popen[bytes],
    payload: bytes,
    todo: queue.SimpleQueue[int],
    results: queue.SimpleQueue[tuple[int, int] | BaseException],
) -> None:
    """Gives a process one piece after another, until none is left."""
    stdin, stdout = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)

    def ask(message: bytes) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # the answer is then empty too
            stdin.write(message)
            stdin.flush()
        answer = stdout.readline()
        return json.loads(answer) if answer else {"kind": "died"}

    answer = ask(len(payload).to_bytes(_LENGTH, "little") + payload)
    while "kind" not in answer:
        try:
            piece = todo.get_nowait()
        except queue.Empty:
            return
        answer = ask(f"{piece}\n".encode())
        if "kind" not in answer:
            results.put((piece, answer["result"]))
    results.put(_error(process, answer))


def _error(process: subprocess.Popen[bytes], answer: dict[str, Any]) -> BaseException:
    if answer["kind"] == "died":
        status = process.wait()
        how = f"by signal {-status}, perhaps for want of memory" if status < 0 else f"with status {status}"
        return RuntimeError(f"a worker process was ended {how}; what it had completed is kept: run again")
    if answer["kind"] == "NotPortable":
        return NotPortable(answer["message"])
    if answer["kind"] == "InputError":
        return InputError(answer["message"])
    if answer["kind"] == "OSError":
        return OSError(*answer["arguments"])
    error = RuntimeError(answer["message"])
    error.add_note(answer["traceback"])
    return error


def serve() -> None:
    """The program of a process: reads the pickled work and then numbers of pieces, and answers with lines of JSON."""
    # The terminal's Ctrl-C reaches the whole group; the process that started this one decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the work prints would otherwise stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    stdin = sys.stdin.buffer
    payload = stdin.read(int.from_bytes(stdin.read(_LENGTH), "little"))
    try:
        work = pickle.loads(payload)
    except Exception as error:
        answer(kind="NotPortable", message=f"{type(error).__name__}: {error}")
        return
    answer(ready=True)
    pieces: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=functools.partial(_receive, stdin, pieces), daemon=True).start()
    while True:
        piece = pieces.get()
        try:
            answer(result=work(piece))
        except InputError as error:
            answer(kind="InputError", message=str(error))
        except BaseException as error:
            if isinstance(error, OSError) and error.errno is not None:
                answer(kind="OSError", arguments=[error.errno, error.strerror, error.filename and str(error.filename)])
                continue
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            answer(kind="other", message=message, traceback=traceback.format_exc())


def _receive(stdin: BinaryIO, pieces: queue.SimpleQueue[int]) -> None:
    """Hands on the numbers; ends this process when the one that started it has closed its end, or has ended."""
    for line in stdin:
        pieces.put(int(line))
    os._exit(0)
