import json
import math
import re
import subprocess
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from t5x_lite.errors import InputError
from t5x_lite.interop import tensor_files
from t5x_lite.interop.tensor_files import StoredTensor, contiguous_strides, open_tensors, write_safetensors

DTYPES = (
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.bool_),
    *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
)


def arrays():
    rng = np.random.default_rng(0)
    out = {np.dtype(dtype).name: (rng.normal(size=(3, 5, 4)) * 100).astype(dtype) for dtype in DTYPES}
    return {
        **out,
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.int8),
        "naïve\n": np.ones(3, np.int8),
    }


def write(path, content):
    write_safetensors(path, [(name, x.shape, x.dtype, lambda x=x: x) for name, x in content.items()])


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_is_written_is_read_back_and_by_the_library_too(tmp_path):
    content = arrays()
    write(tmp_path / "model.safetensors", content)
    opened = open_tensors(tmp_path)
    assert opened.shapes == {name: x.shape for name, x in content.items()}
    assert opened.dtypes == {name: x.dtype for name, x in content.items()}
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as library:
        assert library.metadata() == {"format": "pt"}
        assert sorted(library.keys()) == sorted(content)
        for name, x in content.items():
            read = opened.read(name)
            assert (read.shape, read.dtype, read.tobytes()) == (x.shape, x.dtype, x.tobytes())
            assert read.flags.c_contiguous
            assert library.get_slice(name).get_shape() == list(x.shape)
            if x.dtype != ml_dtypes.bfloat16:  # the library cannot give it to NumPy
                np.testing.assert_array_equal(library.get_tensor(name), x, strict=True)
    raw_bytes = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    assert bytes(raw_bytes["bfloat16"]["data"]) == content["bfloat16"].tobytes()


def test_files_of_the_library(tmp_path):
    content = {name: x for name, x in arrays().items() if x.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    opened = open_tensors(tmp_path)
    for name, x in content.items():
        np.testing.assert_array_equal(opened.read(name), x, strict=True)


def test_every_tensor_begins_at_a_multiple_of_its_items_size(tmp_path):
    write(tmp_path / "x", {"a": np.ones(3, np.int8), "b": np.ones(3, np.float64), "c": np.ones(1, np.float16)})
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    offsets = {name: value.get("data_offsets") for name, value in json.loads(data[8 : 8 + length]).items()}
    assert length % 8 == 0
    assert offsets == {"__metadata__": None, "b": [0, 24], "c": [24, 26], "a": [26, 29]}


SLICES = (
    (slice(1, 3),),
    (slice(None), slice(2, 4)),
    (slice(None), slice(None), slice(1, 2)),
    (slice(2, 3), slice(0, 5), slice(0, 4)),
    (slice(0, None, 2), slice(1, None, 3), slice(-2, None)),
    (slice(3, 3),),
    (slice(1, 99),),
)


# With a block of one byte nothing is read together with a gap; with a large one everything is.
@pytest.mark.parametrize("block", [1, 40, 1 << 16])
@pytest.mark.parametrize("index", SLICES, ids=str)
def test_slices(tmp_path, monkeypatch, block, index):
    monkeypatch.setattr(tensor_files, "_BLOCK", block)
    content = arrays()
    write(tmp_path / "model.safetensors", content)
    opened = open_tensors(tmp_path)
    for name in ("float32", "bfloat16", "bool"):
        np.testing.assert_array_equal(opened.read(name, index), content[name][index], strict=True)


@pytest.mark.parametrize("block", [4, 40, 1 << 16])
def test_any_strides(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensor_files, "_BLOCK", block)
    data = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    (tmp_path / "x").write_bytes(data.tobytes())
    for offset, shape, strides in (
        (0, (10, 7), (1, 10)),
        (3, (4, 5, 6), (1, 24, 4)),
        (17, (4, 5), (40, 3)),
        (5, (3, 4), (0, 2)),
        (9, (1, 6), (500, 1)),
        (999, (), ()),
    ):
        stored = StoredTensor(tmp_path / "x", 4 * offset, data.dtype, shape, strides)
        want = np.lib.stride_tricks.as_strided(data[offset:], shape, [4 * stride for stride in strides])
        np.testing.assert_array_equal(stored.read("x"), want, strict=True)
        if shape:
            index = (slice(1, 3), slice(0, 9, 2))[: len(shape)]
            np.testing.assert_array_equal(stored.read("x", index), want[index], strict=True)


def test_only_the_part_asked_for_comes_from_the_file(tmp_path, monkeypatch):
    rows, columns = 512, 1 << 16
    with (tmp_path / "x").open("wb") as stream:
        stream.truncate(rows * columns)
    stored = StoredTensor(tmp_path / "x", 0, np.dtype(np.int8), (rows, columns), (columns, 1))
    read, into = [0], tensor_files._read_into

    def count(stream, start, target):
        read[0] += target.size
        into(stream, start, target)

    monkeypatch.setattr(tensor_files, "_read_into", count)
    for index in ((slice(7, 9),), (slice(None), slice(100, 200)), (slice(2, 5), slice(0, columns // 2))):
        read[0] = 0
        assert read[0] < stored.read("x", index).size == read[0]


def test_an_index_that_does_not_fit(tmp_path):
    write(tmp_path / "model.safetensors", {"a": np.ones((2, 3))})
    with pytest.raises(IndexError, match=r"3 slices for 'a' of shape \(2, 3\)"):
        open_tensors(tmp_path).read("a", (slice(None),) * 3)
    with pytest.raises(IndexError, match="'a' cannot be read backwards"):
        open_tensors(tmp_path).read("a", (slice(None, None, -1),))


def test_contiguous_strides():
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1)
    assert contiguous_strides(()) == ()


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from t5x_lite.interop.tensor_files import open_tensors, write_safetensors

directory, count = Path(sys.argv[1]), int(sys.argv[2])
shape, size = (1024, 2048), 8
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
base = peak()
give = lambda n: lambda: np.full(shape, n, np.float32)
names = [f"layer.{n}" for n in range(count)]
write_safetensors(directory / "model.safetensors", [(x, shape, np.float32, give(n)) for n, x in enumerate(names)])
written = peak() - base
opened = open_tensors(directory)
for n, name in enumerate(names):
    assert (opened.read(name) == n).all()
    for part in range(4):
        rows = opened.read(name, (slice(256 * part, 256 * (part + 1)),))
        columns = opened.read(name, (slice(None), slice(512 * part, 512 * (part + 1))))
        assert rows.shape == (256, 2048) and columns.shape == (1024, 512) and rows[5, 7] == columns[900, 3] == n
    del rows, columns
print(written, peak() - base)
assert not {"jax", "torch", "transformers"} & set(sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak of resident memory")
def test_memory_is_that_of_the_largest_tensor(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "12"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written, read = map(float, done.stdout.split())
    assert written < 16, "of 96 MB written, 8 MB at a time"
    # The tensor, and the booleans of the comparison: a quarter of it.
    assert read < 20, "of 96 MB read, 8 MB at a time"


def test_the_writer_holds_one_array_at_a_time(tmp_path):
    given = []

    class Array(np.ndarray):
        pass

    def give():
        assert not [last for last in given if last() is not None], "the one before is still there"
        array = np.ones((4, 4), np.float32).view(Array)
        given.append(weakref.ref(array))
        return array

    write_safetensors(tmp_path / "x", [(name, (4, 4), np.dtype(np.float32), give) for name in "abc"])
    assert len(given) == 3


def test_arrays_that_are_not_contiguous_are_written_in_c_order(tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    write(tmp_path / "model.safetensors", {"a": x.T, "b": x[::2, 1:].astype(ml_dtypes.bfloat16)})
    np.testing.assert_array_equal(open_tensors(tmp_path).read("a"), x.T)
    np.testing.assert_array_equal(open_tensors(tmp_path).read("b"), x[::2, 1:].astype(ml_dtypes.bfloat16))


def test_what_cannot_be_written_leaves_the_file_that_was_there(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, {"a": np.ones(3)})
    before = file.read_bytes()
    x = np.ones(3, np.float32)

    def no_room():
        raise OSError(28, "No space left on device")

    for error, message, bad in (
        (ValueError, "two tensors are named 'a'", [("a", (3,), x.dtype, lambda: x)] * 2),
        (ValueError, "two tensors are named '__metadata__'", [("__metadata__", (3,), x.dtype, lambda: x)]),
        (ValueError, "'a' has dtype complex64; safetensors has", [("a", (3,), np.dtype(np.complex64), lambda: x)]),
        (ValueError, "'a' has dtype >f4; safetensors has", [("a", (3,), np.dtype(">f4"), lambda: x)]),
        (
            ValueError,
            r"'a' is float32 of shape \(3,\), not float32 of shape \(1, 3\)",
            [("a", (1, 3), x.dtype, lambda: x)],
        ),
        (ValueError, "'a' is float32 of shape .*, not int32", [("a", (3,), np.dtype(np.int32), lambda: x)]),
        (InputError, "could not write '.*model.safetensors': No space left", [("a", (3,), x.dtype, no_room)]),
    ):
        with pytest.raises(error, match=message):
            write_safetensors(file, bad)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_without_weights(tmp_path):
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    message = (
        f"no weights in '{tmp_path}'; looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin,"
        " pytorch_model.bin.index.json"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_tensors(tmp_path)


def test_the_order_in_which_files_are_taken(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"bad")
    (tmp_path / "pytorch_model.bin.index.json").write_text("bad")
    shards(tmp_path, {"a": "s1"}, {"s1": ["a"]})
    assert set(open_tensors(tmp_path).shapes) == {"a"}
    write(tmp_path / "model.safetensors", {"b": np.ones(3)})
    assert set(open_tensors(tmp_path).shapes) == {"b"}
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"cannot read '.*pytorch_model\.bin'"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin\.index\.json' is no index"):
        open_tensors(tmp_path)


def shards(directory, weight_map, files):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, names in files.items():
        write(directory / file, {name: np.full(3, ord(name), np.int16) for name in names})


def test_shards(tmp_path):
    shards(tmp_path, {"a": "s1", "c": "s2", "b": "s1"}, {"s1": ["b", "a"], "s2": ["c"]})
    opened = open_tensors(tmp_path)
    assert opened.shapes == dict.fromkeys("abc", (3,))
    assert [opened.read(name)[0] for name in "abc"] == [ord(name) for name in "abc"]


SHARDS = {
    "missing file": ({"a": "s1", "b": "s2"}, {"s1": "a"}, r"s2' is missing; 'model\.safe.*json' has tensor 'b' there"),
    "missing tensor": ({"a": "s1", "b": "s1"}, {"s1": "a"}, r"s1' has no tensor 'b', which .*index\.json' has there"),
    "tensor in another file": (
        {"a": "s1", "b": "s2"},
        {"s1": "ab", "s2": "b"},
        "s1' has tensor 'b', which .* not have",
    ),
    "tensor that is not named": ({"a": "s1"}, {"s1": "ab"}, "s1' has tensor 'b', which .* does not have there"),
    "another directory": ({"a": "../s1"}, {}, r"json' has tensor 'a' in '\.\./s1', which is not a plain file name"),
    "absolute path": ({"a": "/s1"}, {}, "which is not a plain file name"),
    "no file name": ({"a": ".."}, {}, r"'\.\.' is missing|which is not a plain file name|/\.\.' is missing"),
    "empty file name": ({"a": ""}, {}, "which is not a plain file name|is missing"),
    "number for a file": ({"a": 3}, {}, "is no index of weights"),
    "list": ([], {}, "is no index of weights"),
    "nothing": ({}, {}, "names no tensors"),
}


@pytest.mark.parametrize(("weight_map", "files", "message"), SHARDS.values(), ids=SHARDS)
def test_shards_that_do_not_agree_with_the_index(tmp_path, weight_map, files, message):
    shards(tmp_path, weight_map, files)
    with pytest.raises(InputError, match=message):
        open_tensors(tmp_path)


def test_a_pointer_of_git_lfs(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(InputError, match=rf"{name}' is a Git LFS pointer .* 'git lfs pull'"):
            open_tensors(tmp_path)


EIGHT = bytes(8)
BAD = {
    "empty": (b"", b"", r"it is no safetensors file, or cut short in its header"),
    "no JSON": (b"{]", b"", "it is no safetensors file"),
    "deep JSON": (b"[" * 100_000, b"", "it is no safetensors file"),
    "a list": ([1], b"", "has no tensors in its header"),
    "no tensors": ({"__metadata__": {}}, b"", "has no tensors in its header"),
    "entry that is no object": ({"a": 1}, b"", "the header's entry of tensor 'a' is damaged"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT, "entry of tensor 'a' is damaged"),
    "negative size": ({"a": entry(shape=[-2, -1])}, EIGHT, "entry of tensor 'a' is damaged"),
    "fractional size": ({"a": entry(shape=[2.0])}, EIGHT, "entry of tensor 'a' is damaged"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, EIGHT, "entry of tensor 'a' is damaged"),
    "dtype that is no string": ({"a": entry(dtype=["F32"])}, EIGHT, "entry of tensor 'a' is damaged"),
    "unknown dtype": ({"a": entry(dtype="F8_E4M3")}, EIGHT, "'a' has dtype 'F8_E4M3'; allowed: F64, .* BOOL"),
    "other size": ({"a": entry(shape=[3])}, EIGHT, r"'a' has 8 bytes; F32 of shape \[3\] needs 12"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "'b' begins at byte 4, not where .* 8"),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "'b' begins at byte 12, not where .* 8"),
    "cut short": ({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(15), r"is cut short: tensor 'b' ends at byte"),
    "too long": ({"a": entry()}, bytes(11), "has 3 bytes after its last tensor, 'a'"),
}


@pytest.mark.parametrize(("header", "data", "message"), BAD.values(), ids=BAD)
def test_damaged_safetensors(tmp_path, header, data, message):
    raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(InputError, match=message) as error:
        open_tensors(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_short_anywhere_or_with_a_flipped_bit(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, {"aa": np.arange(6, dtype=np.float32).reshape(2, 3), "bb": np.ones(5, ml_dtypes.bfloat16)})
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(InputError):
            open_tensors(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        try:
            opened = open_tensors(tmp_path)
        except InputError:
            continue
        for name, shape in opened.shapes.items():
            assert opened.read(name).shape == shape


def test_a_file_that_shrinks_or_goes_after_it_was_opened(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, {"a": np.ones(3), "b": np.ones(3, np.float32)})
    opened = open_tensors(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    assert opened.read("a").sum() == math.fsum([1, 1, 1])
    with pytest.raises(InputError, match=r"cannot read 'b' from '.*model\.safetensors': it ends 5 bytes too early"):
        opened.read("b")
    file.unlink()
    with pytest.raises(InputError, match=r"cannot read 'a' from '.*model\.safetensors': .*No such file"):
        opened.read("a")
