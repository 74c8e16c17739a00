import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from t5x_lite.errors import InputError
from t5x_lite.interop import tensorflow_bundle as bundle

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mesh_tensorflow"
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "weights" / "t5x-native-testdata" / "mtf_tiny_t5"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of what TensorFlow wrote, to damage; the prefix."""
    shutil.copytree(FIXTURES / "v1_0", tmp_path / "v1_0")
    return tmp_path / "v1_0" / "model.ckpt-100"


def test_tensors_of_a_checkpoint_that_tensorflow_wrote() -> None:
    tensors = bundle.read_index(FIXTURES / "v1_1" / "model.ckpt-100")
    assert len(tensors) == 88
    step = tensors["global_step"].read()
    assert (step.dtype, step.shape, int(step)) == (np.int64, (), 100)
    query = tensors["encoder/block_001/layer_000/SelfAttention/q"]
    assert (query.shape, query.dtype) == ((8, 6), np.dtype(ml_dtypes.bfloat16))
    files = {tensor.file.name for tensor in tensors.values()}
    assert files == {f"model.ckpt-100.data-0000{part}-of-00002" for part in range(2)}
    with np.load(FIXTURES.parent / "t5x" / "v1_1.npz") as stored:
        expected = stored["target/encoder/layers_1/attention/query/kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(query.read(), expected)


@pytest.mark.skipif(not SHARED.exists(), reason="the public checkpoint is not here")
def test_index_of_a_public_checkpoint_which_is_compressed() -> None:
    tensors = bundle.read_index(SHARED / "model.ckpt-0")
    lines = (SHARED / "model-info.txt").read_text().splitlines()
    sizes = {line.split()[1]: int(line.split()[3]) for line in lines if line.startswith("Variable")}
    assert len(sizes) == 52
    assert {name: int(np.prod(tensors[name].shape)) for name in sizes} == sizes
    assert int(tensors["global_step"].read()) == 0
    with pytest.raises(InputError, match=r"data shard .*00001-of-00002 is missing"):
        tensors["shared/embedding"].read()


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        (b"\x03\x08abc", b"abc"),
        (b"\x0a\x04ab\x15\x02\x00", b"ababababab"[:8]),  # a copy of 6 from 2 back, over what it writes; wrong length
        (b"\x08\x04ab\x16\x02\x00", b"abababab"),
        (b"\x06\x04ab\x01\x02", b"ababab"),
        (b"\x07\x04ab\x13\x02\x00\x00\x00", b"abababa"),
        (b"\x3d\xf0\x3c" + bytes(range(61)), bytes(range(61))),
    ],
)
def test_snappy(compressed: bytes, plain: bytes) -> None:
    if compressed[0] != len(plain):
        with pytest.raises(ValueError, match="another length"):
            bundle._snappy(compressed)
    else:
        assert bundle._snappy(compressed) == plain


def test_snappy_copies_only_what_is_there() -> None:
    with pytest.raises(ValueError, match="before its beginning"):
        bundle._snappy(b"\x06\x04ab\x01\x03")


def test_crc32c_of_the_standard() -> None:
    assert bundle._crc32c(b"123456789") == 0xE3069283  # RFC 3720's polynomial, its usual check value


@pytest.mark.parametrize("position", [40, 1500, 3000])
def test_a_changed_index_is_noticed(checkpoint: Path, position: int) -> None:
    index = checkpoint.with_name("model.ckpt-100.index")
    data = bytearray(index.read_bytes())
    data[position] ^= 1
    index.write_bytes(data)
    with pytest.raises(InputError, match="checksum differs"):
        bundle.read_index(checkpoint)


def test_an_index_cut_short_or_of_another_kind(checkpoint: Path) -> None:
    index = checkpoint.with_name("model.ckpt-100.index")
    for data in (index.read_bytes()[:-9], b"", b"x" * 100):
        index.write_bytes(data)
        with pytest.raises(InputError, match="cannot be read as the index"):
            bundle.read_index(checkpoint)
    index.unlink()
    with pytest.raises(InputError, match="there is no"):
        bundle.read_index(checkpoint)


def test_a_shard_missing_or_cut_short(checkpoint: Path) -> None:
    tensor = bundle.read_index(checkpoint)["shared/embedding"]
    tensor.file.write_bytes(tensor.file.read_bytes()[: tensor.offset + tensor.size - 1])
    with pytest.raises(InputError, match="cut short"):
        tensor.read()
    tensor.file.unlink()
    with pytest.raises(InputError, match="is missing"):
        tensor.read()


def test_what_is_not_read() -> None:
    file = FIXTURES / "v1_0" / "model.ckpt-100.data-00000-of-00002"
    with pytest.raises(InputError, match="slices"):
        bundle.Tensor((2,), np.dtype(np.float32), file, 0, 8, sliced=True).read()
    with pytest.raises(InputError, match="not an array of numbers"):
        bundle.Tensor((2,), None, file, 0, 8, sliced=False).read()
    with pytest.raises(InputError, match="9 bytes cannot be float32"):
        bundle.Tensor((2,), np.dtype(np.float32), file, 0, 9, sliced=False).read()


def test_slices_are_seen_in_the_index(tmp_path: Path) -> None:
    # field 1: float32; field 2: shape [4]; field 7: a slice
    entry = b"\x08\x01" + b"\x12\x04\x12\x02\x08\x04" + b"\x3a\x00"
    tensor = bundle._tensor(tmp_path / "model", entry, shards=1)
    assert (tensor.shape, tensor.sliced) == ((4,), True)


def test_find(checkpoint: Path) -> None:
    directory = checkpoint.parent
    index = checkpoint.with_name("model.ckpt-100.index")
    assert bundle.find(checkpoint) == bundle.find(index) == bundle.find(directory) == checkpoint
    shutil.copy(index, directory / "model.ckpt-99.index")
    shutil.copy(index, directory / "model.ckpt-1000.index")
    assert bundle.find(directory) == checkpoint  # as `checkpoint` says
    (directory / "checkpoint").unlink()
    assert bundle.find(directory) == directory / "model.ckpt-1000"
    assert bundle.find(directory / "model.ckpt-7") is None
    assert bundle.find(directory.parent) is None
