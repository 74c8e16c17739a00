"""How the processes of a run hear of each other: one connection of each to process 0, and lines of JSON on it.

JAX's own coordination service is not enough here: it ends a process with a stack dump as soon as it loses process 0,
and names nobody whom one waits for. So process 0 listens at the coordinator's address with a `Server`, every process
(process 0 too) has a `Channel` to it, and JAX's service is reached through a relay on the same port. The relay of a
process keeps its end open when process 0 is gone: then the channel says so, and JAX waits in peace.

Messages of a process: `beat` (what it does), `gather`, `asked` (a signal came), `report`, `failed`, `bye`. Of the
server: `beat`, `gathered`, `report` (a request), `stop`, `leave`, `end`.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from t5x_lite.errors import InputError

LIMIT = 2**26  # bytes of a line
COMPILING = "compiling"
# Times the deadline, where all have come and still wait, or those who have not are compiling: that may just take long.
UNNAMED = 4
STATUS = 1  # of processes that end because another one is missing

Message = dict[str, Any]


def beat_interval(timeout: float) -> float:
    """Returns the seconds between two beats: often enough that a deadline is met, seldom enough to cost nothing."""
    return min(max(timeout / 20, 0.05), 5.0)


def named(indices: Sequence[int]) -> str:
    """Returns `process 1`, or `processes 1, 2 and 3`."""
    texts = [str(index) for index in sorted(indices)]
    return f"process {texts[0]}" if len(texts) == 1 else f"processes {', '.join(texts[:-1])} and {texts[-1]}"


def free_port() -> int:
    """Returns a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Clock:
    """Notices that this process itself stood still, so that it does not blame the others for the time it missed."""

    def __init__(self, interval: float):
        self._interval, self._last = interval, time.monotonic()

    def missed(self) -> float:
        """Returns the seconds by which this call is later than it should be; 0 if it is on time."""
        now = time.monotonic()
        gap, self._last = now - self._last, now
        return gap if gap > 3 * self._interval + 1 else 0.0


@dataclasses.dataclass
class _Member:
    writer: asyncio.StreamWriter
    heard: float
    moved: float
    state: Message = dataclasses.field(default_factory=dict)
    report: Message | None = None
    left: bool = False


class Server:
    """Process 0's end of all channels; lives in one event loop, so nothing here is locked.

    Args:
      count: how many processes there are.
      timeout: seconds after which whoever is missing is named.
      jax_port: where JAX's own service listens, on this machine.
    """

    def __init__(self, count: int, timeout: float, jax_port: int):
        self._count, self._timeout, self._jax_port = count, timeout, jax_port
        self._members: dict[int, _Member] = {}
        self._gathers: dict[str, dict[int, Any]] = {}
        self._began = time.monotonic()
        self._ended = self._reporting = False

    async def listen(self, port: int) -> asyncio.Server:
        """Begins to accept connections and to watch."""
        server = await asyncio.start_server(self._accept, None, port, limit=LIMIT)
        self._judge = asyncio.create_task(self._watch())
        return server

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
            hello = json.loads(await reader.readline())
            if hello.get("hello") == "jax":
                await self._relay(reader, writer)
            elif hello.get("hello") == "process":
                await self._serve(hello, reader, writer)
        writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:  # JAX's service may begin a moment later
            try:
                inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._jax_port)
                break
            except OSError:
                await asyncio.sleep(0.1)
        await _both_ways(reader, writer, inner_reader, inner_writer)

    async def _serve(self, hello: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        index, now = hello["index"], time.monotonic()
        if refusal := self._refusal(hello):
            _send(writer, _end(refusal, 2))
            # Closed first here, the connection would break under what the other writes before it reads why.
            while await reader.readline():
                pass
            return
        member = self._members[index] = _Member(writer, now, now)
        try:
            while line := await reader.readline():
                member.heard = time.monotonic()
                self._receive(index, member, json.loads(line))
        finally:
            if not member.left:
                self._end(f"process {index} has died: its connection was closed")

    def _refusal(self, hello: Message) -> str:
        if hello["count"] != self._count:
            return f"process {hello['index']} was told of {hello['count']} processes, and process 0 of {self._count}"
        if hello["index"] in self._members:
            return f"two processes were started as process {hello['index']} of {self._count}"
        return ""

    def _receive(self, index: int, member: _Member, message: Message) -> None:
        kind = message["kind"]
        if kind == "beat":
            if message["state"] != member.state:
                member.state, member.moved = message["state"], time.monotonic()
            _send(member.writer, {"kind": "beat"})
        elif kind == "gather":
            values = self._gathers.setdefault(message["name"], {})
            values[index] = message["value"]
            if len(values) == self._count:
                del self._gathers[message["name"]]
                self._tell_all(
                    {"kind": "gathered", "name": message["name"], "values": [values[i] for i in range(self._count)]}
                )
        elif kind == "asked" and not self._reporting:
            if len(self._members) < self._count:
                self._tell_all({"kind": "leave", "why": message["why"]})
                self._ended = True
            else:
                self._reporting = True
                self._tell_all({"kind": "report", "why": message["why"]})
        elif kind == "report":
            member.report = message
            self._decide(message["why"])
        elif kind == "failed":
            member.left = True
            self._end(message["line"], message["status"], patience=2.0)
        elif kind == "bye":
            member.left = True

    def _decide(self, why: str) -> None:
        """Ends all before the first step, or else at the place that the foremost process has come to."""
        reports = [member.report for member in self._members.values() if member.report]
        if len(reports) == self._count:
            if all(report["fresh"] for report in reports):
                self._tell_all({"kind": "leave", "why": why})
                self._ended = True
            else:
                self._tell_all({"kind": "stop", "at": max(report["ticks"] for report in reports)})

    def _tell_all(self, message: Message) -> None:
        for member in self._members.values():
            if not member.left:
                _send(member.writer, message)

    def _end(self, line: str, status: int = STATUS, patience: float = 0.0) -> None:
        if not self._ended:
            self._ended = True
            self._tell_all(_end(line, status, patience))

    async def _watch(self) -> None:
        interval = beat_interval(self._timeout)
        clock = _Clock(interval)
        while True:
            await asyncio.sleep(interval)
            if missed := clock.missed():
                self._began += missed
                for member in self._members.values():
                    member.heard, member.moved = member.heard + missed, member.moved + missed
            if line := self._missing(time.monotonic(), self._timeout - 2 * interval):
                self._end(line)

    def _missing(self, now: float, limit: float) -> str:
        """Returns a line about the processes that are missing; empty while none is."""
        absent = [index for index in range(self._count) if index not in self._members]
        if absent:
            late = now - self._began > limit
            return f"{named(absent)} of {self._count} did not start within {self._timeout:g} seconds" if late else ""
        there = {index: member for index, member in self._members.items() if not member.left}
        silent = [index for index, member in there.items() if now - member.heard > limit]
        if silent:
            return (
                f"{named(silent)} of {self._count} did not answer for {self._timeout:g} seconds: stopped, or out of"
                " reach"
            )
        waiting = {index for index, member in there.items() if member.state.get("waiting")}
        if not waiting or any(now - member.moved <= limit for member in there.values()):
            return ""
        ticks = {index: there[index].state["ticks"] for index in there}
        behind = [index for index in there if index not in waiting or ticks[index] < max(ticks.values())]
        compiling = all(there[index].state["doing"] == COMPILING for index in behind)
        if compiling and any(now - member.moved <= limit * UNNAMED for member in there.values()):
            return ""
        if behind:
            doing = " / ".join(sorted({there[index].state["doing"] for index in behind}))
            others = there[min(waiting)].state["doing"]
            seconds = self._timeout * (UNNAMED if compiling else 1)
            return (
                f"{named(behind)} of {self._count} did not come to what the others wait for ({others}) within"
                f" {seconds:g} seconds: still at '{doing}'"
            )
        doing = " / ".join(sorted({member.state["doing"] for member in there.values()}))
        seconds = self._timeout * UNNAMED
        return f"all {self._count} processes have waited for {seconds:g} seconds and none is missing: {doing}"


class Channel:
    """A process's connection to process 0, in a thread of its own.

    Args:
      host, port: of process 0; process 0 itself listens there.
      index, count: which process this is, and of how many.
      timeout: seconds after which whoever is missing is named.
      state: returns what this process does: `ticks`, `doing`, `waiting`.
      hear: called, in the thread, with `report`, `stop`, `leave` and `end` messages.

    Raises:
      InputError: process 0 cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        index: int,
        count: int,
        timeout: float,
        state: Callable[[], Message],
        hear: Callable[[Message], None],
    ):
        self._host, self._port, self._index, self._count = host, port, index, count
        self._timeout, self._state, self._hear = timeout, state, hear
        self._gathered: dict[str, tuple[threading.Event, list[Any]]] = {}
        self._outbox: asyncio.Queue[Message]
        self._listening = threading.Event()
        self._closed = False
        self._refused: OSError | None = None
        self._kept: list[asyncio.StreamWriter] = []
        self.jax_address = f"127.0.0.1:{free_port()}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="channel")
        self._thread.start()
        self._listening.wait()
        if self._refused:
            raise InputError(
                f"process 0 cannot listen at port {port}, where the others look for it: {self._refused.strerror}"
            )

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns the values that all processes give under this name, in their order; waits for all of them."""
        done, values = self._gathered.setdefault(name, (threading.Event(), []))
        self.send({"kind": "gather", "name": name, "value": value})
        done.wait()
        del self._gathered[name]
        return values

    def send(self, message: Message) -> None:
        """Sends a message soon."""
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, message)

    def close(self) -> None:
        """Says good-bye; process 0 stays until all others have gone, for a while."""
        self._closed = True
        self.send({"kind": "bye"})
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except asyncio.CancelledError:
            pass
        except Exception as error:  # nobody would watch any longer, nor be heard
            self._hear(_end(f"the channel of process {self._index} failed: {type(error).__name__}: {error}"))

    async def _main(self) -> None:
        self._outbox = asyncio.Queue()
        local = int(self.jax_address.rpartition(":")[2])
        try:
            if self._index == 0:
                self._server = Server(self._count, self._timeout, local)
                self._listener = await self._server.listen(self._port)
            else:
                self._listener = await asyncio.start_server(self._relay, "127.0.0.1", local)
        except OSError as error:
            self._refused = error
            return
        finally:
            self._listening.set()
        reader, writer = await self._connect()
        _send(writer, {"hello": "process", "index": self._index, "count": self._count})
        self._heard = time.monotonic()
        tasks = [asyncio.create_task(part) for part in (self._beat(), self._write(writer), self._read(reader))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if self._index == 0 and self._closed:
            deadline = time.monotonic() + 4.0
            while time.monotonic() < deadline and not all(m.left for m in self._server._members.values()):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.05)
        for task in tasks:
            if task.done() and (error := task.exception()):
                raise error
            task.cancel()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        began, interval = time.monotonic(), beat_interval(self._timeout)
        while True:
            try:
                host = "127.0.0.1" if self._index == 0 else self._host
                return await asyncio.wait_for(
                    asyncio.open_connection(host, self._port, limit=LIMIT), max(self._timeout / 4, 1.0)
                )
            except (OSError, TimeoutError):
                if time.monotonic() - began > self._timeout - 2 * interval:
                    self._end(f"process 0 of {self._count} could not be reached at {self._host}:{self._port} for")
                    await asyncio.sleep(3600)
                await asyncio.sleep(min(interval, 0.5))

    def _end(self, what: str) -> None:
        self._hear(_end(f"{what} {self._timeout:g} seconds"))

    async def _beat(self) -> None:
        interval = beat_interval(self._timeout)
        clock = _Clock(interval)
        while True:
            self._outbox.put_nowait({"kind": "beat", "state": self._state()})
            await asyncio.sleep(interval)
            self._heard += clock.missed()
            if time.monotonic() - self._heard > self._timeout - 2 * interval:
                self._end(f"process 0 of {self._count} did not answer for")

    async def _write(self, writer: asyncio.StreamWriter) -> None:
        while True:
            message = await self._outbox.get()
            _send(writer, message)
            if message["kind"] in ("bye", "failed"):
                await writer.drain()
            if message["kind"] == "bye":
                return

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                message = json.loads(line)
                self._heard = time.monotonic()
                if message["kind"] == "gathered":
                    done, values = self._gathered[message["name"]]
                    values[:] = message["values"]
                    done.set()
                elif message["kind"] != "beat":
                    self._hear(message)
        if not self._closed:
            self._hear(_end(f"process 0 of {self._count} has died: its connection was closed"))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
            _send(there_writer, {"hello": "jax"})
            back = asyncio.create_task(_copy(there_reader, writer))
            await _copy(reader, there_writer)
            there_writer.close()
            back.cancel()
        self._kept.append(writer)  # not closed when process 0 is gone: see above


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


async def _both_ways(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    other_reader: asyncio.StreamReader,
    other_writer: asyncio.StreamWriter,
) -> None:
    there, back = asyncio.create_task(_copy(reader, other_writer)), asyncio.create_task(_copy(other_reader, writer))
    await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
    there.cancel()
    back.cancel()
    other_writer.close()


def _end(line: str, status: int = STATUS, patience: float = 0.0) -> Message:
    return {"kind": "end", "line": line, "status": status, "patience": patience}


def _send(writer: asyncio.StreamWriter, message: Message) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # whoever is gone is noticed by whoever reads
        writer.write(json.dumps(message).encode() + b"\n")
