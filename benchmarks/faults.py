"""Random faults over training runs: each continues bitwise, or stops with one line and then continues bitwise.

    python benchmarks/faults.py --runs 14 --seed 0 --results benchmarks/results/faults.jsonl

A run trains a tiny model, in one process or in two, and is disturbed several times at steps drawn from the seed. After
each fault that ends it, its cause is removed and the same command is given again. In the end its losses and
evaluations have to equal, bit for bit, those of a run of the same layout that nothing disturbed; and no checkpoint that
was there before a fault may be gone after it. One JSON line a fault; the status is 1 if any of them came out otherwise.

A full disk needs the right to mount a small file system, else a limit on file sizes takes its place. The clock that
jumps is Python's: its `time.time` is shifted in the running processes.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 3, 8
TIMEOUT = 20  # seconds that a process may be missing
PATIENCE = 300.0  # seconds after which this program gives up on a run
SETTINGS = (
    "model=t5-v1.1-small",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.num_heads=4",
    "model.head_dim=8",
    "model.num_encoder_layers=1",
    "model.num_decoder_layers=1",
    "tokenizer=bytes",
    "train.batch_size=8",
    "train.input_length=32",
    f"train.steps={STEPS}",
    "train.log_every=1",
    f"train.checkpoint_every={SAVE_EVERY}",
    f"train.eval_every={EVALUATE_EVERY}",
    "train.eval_batches=2",
    "optimizer.warmup_steps=100",
    f"distributed.timeout={TIMEOUT}",
)
CLOCK = """
import os, time
_seconds, _nanoseconds = time.time, time.time_ns
def _shift():
    try:
        return int(open(os.environ["FAULTS_CLOCK"]).read())
    except (OSError, ValueError):
        return 0
time.time = lambda: _seconds() + _shift()
time.time_ns = lambda: _nanoseconds() + 10**9 * _shift()
"""
UGLY = ("Traceback (most recent call last)", "Check failure", "Fatal Python error", "core dumped")


class Wrong(Exception):
    """A fault came out otherwise than it should; the message says how."""


def corpus(path: Path) -> None:
    """Writes 1,500 sentences of invented words."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(400)]
    lines = [
        " ".join(words[int(400 * rng.random() ** 3)] for _ in range(rng.randint(5, 11))) + "." for _ in range(1500)
    ]
    path.write_text("\n".join(lines) + "\n")


@dataclasses.dataclass
class Run:
    """A run, disturbed or not.

    Attributes:
      folder: where its files are; `run` in it is the run directory.
      count: of processes.
      started: the processes of the latest start.
      line: what the latest start said when it stopped.
    """

    folder: Path
    count: int
    started: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)
    starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.out, self.data, self.clock = self.folder / "run", self.folder / "text.txt", self.folder / "clock"
        self.cache = self.folder / "cache"
        corpus(self.data)
        self.clock.write_text("+0\n")

    def environment(self) -> dict[str, str]:
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "T5X_LITE_CACHE": str(self.cache)}
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.get("XLA_FLAGS", ""))
        env["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=1".strip()
        env["FAULTS_CLOCK"] = str(self.clock)
        (self.folder / "site").mkdir(exist_ok=True)
        (self.folder / "site" / "sitecustomize.py").write_text(CLOCK)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.folder / "site"), env.get("PYTHONPATH"))))
        return env

    def start(self) -> None:
        """Gives the command, once for each process."""
        self.starts += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.started = []
        for index in range(self.count):
            command = [
                sys.executable,
                "-m",
                "t5x_lite",
                "train",
                *SETTINGS,
                f"data.path={self.data}",
                f"out={self.out}",
            ]
            if self.count > 1:
                command += [f"distributed.coordinator=127.0.0.1:{port}", f"distributed.num_processes={self.count}"]
                command += [f"distributed.process_id={index}"]
            with self.log(index).open("wb") as log:
                self.started.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment()))

    def log(self, index: int) -> Path:
        return self.folder / f"start-{self.starts}-process-{index}.txt"

    def step(self) -> int:
        """Returns the last step in the metrics."""
        steps = [record["step"] for record in self.records()]
        return max(steps, default=0)

    def records(self) -> list[dict[str, Any]]:
        """Returns the whole lines of the metrics."""
        with contextlib.suppress(OSError):
            lines = (self.out / "metrics.jsonl").read_text().split("\n")[:-1]
            return [json.loads(line) for line in lines]
        return []

    def trace(self) -> dict[str, list[float]]:
        """Returns what has to be equal: loss and gradient norm of every step, and the evaluations."""
        names = ("loss", "gradient_norm", "learning_rate", "accuracy", "perplexity", "target_tokens")
        return {
            f"{record.get('split', 'train')} {record['step']}": [record[name] for name in names if name in record]
            for record in self.records()
        }

    def saved(self) -> list[int]:
        """Returns the steps of the checkpoints that are there."""
        folder = self.out / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []

    def wait_for_step(self, step: int) -> bool:
        """Waits until a step is in the metrics; returns False if the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while self.step() < step:
            if any(process.poll() is not None for process in self.started):
                return False
            if time.monotonic() > deadline:
                raise Wrong(f"step {step} was not reached within {PATIENCE:g} seconds")
            time.sleep(0.002)
        return True

    def wait_for_start(self) -> None:
        """Waits until a step is reported by the latest start: what the metrics hold before is of earlier ones."""
        deadline = time.monotonic() + PATIENCE
        while "training: step" not in self.log(0).read_text(errors="replace"):
            if any(process.poll() for process in self.started) or time.monotonic() > deadline:
                raise Wrong(f"did not start again: {[self.log(i).read_text()[-300:] for i in range(self.count)]}")
            time.sleep(0.05)

    def wait(self, skip: tuple[int, ...] = ()) -> list[int | None]:
        """Waits for the processes, but some; returns their statuses."""
        deadline = time.monotonic() + PATIENCE
        for index, process in enumerate(self.started):
            if index not in skip:
                try:
                    process.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    raise Wrong(f"process {index} did not end within {PATIENCE:g} seconds") from None
        return [process.poll() for process in self.started]

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()

    def lines(self, index: int) -> list[str]:
        """Returns what a process said when it stopped, and checks that it was no more than that."""
        text = self.log(index).read_text(errors="replace")
        ugly = [word for word in UGLY if word in text]
        if ugly:
            raise Wrong(f"process {index} printed: {text[text.index(ugly[0]) :][:2000]}")
        return [line for line in text.splitlines() if line.startswith("t5x-lite: ")]

    def resumed_from(self) -> int:
        found = re.findall(r"continuing .* from step (\d+)", self.log(0).read_text(errors="replace"))
        return int(found[-1]) if found else 0


# --- faults: each takes a run in the midst of its steps, and leaves it ended (True) or going on (False) ---------------


@dataclasses.dataclass
class Report:
    """What became of a fault: the line that the run stopped with, if it did, and whose it was."""

    ended: bool
    line: str = ""
    damaged: int | None = None  # the step of the checkpoint that the fault itself damaged


def stopped(run: Run, expected: str, statuses: tuple[int, ...], skip: tuple[int, ...] = ()) -> str:
    """Checks that all processes but some have stopped with a status and one line each; returns the line."""
    found = run.wait(skip)
    said = ""
    for index, status in enumerate(found):
        if index in skip:
            continue
        lines = run.lines(index)
        if status not in statuses:
            raise Wrong(f"process {index} ended with status {status}: {lines}")
        if len(lines) != 1:
            raise Wrong(f"process {index} said {len(lines)} lines: {lines}")
        if not re.search(expected, lines[0]):
            raise Wrong(f"process {index} said '{lines[0]}', not '{expected}'")
        said = said or lines[0]
    return said


def kill_one(run: Run, rng: random.Random) -> Report:
    victim = rng.randrange(run.count)
    run.started[victim].kill()
    line = stopped(run, f"process {victim} of {run.count} has died|process {victim} has died", (1,), (victim,))
    return Report(True, line)


def kill_all(run: Run, rng: random.Random) -> Report:
    for process in run.started:
        process.kill()
    run.wait()
    return Report(True)


def terminate(run: Run, rng: random.Random) -> Report:
    everyone = rng.random() < 0.5
    victims = range(run.count) if everyone else [rng.randrange(run.count)]
    began = time.monotonic()
    for victim in victims:
        run.started[victim].send_signal(signal.SIGTERM)
    statuses = run.wait()
    seconds = time.monotonic() - began
    if any(statuses):
        raise Wrong(f"after SIGTERM the statuses were {statuses}: {[run.lines(i) for i in range(run.count)]}")
    if seconds > 30:
        raise Wrong(f"after SIGTERM it took {seconds:.0f} seconds to end")
    if run.step() not in run.saved() and run.step() != STEPS:
        raise Wrong(f"after SIGTERM step {run.step()} was not saved, only {run.saved()}")
    return Report(True, f"saved step {run.step()} and ended with status 0 in {seconds:.1f} s")


def stop_one(run: Run, rng: random.Random) -> Report:
    victim = rng.randrange(run.count)
    run.started[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    line = stopped(run, f"process {victim} of {run.count} did not answer", (1,), (victim,))
    if time.monotonic() - began > TIMEOUT + 5:
        raise Wrong(f"process {victim} was missed after {time.monotonic() - began:.0f} seconds only")
    run.started[victim].kill()
    run.wait()
    return Report(True, line)


def pause_one(run: Run, rng: random.Random) -> Report:
    victim = rng.randrange(run.count)
    run.started[victim].send_signal(signal.SIGSTOP)
    time.sleep(2)
    run.started[victim].send_signal(signal.SIGCONT)
    return Report(False)


def _damage(run: Run, rng: random.Random, change: Callable[[Path], None]) -> Report:
    kill_all(run, rng)
    saved = run.saved()
    if len(saved) < 2:  # with a single one there is nothing to go back to, and a run says so; not what is tried here
        return Report(True)
    files = [path for path in (run.out / "checkpoints" / str(saved[-1])).rglob("*") if path.is_file()]
    change(rng.choice(sorted(path for path in files if path.stat().st_size)))
    return Report(True, damaged=saved[-1])


def truncate_checkpoint(run: Run, rng: random.Random) -> Report:
    return _damage(run, rng, lambda path: os.truncate(path, path.stat().st_size // 2))


def flip_bit(run: Run, rng: random.Random) -> Report:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return _damage(run, rng, flip)


def fill_disk(run: Run, rng: random.Random) -> Report:
    if os.path.ismount(run.out):
        ballast = run.out / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(2**12))
                file.flush()
        pattern = "No space left|disk is full|are free"
    else:
        for process in run.started:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**12, resource.RLIM_INFINITY))
        ballast, pattern = None, "File too large|disk is full"
    line = stopped(run, pattern, (1, 2))
    if ballast:
        ballast.unlink()
    return Report(True, line)


def lose_data(run: Run, rng: random.Random) -> Report:
    kill_all(run, rng)
    kept = run.folder / "elsewhere.txt"
    # Before there is a checkpoint nothing is continued: with other data it would be another run, from its start.
    truncated = rng.random() < 0.5 and bool(run.saved())
    shutil.copy2(run.data, kept)
    os.truncate(run.data, run.data.stat().st_size // 2) if truncated else run.data.unlink()
    run.start()
    line = stopped(run, "cannot be continued exactly" if truncated else "text.txt", (2,))
    shutil.move(kept, run.data)
    return Report(True, line)


def damage_token_cache(run: Run, rng: random.Random) -> Report:
    kill_all(run, rng)
    files = sorted(path for path in run.cache.rglob("*") if path.is_file() and path.stat().st_size > 64)
    victim = rng.choice(files).name
    for path in files:  # of every cache that is there: one may be of data that is no longer asked for
        if path.name == victim:
            os.truncate(path, path.stat().st_size // 2)
    run.start()
    line = stopped(run, "token cache .* is damaged", (2,))
    shutil.rmtree(run.cache)
    return Report(True, line)


def jump_clock(run: Run, rng: random.Random) -> Report:
    run.clock.write_text(f"{rng.choice((-1, 1)) * rng.randrange(3600, 10**7):+d}\n")
    return Report(False)


FAULTS: dict[str, tuple[Callable[[Run, random.Random], Report], int]] = {  # and the least number of processes
    "kill -9 of one process": (kill_one, 2),
    "kill -9 of all processes": (kill_all, 1),
    "SIGTERM": (terminate, 1),
    "SIGSTOP of one process": (stop_one, 2),
    "SIGSTOP of one process for 2 s": (pause_one, 1),
    "truncated checkpoint file": (truncate_checkpoint, 1),
    "bit-flipped checkpoint file": (flip_bit, 1),
    "full disk": (fill_disk, 1),
    "unreadable data file": (lose_data, 1),
    "truncated token cache": (damage_token_cache, 1),
    "clock jump": (jump_clock, 1),
}


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Mounts a file system of 24 MB, if that is allowed."""
    mounted = False
    if wanted:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False
        )
        mounted = done.returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=False)


def disturb(run: Run, kind: str, step: int, rng: random.Random) -> dict[str, Any]:
    """Waits for the step, commits the fault, and starts again what it ended; returns what is to be reported."""
    fault = FAULTS[kind][0]
    if not run.wait_for_step(step):
        raise Wrong(f"ended by itself before step {step}: {[run.lines(i) for i in range(run.count)]}")
    at, before, began = run.step(), run.saved(), time.monotonic()
    report = fault(run, rng)
    told = {"at_step": at, "saved_before": before, "line": report.line, "seconds": round(time.monotonic() - began, 1)}
    if not report.ended:
        return {**told, "outcome": "went on"}
    after = run.saved()
    if before and (not after or after[-1] < before[-1]):
        raise Wrong(f"checkpoints {before} were there before, and {after} after")
    run.start()
    run.wait_for_start()
    told["resumed_from"] = run.resumed_from()
    least = max([step for step in after if step != report.damaged], default=0)
    if told["resumed_from"] < least:
        raise Wrong(f"went on from step {told['resumed_from']}, though that of step {least} is there")
    return {**told, "outcome": "stopped with one line, then went on" if report.line else "ended, then went on"}


def reference(folder: Path, count: int) -> dict[str, list[float]]:
    """Returns the trace of a run that nothing disturbs."""
    run = Run(folder, count)
    run.start()
    statuses = run.wait()
    if any(statuses):
        raise SystemExit(f"the undisturbed run ended with {statuses}: {run.log(0).read_text()}")
    return run.trace()


def campaign(
    runs: int, faults: int, seed: int, kinds: list[str], folder: Path, counts: tuple[int, ...]
) -> Iterator[Any]:
    """Yields a report for each fault."""
    rng = random.Random(seed)
    references = {count: reference(folder / f"undisturbed-{count}", count) for count in counts}
    waiting: dict[int, list[str]] = {count: [] for count in counts}
    for number in range(runs):
        count = counts[number % len(counts)]
        while len(waiting[count]) < faults:  # every kind comes before any comes again
            fresh = [kind for kind in kinds if FAULTS[kind][1] <= count]
            waiting[count] += rng.sample(fresh, len(fresh))
        plan, waiting[count] = waiting[count][:faults], waiting[count][faults:]
        steps = sorted(rng.sample(range(1, STEPS - 4), faults))
        run = Run(folder / f"run-{number}", count)
        reports = []
        with small_disk(run.out, "full disk" in plan):
            try:
                run.start()
                for kind, step in zip(plan, steps, strict=True):
                    reports.append({"run": number, "processes": count, "fault": kind})
                    reports[-1] |= disturb(run, kind, step, rng)
                statuses = run.wait()
                if any(statuses):
                    raise Wrong(f"the end had statuses {statuses}: {[run.lines(i) for i in range(count)]}")
                different = [key for key, value in references[count].items() if run.trace().get(key) != value]
                if different or run.trace().keys() != references[count].keys():
                    raise Wrong(f"the trace differs: {different or run.trace().keys() ^ references[count].keys()}")
                for report in reports:
                    report["trace"] = "bitwise equal"
            except Wrong as error:
                reports[-1]["outcome"] = f"WRONG: {error}"
            finally:
                run.end()
        yield from reports


def table(reports: list[dict[str, Any]]) -> str:
    """Returns the outcomes of each kind of fault, in Markdown."""
    rows = ["| Fault | Processes | Times | Outcome |", "|---|---|---|---|"]
    groups = Counter((r["fault"], r["processes"], r["outcome"], r.get("trace", "")) for r in reports)
    for (fault, processes, outcome, trace), times in sorted(groups.items()):
        rows.append(f"| {fault} | {processes} | {times} | {outcome}{', ' * bool(trace)}{trace} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=14)
    parser.add_argument("--faults", type=int, default=4, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="commas between; by default all")
    parser.add_argument("--processes", default="1,2", help="of the runs, in turn")
    parser.add_argument("--results", type=Path, help="file for a JSON line a fault")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which are deleted otherwise")
    args = parser.parse_args()
    kinds = args.kinds.split(",") if args.kinds else list(FAULTS)
    counts = tuple(map(int, args.processes.split(",")))
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{temporary}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        reports = []
        for report in campaign(args.runs, args.faults, args.seed, kinds, args.keep or Path(temporary), counts):
            reports.append(report)
            print(json.dumps(report), flush=True)
            if args.results:
                args.results.write_text("".join(json.dumps(report) + "\n" for report in reports))
    print(table(reports), file=sys.stderr)
    wrong = [report for report in reports if report["outcome"].startswith("WRONG")]
    print(f"{len(reports)} faults, {len(wrong)} of them came out wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
