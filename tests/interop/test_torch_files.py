import builtins
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.interop import torch_files
from t5x_lite.interop.tensor_files import open_tensors

FIXTURES = Path(__file__).parent.parent / "fixtures" / "torch"
HEADER = b"".join(pickle.dumps(value, 2) for value in (torch_files._MAGIC, 1001, {"little_endian": True}))


def expected(name):
    with np.load(FIXTURES / "expected.npz") as file:
        return {key.partition("/")[2]: file[key] for key in file if key.startswith(f"{name}/")}


def open_bytes(directory, data):
    (directory / "pytorch_model.bin").write_bytes(data)
    return open_tensors(directory)


def as_zip(pickled, storages=(), order=b"little", compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", order)
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)
    return buffer.getvalue()


def as_sequence(pickled, storages=()):
    storages = dict(storages)
    data = b"".join((len(data) // 4).to_bytes(8, "little") + data for data in storages.values())
    return HEADER + pickled + pickle.dumps(list(storages), 2) + data


CONTAINERS = {"zip": as_zip, "legacy": as_sequence}


class Global(str):
    """`"module name"`, which the pickle asks for."""


class Call(tuple):
    """A function and its arguments."""


class Persistent(tuple):
    """A storage's description."""


class Build(tuple):
    """An object and the state that it is given."""


def opcodes(value):
    """A pickle of functions that are not installed here, without its end."""
    match value:
        case Global():
            return b"c%s\n%s\n" % tuple(value.encode().split())
        case Call():
            return opcodes(value[0]) + opcodes(tuple(value[1:])) + b"R"
        case Persistent():
            return opcodes(tuple(value)) + b"Q"
        case Build():
            return opcodes(value[0]) + opcodes(value[1]) + b"b"
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case dict():
            return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"
        case _:
            return pickle.dumps(value, 2)[2:-1]


def pickled(value):
    return b"\x80\x02" + opcodes(value) + b"."


def storage(count=6, key="0", kind="torch FloatStorage", view=()):
    return Persistent(("storage", Global(kind), key, "cpu", count, *view))


def tensor(of=None, offset=0, shape=(2, 3), strides=(3, 1), function="_rebuild_tensor_v2", more=(False, {})):
    return Call((Global(f"torch._utils {function}"), storage() if of is None else of, offset, shape, strides, *more))


SIX = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize("name", ["zip", "legacy", "typed", "wrapped"])
def test_files_of_torch(tmp_path, name):
    shutil.copy(FIXTURES / f"{name}.bin", tmp_path / "pytorch_model.bin")
    opened, want = open_tensors(tmp_path), expected("zip" if name == "legacy" else name)
    assert sorted(opened.shapes) == sorted(opened.dtypes) == sorted(want)
    for key, x in want.items():
        dtype = np.dtype(ml_dtypes.bfloat16) if key == "bfloat16" else x.dtype
        assert (opened.shapes[key], opened.dtypes[key]) == (x.shape, dtype)
        np.testing.assert_array_equal(opened.read(key), x.astype(dtype), strict=True)
        if x.ndim == 2:
            index = (slice(1, None), slice(0, 2))
            np.testing.assert_array_equal(opened.read(key, index), x[index].astype(dtype), strict=True)


def test_tied_tensors_and_views_are_there_once():
    tensors = torch_files.list_torch_tensors(FIXTURES / "zip.bin")
    assert tensors["tied.a"] == tensors["tied.b"]
    assert tensors["transposed"].start == tensors["base"].start
    assert tensors["transposed"].strides == tensors["base"].strides[::-1]
    assert tensors["offset"].start == tensors["base"].start + 4 * (6 + 2)


def test_shards(tmp_path):
    opened, want = open_tensors(FIXTURES / "shards"), expected("shards")
    assert sorted(opened.shapes) == sorted(want) == ["a", "b", "c"]
    for name, x in want.items():
        np.testing.assert_array_equal(opened.read(name), x, strict=True)
    shutil.copytree(FIXTURES / "shards", tmp_path, dirs_exist_ok=True)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match=r"-00002-of-00002\.bin' is missing; .* has tensor 'b' there"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_pickles_made_here_are_read_as_torch_makes_them(tmp_path, container, wrapper):
    """The tests below change such pickles; this one says that unchanged they are sound."""
    content = {
        "v1": tensor(function="_rebuild_tensor", more=()),
        "v2": tensor(),
        "v3": tensor(function="_rebuild_tensor_v3", more=(False, {}, Global("torch uint32"))),
        "parameter": Call((Global("torch._utils _rebuild_parameter"), tensor(), True, {})),
        "parameter 2": Call((Global("torch._utils _rebuild_parameter_with_state"), tensor(), True, {}, {"a": 1})),
    }
    ordered = Build((Call((Global("collections OrderedDict"), tuple(content.items()))), {"_metadata": {"": 1}}))
    for value in (content, ordered, {wrapper: ordered, "epoch": 3}):
        opened = open_bytes(tmp_path, CONTAINERS[container](pickled(value), {"0": SIX.tobytes()}))
        assert list(opened.shapes) == ["v1", "v2", "v3", "parameter", "parameter 2"]
        for name in opened.shapes:
            want = SIX.reshape(2, 3).view("u4" if name == "v3" else "f4")
            np.testing.assert_array_equal(opened.read(name), want, strict=True)


def test_a_big_endian_archive(tmp_path):
    content = pickled({"a": tensor(), "b": tensor(storage(2, "1", "torch BFloat16Storage"), 0, (2,), (1,))})
    halves = np.array([1.5, -2], ml_dtypes.bfloat16)
    storages = {"0": SIX.astype(">f4").tobytes(), "1": halves.view("u2").astype(">u2").tobytes()}
    opened = open_bytes(tmp_path, as_zip(content, storages, b"big"))
    np.testing.assert_array_equal(opened.read("a"), SIX.reshape(2, 3), strict=True)
    np.testing.assert_array_equal(opened.read("b"), halves, strict=True)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def protocols(make):
    return [make(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


@pytest.mark.parametrize("container", [*CONTAINERS, "pickle alone"])
def test_functions_are_refused_by_name_and_not_run(tmp_path, container):
    target, file = tmp_path / "touched", re.escape(str(tmp_path / "pytorch_model.bin"))
    for evil, name in (
        (Evil(os.system, f"touch {target}"), r"(posix|nt)\.system"),
        (Evil(builtins.eval, f"open({str(target)!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        (Evil(Path.touch, target), r"(pathlib\.Path\.touch|(builtins|__builtin__)\.getattr)"),
    ):
        for content in (evil, {"a": evil}, {"state_dict": {"a": evil}}, [evil]):
            for data in protocols(lambda protocol, content=content: pickle.dumps(content, protocol)):
                data = CONTAINERS.get(container, bytes)(data)
                message = rf"^'{file}' asks for '{name}', which no tensor needs; refused$"
                with pytest.raises(InputError, match=message):
                    open_bytes(tmp_path, data)
                assert not target.exists()
    assert pickle.loads(pickle.dumps(Evil(builtins.eval, f"open({str(target)!r}, 'w').close()"))) is None
    assert target.exists(), "the pickles do what they are thought to do"


STACK_GLOBAL = b"\x80\x04\x8c%c%s\x8c%c%s\x93."


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "path.join"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("collections", "OrderedDict.__init__"),
        ("collections", "defaultdict"),
        ("torch", "load"),
        ("t5x_lite.interop.torch_files", "_Tensor"),
        ("numpy", "float32"),
        ("", ""),
    ],
)
def test_names_are_admitted_whole(tmp_path, container, module, name):
    data = STACK_GLOBAL % (len(module), module.encode(), len(name), name.encode())
    with pytest.raises(InputError, match=re.escape(f"asks for '{module}.{name}', which no tensor needs; refused")):
        open_bytes(tmp_path, CONTAINERS[container](data))


REBUILD = Global("torch._utils _rebuild_tensor_v2")
BAD = {
    "state for a function": (Build((REBUILD, {"__defaults__": ()})), "it changes a function"),
    "slots for a function": (Build((REBUILD, (None, {"_function": 1}))), "it changes a function"),
    "state for a class": (Build((Global("collections OrderedDict"), (None, {"get": 1}))), "it changes a function"),
    "state for a tensor": ({"a": Build((tensor(), {"offset": 99}))}, "no attribute '__dict__'"),
    "slots for a tensor": ({"a": Build((tensor(), (None, {"offset": 99})))}, "cannot read"),
    "state for a dtype": (Build((Global("torch float32"), (3, "<", None))), "cannot read"),
    "a dtype called": (Call((Global("torch float32"), 1)), "not callable"),
    "a tensor called": (Call((tensor(), 1)), "not callable"),
    "no storage": ({"a": tensor(3)}, "a tensor without storage"),
    "too few arguments": ({"a": Call((REBUILD, storage()))}, "missing 5 required"),
    "a shape that is a number": ({"a": tensor(shape=6)}, "cannot read"),
    "fewer strides": ({"a": tensor(strides=(1,))}, "shape, strides or offset cannot be"),
    "negative stride": ({"a": tensor(strides=(-3, 1))}, "shape, strides or offset cannot be"),
    "negative size": ({"a": tensor(shape=(-2, 3))}, "shape, strides or offset cannot be"),
    "negative offset": ({"a": tensor(offset=-1)}, "shape, strides or offset cannot be"),
    "fractional offset": ({"a": tensor(offset=0.5)}, "shape, strides or offset cannot be"),
    "number that is no whole one": ({"a": tensor(offset=True)}, "shape, strides or offset cannot be"),
    "negated": ({"a": tensor(more=(False, {}, {"neg": True}))}, "conjugated or negated"),
    "unknown dtype": ({"a": tensor(function="_rebuild_tensor_v3", more=(0, {}, "f"))}, "a tensor of unknown dtype"),
    "a parameter of nothing": (
        Call((Global("torch._utils _rebuild_parameter"), 3, 1, {})),
        "a parameter without tensor",
    ),
    "past the end": ({"a": tensor(offset=1)}, r"'a' of shape \(2, 3\) has more elements than its storage, 6"),
    "stride past the end": ({"a": tensor(strides=(4, 1))}, r"'a' of shape \(2, 3\) has more elements than its .* 6"),
    "more than there is": ({"a": tensor(shape=(2**40, 3), strides=(0, 1))}, "'a' of shape .* has more elements than"),
    "wider dtype": (
        {"a": tensor(function="_rebuild_tensor_v3", more=(0, {}, Global("torch int64")))},
        "its storage, 3",
    ),
    "storage part of another": ({"a": tensor(storage(view=(("1", 0, 6),)))}, "a storage that is part of another"),
    "persistent id of another kind": (
        Persistent(("module", Global("torch FloatStorage"), "0", "cpu", 6)),
        "a storage of unknown kind",
    ),
    "storage of another kind": (Persistent(("storage", "F", "0", "cpu", 6)), "a storage of unknown kind"),
    "storage of negative size": ({"a": tensor(storage(-1))}, "a storage of unknown kind"),
    "storage described twice": ([storage(6), storage(5)], "two descriptions of storage 0"),
    "a tensor alone": (tensor(), "holds an object of type tensor, not a dict of tensors"),
    "a list": ([1, 2], "holds an object of type list, not a dict of tensors"),
    "nothing": ({}, "holds nothing, not a dict of tensors"),
    "a number among the tensors": ({"a": tensor(), "step": 3}, "has an object of type int at 'step', not a tensor"),
    "a text among the tensors": ({"a": "x"}, "has an object of type str at 'a', not a tensor"),
    "a dict among the tensors": ({"a": {"b": tensor()}}, "has an object of type dict at 'a', not a tensor"),
    "a wrapper in a wrapper": (
        {"model": {"model": {"b": tensor()}}},
        "has an object of type dict at 'model', not a tensor",
    ),
    "two wrappers": ({"model": {"b": tensor()}, "state_dict": {"b": tensor()}}, "has both 'state_dict' and 'model'"),
    "a number for a name": ({3: tensor()}, "names a tensor by an object of type int, not a string"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
def test_what_is_no_dict_of_tensors(tmp_path, container, value, message):
    if isinstance(value, list) and isinstance(value[0], Persistent):
        data = b"\x80\x02(" + b"".join(map(opcodes, value)) + b"l."
    else:
        data = pickled(value)
    with pytest.raises(InputError, match=message) as error:
        open_bytes(tmp_path, CONTAINERS[container](data, {"0": SIX.tobytes()}))
    assert str(tmp_path / "pytorch_model.bin") in str(error.value)
    assert "\n" not in str(error.value)


CONTAINER_FAULTS = {
    "no storage in the archive": (as_zip(pickled({"a": tensor()})), "has no data of tensor 'a'"),
    "no storage in the sequence": (as_sequence(pickled({"a": tensor()})), "has no data of tensor 'a'"),
    "smaller storage": (
        as_zip(pickled({"a": tensor()}), {"0": bytes(23)}),
        "'a' .* has more elements than its storage, 5",
    ),
    "other size in the sequence": (as_sequence(pickled({"a": tensor()}), {"0": bytes(20)}), "5 elements, not 6"),
    "cut short": (as_sequence(pickled({"a": tensor()}), {"0": bytes(24)})[:-1], "cut short: the data of tensor 'a'"),
    "compressed": (as_zip(b"", compression=zipfile.ZIP_DEFLATED), "'archive/data.pkl' is compressed"),
    "empty": (b"", "it is cut short"),
    "text": (b"plain text", "it is cut short, damaged, or not from torch.save"),
    "another pickle": (pickle.dumps({"a": 1}), "is not from torch.save: it begins neither"),
}


@pytest.mark.parametrize(("data", "message"), CONTAINER_FAULTS.values(), ids=CONTAINER_FAULTS)
def test_containers_that_cannot_be_read(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        open_bytes(tmp_path, data)


@pytest.mark.parametrize("shape", [(1,) * 65, (0, 2**62, 2**62), (0, 2**70)])
def test_shapes_that_no_array_has(tmp_path, shape):
    opened = open_bytes(tmp_path, as_zip(pickled({"a": tensor(shape=shape, strides=shape)}), {"0": SIX.tobytes()}))
    with pytest.raises(InputError, match=r"'a' of '.*pytorch_model\.bin' cannot be held in memory"):
        opened.read("a")


def test_an_object_that_takes_forever_to_print_is_not_printed(tmp_path):
    pair = b"(NNt" + b"".join(b"q%c0(h%ch%ct" % (n, n, n) for n in range(60))  # 2**60 times None
    call = opcodes(REBUILD) + b"(" + opcodes(storage()) + b"I0\n" + pair + b"h\x01" + b"I0\n}tR"
    for data, message in ((call, "shape, strides or offset cannot be"), (pair, "an object of type tuple")):
        with pytest.raises(InputError, match=message):
            open_bytes(tmp_path, as_zip(b"\x80\x02" + data + b"."))


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(InputError, match=r"a zip archive, but not from torch\.save: it needs one data\.pkl"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_a_damaged_file_gives_an_input_error_or_tensors(tmp_path, name):
    data = (FIXTURES / f"{name}.bin").read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "read": 0}
    for turn in range(300):
        changed = bytearray(data[: rng.integers(len(data))] if turn % 6 == 0 else data)
        if turn % 6:
            for place in rng.integers(len(changed), size=rng.integers(1, 4)):
                changed[place] = changed[place] ^ (1 << rng.integers(8)) if turn % 2 else rng.integers(256)
        try:
            opened = open_bytes(tmp_path, changed)
        except InputError:
            outcomes["refused"] += 1
            continue
        assert turn % 6, "a file that was cut short"
        outcomes["read"] += 1
        for key, shape in opened.shapes.items():
            read = opened.read(key)
            assert (read.shape, read.dtype) == (shape, opened.dtypes[key])
            assert read.size <= len(data)
    assert min(outcomes.values()) > 20, outcomes


def test_a_flip_in_an_archives_pickle_is_noticed(tmp_path):
    data = (FIXTURES / "zip.bin").read_bytes()
    with zipfile.ZipFile(FIXTURES / "zip.bin") as archive:
        name = archive.namelist()[0]
        start, size = data.index(archive.read(name)), archive.getinfo(name).file_size
    assert name.endswith("/data.pkl")
    for place in range(start, start + size, 7):
        changed = bytearray(data)
        changed[place] ^= 16
        with pytest.raises(InputError, match="Bad CRC-32"):
            open_bytes(tmp_path, changed)


def test_nothing_of_torch_or_jax_is_imported():
    code = (
        "import sys\nfrom pathlib import Path\nfrom t5x_lite.interop.tensor_files import open_tensors\n"
        "x = open_tensors(Path(sys.argv[1]))\n[x.read(name) for name in x.shapes]\n"
        "assert not {'torch', 'jax', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, FIXTURES / "shards"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
