import errno
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from t5x_lite.data import cache_parts, token_cache, worker_processes
from t5x_lite.data.encoders import ChatEncoder, PairEncoder, TextEncoder
from t5x_lite.data.sources import Reading, open_source
from t5x_lite.data.token_cache import build_cache, cache_key, open_cache
from t5x_lite.data.tokenizers import ByteTokenizer, train_sentencepiece
from t5x_lite.data.tokens import text_hashes, tokenizer_identity
from t5x_lite.errors import InputError

# What the processes import: a source whose part i has texts "i.0", "i.1", ..., and preprocessors that do harm.
MODULE = """
import dataclasses, errno, os, pathlib, signal, sys, time
from t5x_lite.errors import InputError

@dataclasses.dataclass(frozen=True)
class Reading:
    on_error: str = "raise"

@dataclasses.dataclass(frozen=True)
class Numbers:
    parts: tuple = (3, 1, 0, 1500, 2)
    log: str = ""  # a directory, where a file says that a part was read
    seconds: float = 0.0  # that each part takes
    reading: Reading = Reading()
    spec = "numbers"

    @property
    def identity(self):
        return f"numbers {self.parts}"

    def read(self, index, on_skip, columns):
        if self.log:
            (pathlib.Path(self.log) / f"{index}.{os.getpid()}").touch()
        time.sleep(self.seconds)
        for n in range(self.parts[index]):
            yield f"part{index}:{n}", {"text": f"{index}.{n} " + "é" * (n % 7)}

class Bad(Numbers):
    def read(self, index, on_skip, columns):
        for n, (where, record) in enumerate(super().read(index, on_skip, columns)):
            if n % 3 == 1:
                on_skip(where, "is malformed")
            else:
                yield where, {} if n % 3 == 2 else record

def shout(record):
    print(record["text"])
    return record

def refuse(record):
    if record["text"].startswith("3.7 "):
        raise InputError("3.7 is refused")
    return record

def fail(record):
    if record["text"].startswith("3.7 "):
        raise BaseException("nobody expects this")
    return record

def fill_the_disk(record):
    if record["text"].startswith("3."):
        raise OSError(errno.ENOSPC, "No space left on device", "tokens.bin")
    return record

def die(record):
    if record["text"].startswith("3.") and "serve" in sys.orig_argv[-1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return record
"""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    (folder / "cached_numbers.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("cached_numbers")
    sys.path.remove(str(folder))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def program(tmp_path, numbers, text):
    """Starts a program, a script without a main guard, in a process group of its own."""
    script = tmp_path / "script.py"
    top = f"import sys\nsys.path.insert(0, {os.path.dirname(numbers.__file__)!r})\n"
    script.write_text(top + textwrap.dedent(text))
    command = [sys.executable, str(script)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cache_holds_what_the_encoder_gives(tmp_path, numbers):
    source, tokenizer, calls = numbers.Numbers(), ByteTokenizer(), []
    encoder = TextEncoder(tokenizer)
    cache = build_cache(source, encoder, tmp_path, workers=1, progress=lambda *told: calls.append(told))
    texts = [r["text"] for part in range(5) for _, r in source.read(part, None, ())]
    ids = [tokenizer.encode(text) for text in texts]
    tokens = cache.features["tokens"]
    assert len(cache) == len(tokens) == 1506
    assert [tokens[n].tolist() for n in range(1506)] == ids
    assert (tokens.flat.dtype, tokens.offsets.dtype) == (np.uint16, np.int64)
    assert (cache.keys.dtype, cache.sizes.dtype) == (np.uint64, np.int64)
    assert cache.keys.tolist() == text_hashes(texts).tolist()
    assert cache.sizes.tolist() == [len(text) for text in texts]
    assert not tokens.flat.flags.writeable
    total = sum(map(len, ids))
    assert calls[0] == (0, 5, 0)
    assert calls[-1] == (5, 5, total)
    assert len(calls) == 6
    assert (cache.skipped, cache.reasons) == (0, ())
    assert (cache.source, cache.encoder) == (source.identity, encoder.identity)
    assert cache.directory == tmp_path / cache_key(source, encoder)
    assert sorted(os.listdir(tmp_path)) == [cache.directory.name, f"{cache.directory.name}.lock"]


def test_long_and_short_texts_are_written_alike(tmp_path):
    tokenizer = train_sentencepiece(["a b c d e f g h"] * 9, tmp_path / "m.model", 20, extra_ids=2)
    texts = [*(f"a b {'c ' * n}" for n in range(1000)), *["d e"] * 1000]  # a batch of each
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    cache = build_cache(open_source(str(tmp_path / "texts.txt")), TextEncoder(tokenizer), tmp_path / "root")
    found = [cache.features["tokens"][n].tolist() for n in range(2000)]
    assert found == [tokenizer.encode(text) for text in texts]


def test_what_is_no_token_is_not_counted_as_one(tmp_path, numbers):
    calls = []
    answered = lambda record: {"prompt": "", "response": record["text"]}  # noqa: E731
    source, encoder = numbers.Numbers(parts=(3,)), ChatEncoder(ByteTokenizer(), preprocessors=(answered,))
    cache = build_cache(source, encoder, tmp_path, progress=lambda *told: calls.append(told))
    assert cache.features["answer"].lengths.tolist() == cache.features["tokens"].lengths.tolist()
    assert calls[-1] == (1, 1, int(cache.features["tokens"].offsets[-1]))


def test_a_cache_that_is_there_is_opened(tmp_path, numbers, monkeypatch):
    (tmp_path / "log").mkdir()
    (tmp_path / "root").mkdir()
    source, encoder = numbers.Numbers(log=str(tmp_path / "log")), TextEncoder(ByteTokenizer())
    first = build_cache(source, encoder, tmp_path / "root", workers=1)
    assert len(os.listdir(tmp_path / "log")) == 5
    with monkeypatch.context() as patch:  # nothing is written, so others' caches can be used
        patch.setattr(Path, "touch", lambda *_: pytest.fail("something was written"))
        again = build_cache(source, encoder, tmp_path / "root")
    assert len(os.listdir(tmp_path / "log")) == 5
    assert again.digest == first.digest
    # Another setting or other data is another cache; the digest is of the contents alone.
    other = build_cache(numbers.Numbers(parts=(3, 1)), encoder, tmp_path / "root", workers=1)
    assert len({other.digest, first.digest}) == len({other.directory, first.directory}) == 2
    # A preprocessor that changes nothing makes another cache with the same contents.
    same = build_cache(source, TextEncoder(ByteTokenizer(), preprocessors=(numbers.shout,)), tmp_path / "b", workers=1)
    assert same.digest == first.digest
    assert same.directory.name != first.directory.name


def test_the_number_of_processes_does_not_matter(tmp_path, numbers):
    source = numbers.Numbers(parts=(40, 3, 1500, 2, 0, 7, 900, 1))
    encoder = PairEncoder(ByteTokenizer(), (), "text", "text", prefix="é: ")
    files = [contents(build_cache(source, encoder, tmp_path / str(n), workers=n).directory) for n in (1, 2, 4)]
    assert files[0] == files[1] == files[2]
    assert set(files[0]) == {
        "index.json", "keys.u64", "sizes.i64", "inputs.bin", "inputs.offsets", "targets.bin", "targets.offsets"
    }  # fmt: skip


def test_several_processes_share_the_parts(tmp_path, numbers):
    source = numbers.Numbers(parts=(1,) * 6, log=str(tmp_path), seconds=0.3)
    calls = []
    build_cache(source, TextEncoder(ByteTokenizer()), tmp_path / "root", workers=2, progress=lambda *a: calls.append(a))
    read = [name.split(".") for name in os.listdir(tmp_path) if name != "root"]
    assert sorted(part for part, _ in read) == list("012345")
    assert len({process for _, process in read}) == 2
    assert str(os.getpid()) not in {process for _, process in read}
    assert [done for done, _, _ in calls] == list(range(7))


def test_little_data_needs_no_process(tmp_path, numbers, monkeypatch):
    class Part(int):
        size = 100

    def refuse(*args):
        raise AssertionError("a process was started")

    monkeypatch.setattr(worker_processes, "run", refuse)
    source = numbers.Numbers(parts=(Part(3), Part(4)))
    assert len(build_cache(source, TextEncoder(ByteTokenizer()), tmp_path)) == 7
    Part.size = 0  # not known
    monkeypatch.setattr(worker_processes, "available_cores", lambda: 2)
    with pytest.raises(AssertionError, match="a process was started"):
        build_cache(source, TextEncoder(ByteTokenizer()), tmp_path / "other")


@pytest.mark.parametrize("how", ["kill the builder", "interrupt all"])
def test_building_goes_on_where_it_was_ended(tmp_path, numbers, how):
    log = tmp_path / "log"
    log.mkdir()
    # As many parts as a busy machine cannot get through before the end comes.
    source, encoder = numbers.Numbers(parts=(5,) * 60, log=str(log)), TextEncoder(ByteTokenizer())
    root = tmp_path / "root"
    started = program(
        tmp_path,
        numbers,
        f"""
        from cached_numbers import Numbers
        from t5x_lite.data.encoders import TextEncoder
        from t5x_lite.data.token_cache import build_cache
        from t5x_lite.data.tokenizers import ByteTokenizer, train_sentencepiece
        source = Numbers(parts=(5,) * 60, log={str(log)!r}, seconds=0.1)
        build_cache(source, TextEncoder(ByteTokenizer()), {str(root)!r}, workers=2)
        """,
    )
    wait_for(lambda: len(list(root.glob("*.building/part-?????"))) >= 3)
    (building,) = root.glob("*.building")
    if how == "kill the builder":
        started.kill()
    else:
        os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=30)
    assert how == "kill the builder" or "KeyboardInterrupt" in errors.splitlines()[-1]
    assert "serve" not in errors  # the processes have nothing to say
    workers = {int(name.split(".")[1]) for name in os.listdir(log)}
    assert len(workers) == 2
    wait_for(lambda: not any(running(process) for process in workers))
    kept = [path.name for path in building.glob("part-?????")]
    assert 3 <= len(kept) < 60
    assert not (root / cache_key(source, encoder)).exists()
    (building / f"part-00099.{cache_parts.host()}-1-0").mkdir()  # as a process that was killed leaves it
    calls = []
    cache = build_cache(source, encoder, root, workers=1, progress=lambda *a: calls.append(a))
    assert [done for done, _, _ in calls] == list(range(len(kept), 61))
    read_here = [name for name in os.listdir(log) if name.endswith(f".{os.getpid()}")]
    assert len(read_here) == 60 - len(kept)
    assert contents(cache.directory) == contents(build_cache(source, encoder, tmp_path / "whole", workers=1).directory)
    assert not building.exists()


def running(process):
    try:
        return open(f"/proc/{process}/stat").read().split()[2] != "Z"
    except OSError:
        return False


def test_an_incomplete_part_is_made_again(tmp_path, numbers):
    source, encoder = numbers.Numbers(), TextEncoder(ByteTokenizer())
    whole = contents(build_cache(source, encoder, tmp_path / "whole", workers=1).directory)

    def stop(done, total, tokens):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(source, encoder, tmp_path / "root", workers=1, progress=stop)
    (building,) = (tmp_path / "root").glob("*.building")
    (building / "part-00000" / "tokens.bin").write_bytes(b"\0\0")  # shorter than it says
    (building / "part-00001" / "part.json").write_text("{")
    calls = []
    cache = build_cache(source, encoder, tmp_path / "root", workers=1, progress=lambda *a: calls.append(a))
    assert calls[0] == (1, 5, 0)  # part 2, which is empty
    assert contents(cache.directory) == whole
    assert len(os.listdir(tmp_path / "root")) == 2


def test_another_division_of_the_same_source(tmp_path, numbers):
    class Divided(numbers.Numbers):
        identity = "the same"

    def stop(done, total, tokens):
        if done == 1:
            raise KeyboardInterrupt

    encoder = TextEncoder(ByteTokenizer())
    with pytest.raises(KeyboardInterrupt):
        build_cache(Divided(parts=(7, 2)), encoder, tmp_path, workers=1, progress=stop)
    cache = build_cache(Divided(parts=(1, 2)), encoder, tmp_path, workers=1)
    assert len(cache) == 3
    assert len(os.listdir(tmp_path)) == 2


def test_a_second_builder_waits_for_the_first(tmp_path, numbers, monkeypatch):
    monkeypatch.setattr(token_cache, "_POLL", 0.02)
    log = tmp_path / "log"
    log.mkdir()
    source, encoder = numbers.Numbers(parts=(5,) * 5, log=str(log), seconds=0.1), TextEncoder(ByteTokenizer())
    calls, caches = ([], []), []

    def build(number):
        caches.append(
            build_cache(source, encoder, tmp_path / "r", workers=1, progress=lambda *a: calls[number].append(a))
        )

    threads = [threading.Thread(target=build, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir(log)) == 5  # by one of them, and once
    assert len(caches) == 2
    assert caches[0].digest == caches[1].digest
    # The one that waits is told of the other one's progress.
    assert {done for done, _, _ in calls[0]} >= {1, 2, 3}
    assert {done for done, _, _ in calls[1]} >= {1, 2, 3}


def test_a_builder_that_stands_still_is_not_waited_for_without_end(tmp_path, numbers, monkeypatch):
    monkeypatch.setattr(token_cache, "_POLL", 0.02)
    source, encoder = numbers.Numbers(parts=(5,), seconds=1.5), TextEncoder(ByteTokenizer())
    first = threading.Thread(target=build_cache, args=(source, encoder, tmp_path))
    first.start()
    wait_for(lambda: list(tmp_path.glob("*.building/part-*")))
    with pytest.raises(InputError, match=r"another process is building .* has completed no part for 0 seconds"):
        build_cache(source, encoder, tmp_path, patience=0.2)
    first.join()
    assert len(build_cache(source, encoder, tmp_path)) == 5


def test_builders_that_no_lock_keeps_apart_do_not_harm_each_other(tmp_path, numbers, monkeypatch):
    """As on two machines with a file system that does not lock: one of them is done when the other is half-way."""
    import fcntl

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    encoder = TextEncoder(ByteTokenizer())
    whole = contents(build_cache(numbers.Numbers(), encoder, tmp_path / "whole", workers=1).directory)
    for moment in (0, 3, "join"):
        root = tmp_path / f"at {moment}"

        class Slow(numbers.Numbers):
            def read(self, index, on_skip, columns):
                if index == moment:  # noqa: B023
                    build_cache(numbers.Numbers(), encoder, root, workers=1)  # noqa: B023
                return super().read(index, on_skip, columns)

        def progress(done, total, tokens):
            if moment == "join" and done == total:  # noqa: B023
                build_cache(numbers.Numbers(), encoder, root, workers=1)  # noqa: B023

        cache = build_cache(Slow(), encoder, root, workers=1, progress=progress)
        assert contents(cache.directory) == whole
        assert len(list(root.iterdir())) == 2  # and the lock's file

    class Same(numbers.Numbers):
        def read(self, index, on_skip, columns):
            (building,) = (tmp_path / "part").glob("*.building")
            assert len(list(building.glob("part-?????.*"))) == 1
            if index == 1:  # which another one completes first
                cache_parts.write_part(numbers.Numbers(), encoder, building, 1)
            if index == 4:
                raise InputError("at the end")
            return super().read(index, on_skip, columns)

    with pytest.raises(InputError, match="at the end"):
        build_cache(Same(), encoder, tmp_path / "part", workers=1)
    (building,) = (tmp_path / "part").glob("*.building")
    assert sorted(path.name for path in building.iterdir()) == [f"part-{index:05d}" for index in range(4)]
    cache = build_cache(numbers.Numbers(), encoder, tmp_path / "part", workers=1)
    assert contents(cache.directory) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_what_goes_wrong_with_a_record_is_said_and_the_rest_kept(tmp_path, numbers, workers):
    source = numbers.Numbers(parts=(3, 1, 1, 1500))

    def build(preprocessor):
        encoder = TextEncoder(ByteTokenizer(), preprocessors=(preprocessor,))
        root = tmp_path / preprocessor.__name__
        try:
            return build_cache(source, encoder, root, workers=workers)
        finally:
            (building,) = root.glob("*.building")
            assert sorted(path.name for path in building.iterdir())[:1] == ["part-00000"]
            assert not [path for path in building.iterdir() if "." in path.name]

    with pytest.raises(InputError) as refused:
        build(numbers.refuse)
    assert str(refused.value) == "part3:7: 3.7 is refused"
    with pytest.raises(OSError, match="No space left") as full:
        build(numbers.fill_the_disk)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "tokens.bin")
    with pytest.raises(BaseException, match="nobody expects this") as failed:
        build(numbers.fail)
    if workers == 2:
        assert isinstance(failed.value, RuntimeError)
        assert "in fail" in failed.value.__notes__[0]


def test_processes_end_with_whoever_looks_on(tmp_path, numbers):
    source = numbers.Numbers(parts=(5,) * 4, log=str(tmp_path), seconds=0.2)

    def progress(done, total, tokens):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(source, TextEncoder(ByteTokenizer()), tmp_path / "root", workers=2, progress=progress)
    workers = {int(path.name.split(".")[1]) for path in tmp_path.glob("?.*")}
    assert len(workers) == 2
    assert not any(map(running, workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_named_by_line(tmp_path, workers):
    lines = [json.dumps({"text": f"line {n}"}) for n in range(1, 2001)]
    lines[1500] = json.dumps({"txt": "line 1501"})
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    source = open_source(str(tmp_path / "data.jsonl"), part_bytes=10_000)
    assert len(source.parts) > 3
    with pytest.raises(
        InputError, match=rf"^column 'text' is not in {tmp_path}/data\.jsonl:1501; its columns are: txt"
    ):
        build_cache(source, TextEncoder(ByteTokenizer()), tmp_path / "a", workers=workers)
    source = open_source(str(tmp_path / "data.jsonl"), Reading(on_error="skip"), part_bytes=10_000)
    cache = build_cache(source, TextEncoder(ByteTokenizer()), tmp_path / "b", workers=workers)
    texts = [ByteTokenizer().decode(cache.features["tokens"][n]) for n in range(1999)]
    assert texts == [f"line {n}" for n in range(1, 2001) if n != 1501]
    assert cache.skipped == 1


def test_a_process_that_dies(tmp_path, numbers):
    encoder = TextEncoder(ByteTokenizer(), preprocessors=(numbers.die,))
    with pytest.raises(RuntimeError, match="a worker process was ended by signal 9, perhaps for want of memory"):
        build_cache(numbers.Numbers(), encoder, tmp_path, workers=2)
    assert len(build_cache(numbers.Numbers(), encoder, tmp_path, workers=1)) == 1506  # it dies as a worker only


def test_what_a_preprocessor_prints_does_not_matter(tmp_path, numbers, capfd):
    encoder = TextEncoder(ByteTokenizer(), preprocessors=(numbers.shout,))
    assert len(build_cache(numbers.Numbers(parts=(3, 1)), encoder, tmp_path, workers=2)) == 4
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "0.1 é" in printed.err


def test_a_script_without_a_main_guard(tmp_path, numbers):
    started = program(
        tmp_path,
        numbers,
        """
        print("once")
        from cached_numbers import Numbers
        from t5x_lite.data.encoders import TextEncoder
        from t5x_lite.data.token_cache import build_cache
        from t5x_lite.data.tokenizers import ByteTokenizer, train_sentencepiece
        def own(record):
            return {"text": record["text"] + "!"}
        print(len(build_cache(Numbers(), TextEncoder(ByteTokenizer()), "a", workers=2)))
        print(len(build_cache(Numbers(), TextEncoder(ByteTokenizer(), preprocessors=(own,)), "b", workers=2)))
        """,
    )
    out, errors = started.communicate(timeout=60)
    assert out.split() == ["once", "1506", "1506"]
    warning = "the text is tokenised in one process, not 2: own is defined in the program itself, not in a module"
    assert errors.count("Warning") == errors.count(warning) == 1


def test_what_another_process_cannot_import(tmp_path, numbers):
    encoder = TextEncoder(ByteTokenizer(), preprocessors=(lambda record: record,))
    with pytest.warns(UserWarning, match="in one process, not 2: .*lambda"):
        assert len(build_cache(numbers.Numbers(), encoder, tmp_path / "a", workers=2)) == 1506
    path = [sys.path.pop(0)]  # where the module is
    try:
        with pytest.warns(UserWarning, match="in one process, not 2: ModuleNotFoundError: No module named 'cached_num"):
            cache = build_cache(numbers.Numbers(), TextEncoder(ByteTokenizer()), tmp_path / "b", workers=2)
    finally:
        sys.path[:0] = path
    assert len(cache) == 1506


@pytest.mark.parametrize("workers", [1, 2])
def test_records_that_are_skipped_are_counted(tmp_path, numbers, workers):
    source = numbers.Bad(parts=(9, 2, 2000), reading=numbers.Reading("skip"))
    cache = build_cache(source, TextEncoder(ByteTokenizer()), tmp_path, workers=workers)
    assert len(cache) == 3 + 1 + 667
    assert cache.skipped == 2011 - len(cache)
    assert cache.reasons[:2] == ("part0:1: is malformed", "part0:4: is malformed")
    assert len(cache.reasons) == 5


def test_no_records(tmp_path, numbers):
    encoder = TextEncoder(ByteTokenizer())
    with pytest.raises(InputError, match=r"^no records in 'numbers'$"):
        build_cache(numbers.Numbers(parts=(0, 0)), encoder, tmp_path)
    source = numbers.Numbers(parts=(2, 3), reading=numbers.Reading("skip"))
    with pytest.raises(InputError, match=r"^no records in 'numbers'; 5 were skipped$"):
        build_cache(source, TextEncoder(ByteTokenizer(), "txt"), tmp_path)


def test_a_cache_of_another_tokenizer(tmp_path, numbers, monkeypatch):
    cache = build_cache(numbers.Numbers(), TextEncoder(ByteTokenizer()), tmp_path)
    assert open_cache(cache.directory, ByteTokenizer()).digest == cache.digest
    assert open_cache(str(cache.directory), tokenizer_identity(ByteTokenizer())).digest == cache.digest

    class Other(ByteTokenizer):
        pass

    with pytest.raises(InputError) as error:
        open_cache(cache.directory, Other())
    mine, other = tokenizer_identity(ByteTokenizer()), tokenizer_identity(Other())
    assert mine != other
    assert str(error.value) == f"the token cache '{cache.directory}' is of {mine}; the tokenizer here is {other}"


def test_a_damaged_cache(tmp_path, numbers):
    source, encoder = numbers.Numbers(), TextEncoder(ByteTokenizer())
    cache = build_cache(source, encoder, tmp_path, workers=1)
    folder = cache.directory
    for name, whole in contents(folder).items():
        if name == "index.json":
            continue
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        (folder / name).write_bytes(flipped)
        assert len(open_cache(folder)) == 1506  # its size is right
        with pytest.raises(InputError, match=rf"is damaged: {name} is not what was written; delete it"):
            open_cache(folder, verify=True)
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(InputError, match=rf"is damaged: {name} has {len(whole) - 1} bytes, not {len(whole)}"):
            open_cache(folder)
        (folder / name).unlink()
        with pytest.raises(InputError, match=rf"is damaged: {name} is missing"):
            build_cache(source, encoder, tmp_path)
        (folder / name).write_bytes(whole)
    assert open_cache(folder, verify=True).digest == cache.digest
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index[:-20])
    with pytest.raises(InputError, match=r"is damaged: index\.json is not readable"):
        open_cache(folder)
    (folder / "index.json").write_text(json.dumps(json.loads(index) | {"format": 99}))
    with pytest.raises(InputError, match="has format 99, and this version reads 1"):
        open_cache(folder)
    with pytest.raises(InputError, match=r"no token cache in '.*': No such file or directory"):
        open_cache(tmp_path / "nothing")


def test_where_no_cache_can_be(tmp_path, numbers):
    (tmp_path / "file").write_text("")
    for root in ("file", "file/below"):
        with pytest.raises(InputError, match="cannot be a directory of token caches"):
            build_cache(numbers.Numbers(), TextEncoder(ByteTokenizer()), tmp_path / root)
    with pytest.raises(InputError, match="workers 0: must be at least 1"):
        build_cache(numbers.Numbers(), TextEncoder(ByteTokenizer()), tmp_path, workers=0)


def test_a_cache_is_pickled_as_its_path(tmp_path, numbers):
    cache = build_cache(numbers.Numbers(), TextEncoder(ByteTokenizer()), tmp_path, workers=1)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert np.array_equal(again.features["tokens"].flat, cache.features["tokens"].flat)
    assert again.digest == cache.digest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say how much memory was used")
def test_memory_does_not_grow_with_the_corpus(tmp_path, numbers):
    text = """
        from cached_numbers import Numbers
        from t5x_lite.data.encoders import Encoded
        from t5x_lite.data.token_cache import build_cache
        class Encoder:
            features, types, columns, identity, tokenizer_identity = ("tokens",), ("int32",), (), "", ""
            def __call__(self, records):
                return (Encoded((range(1000),), "", 1) for _ in records)
        for parts in ((1000,), (10_000,)):
            build_cache(Numbers(parts=parts), Encoder(), "root", workers=1)
            # Not ru_maxrss, which a program inherits from the one that starts it.
            print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    out, errors = program(tmp_path, numbers, text).communicate(timeout=60)
    small, large = map(int, out.split())
    # 4 MB of ids, which are the 1000 records of a batch, then 40 MB; in kilobytes.
    assert large - small < 20_000, errors
