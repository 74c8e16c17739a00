import gzip
import io
import json
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from t5x_lite.data import sources
from t5x_lite.data.encoders import TextEncoder, in_batches
from t5x_lite.data.parts import text_of
from t5x_lite.data.sources import Reading, check_columns, locate, open_source, read_records
from t5x_lite.data.tokenizers import ByteTokenizer
from t5x_lite.errors import InputError

ROWS = [{"a": "one, two", "b": "naïve"}, {"a": '"hi" she said', "b": "日本"}]


def parquet_bytes(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


CONTENT = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": ("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n").encode(),
    ".tsv": 'a\tb\none, two\tnaïve\n"hi" she said\t日本\n'.encode(),
    ".csv": 'a,b\r\n"one, two",naïve\r\n"""hi"" she said",日本\r\n'.encode(),
    ".parquet": parquet_bytes(ROWS),
}


def compress(data, suffix):
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](data)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", CONTENT)
def test_every_format_plain_and_compressed(tmp_path, suffix, compression):
    file = tmp_path / f"x{suffix}{compression}"
    file.write_bytes(compress(CONTENT[suffix], compression))
    assert list(read_records(str(file))) == ROWS
    assert list(read_records(str(file), ("b",))) == [{"b": row["b"]} for row in ROWS]
    check_columns(str(file), ("a", "b"))


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["x.txt", "x.TEXT", "x.md", "x"])
def test_text_is_one_record_a_line(tmp_path, name, compression):
    file = tmp_path / (name + compression)
    file.write_bytes(compress("\ufeff first\tline \r\n\n   \nsecond: é\x0cstill\n".encode(), compression))
    assert list(read_records(str(file))) == [{"text": " first\tline "}, {"text": "second: é\x0cstill"}]


def test_concatenated_zstandard_frames(tmp_path):
    (tmp_path / "x.txt.zst").write_bytes(zstandard.compress(b"one\n") + zstandard.compress(b"two\n"))
    assert [record["text"] for record in read_records(str(tmp_path / "x.txt.zst"))] == ["one", "two"]


def test_globs_are_sorted_and_paths_joined_by_commas(tmp_path):
    for name in ("b.txt", "a.txt", "c,d.txt", "e[1].txt"):
        (tmp_path / name).write_text(name)
    texts = lambda path: [record["text"] for record in read_records(path)]  # noqa: E731
    assert texts(f"{tmp_path}/?.txt") == ["a.txt", "b.txt"]
    assert texts(f"{tmp_path}/b.txt, {tmp_path}/a.*") == ["b.txt", "a.txt"]
    assert texts(f"{tmp_path}/c,d.txt") == ["c,d.txt"]
    assert texts(f"{tmp_path}/e[1].txt") == ["e[1].txt"]


def test_values_become_strings(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 3, "b": true, "c": null}')
    assert list(read_records(str(tmp_path / "x.jsonl"), ("a", "b"))) == [{"a": "3", "b": "True"}]


def test_fields_longer_than_the_csv_default_limit_and_line_breaks_in_quotes(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n"' + "x" * 200_000 + '\ny",1\n')
    assert list(read_records(str(tmp_path / "x.csv"))) == [{"a": "x" * 200_000 + "\ny", "b": "1"}]


def test_stdlib():
    record = next(read_records(sources.STDLIB))
    assert sorted(record) == ["kind", "module", "package", "text"]
    assert next(read_records("stdlib", ("text",))) == {"text": record["text"]}
    with pytest.raises(InputError, match=r"column 'txt' is not in stdlib; .*did you mean 'text'"):
        check_columns("stdlib", ("txt",))


BAD = {
    "malformed JSON": ("x.jsonl", b'{"a": "1"}\n{"a": \n', r"x\.jsonl:2: not a JSON object"),
    "JSON that is no object": ("x.jsonl", b"[1]\n", r"x\.jsonl:1: a JSON list, not an object"),
    "half a surrogate pair": ("x.jsonl", b'{"a": "\\ud800"}\n', r"x\.jsonl:1: half of a surrogate pair"),
    "null": ("x.jsonl", b'{"a": "1"}\n{"a": null}\n', r"x\.jsonl:2: column 'a' is null"),
    "column missing later": ("x.jsonl", b'{"a": "1"}\n{"b": "2"}\n', r"column 'a' is not in .*x\.jsonl:2"),
    "short row": ("x.csv", b"a,b\n1,2\n3\n", r"x\.csv:3: 1 fields where the header has 2 \(a, b\)"),
    "long row": ("x.tsv", b"a\tb\n1\t2\t3\n", r"x\.tsv:2: 3 fields where the header has 2"),
    "open quote": ("x.csv", b'a,b\n1,"2\n', r"x\.csv:2: unexpected end of data"),
    "repeated column": ("x.csv", b"a,a\n1,2\n", r"x\.csv:1: the header names column 'a' twice"),
    "no records": ("x.txt", b"\n \n", r"no records in '.*x\.txt'"),
    "empty file": ("x.csv", b"", "no records"),
    "header only": ("x.tsv", b"a\tb\n", "no records"),
    "no rows": ("x.parquet", parquet_bytes([{"a": "1"}][:0]), "no records"),
    "invalid UTF-8": ("x.txt", b"fine\nab\xff\n", r"x\.txt:2: invalid UTF-8 \(0xff\) at byte 3"),
    "no gzip": ("x.txt.gz", b"plain text", r"cannot read '.*x\.txt\.gz'"),
    "gzip cut short": ("x.txt.gz", gzip.compress(b"line\n" * 1000)[:-12], r"cannot read '.*x\.txt\.gz'"),
    "gzip with a flipped byte": ("x.txt.gz", gzip.compress(b"line\n")[:-6] + b"abcdef", r"cannot read '.*x\.txt\.gz'"),
    "no zstandard": ("x.txt.zst", b"plain text", r"cannot read '.*x\.txt\.zst'"),
    "zstandard cut short": ("x.txt.zst", zstandard.compress(b"line\n" * 9)[:-3], r"cannot read '.*x\.txt\.zst'"),
    "no Parquet": ("x.parquet", b"plain text", r"cannot read '.*x\.parquet' as Parquet"),
    "null in Parquet": ("x.parquet", parquet_bytes([{"a": "1"}, {"a": None}]), r"x\.parquet:2: column 'a' is null"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD.values(), ids=BAD)
def test_content_that_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    columns = ("text",) if ".txt" in name else ("a",)
    with pytest.raises(InputError, match=message) as error:
        list(read_records(str(tmp_path / name), columns))
    assert "\n" not in str(error.value)


def test_paths_that_name_no_file(tmp_path):
    (tmp_path / "x.docx").write_text("x")
    for path, message in {
        f"{tmp_path}/missing.txt": "no file matches '.*missing.txt'",
        f"{tmp_path}/*.jsonl": r"no file matches '.*\*\.jsonl'",
        str(tmp_path): "is a directory; give its files",
        f"{tmp_path}/x.docx": r"unknown suffix '\.docx'; allowed: \.txt .*\.parquet, plain or with \.gz or \.zst",
    }.items():
        with pytest.raises(InputError, match=message):
            read_records(path)  # at once, before the first record is asked for


@pytest.mark.parametrize("suffix", CONTENT)
def test_check_columns_names_the_columns_and_the_nearest(tmp_path, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(CONTENT[suffix])
    with pytest.raises(InputError, match=re.escape(f"column 'aa' is not in {file}; its columns are: a, b; did you")):
        check_columns(str(file), ("a", "aa"))
    with pytest.raises(InputError, match="column 'aa' is not in"):
        list(read_records(str(file), ("a", "aa")))


def test_check_columns_reads_the_first_record_only(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "1"}\nnot JSON\n')
    check_columns(str(tmp_path / "x.jsonl"), ("a",))


def records(spec, **more):
    return [record for _, record in open_source(spec, **more).records()]


def test_a_mapping_says_more_than_a_string(tmp_path):
    (tmp_path / "x.data").write_bytes("q\ta\nwhy?\tweil\n\xe9\n".encode("latin-1"))
    spec = {"path": str(tmp_path / "x.data"), "format": "tsv", "encoding": "latin-1", "on_error": "skip"}
    reasons = []
    source = open_source(spec | {"columns": {"inputs": "q"}, "split": None})
    rows = list(source.records(lambda *why: reasons.append(why)))
    assert rows == [(f"{tmp_path}/x.data:2", {"a": "weil", "inputs": "why?"})]
    assert reasons == [(f"{tmp_path}/x.data:3", "1 fields where the header has 2 (q, a)")]
    assert source.reading == Reading("skip", "latin-1")
    check_columns(source, ("inputs", "a"))
    with pytest.raises(InputError, match=r"column 'q' is not in .*x\.data; its columns are: a, inputs"):
        check_columns(source, ("q",))
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    paths = [f"{tmp_path}/b.txt", f"{tmp_path}/?.txt"]
    expected = [{"text": name} for name in ("b.txt", "a.txt", "b.txt")]
    assert records({"path": paths}) == records(paths) == records(",".join(paths)) == expected


def test_columns_are_renamed_and_read_by_their_names_in_the_file(tmp_path):
    rows = [{"question": "q", "answer": "a", "id": 7}]
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(rows))
    spec = {"path": str(tmp_path / "x.parquet"), "columns": {"inputs": "question", "again": "question", "answer": "id"}}
    assert records(spec) == [{"inputs": "q", "again": "q", "answer": 7}]
    source = open_source(spec | {"columns": {"inputs": "question"}})
    assert list(source.records(columns=("inputs",))) == [(f"{tmp_path}/x.parquet:1", {"inputs": "q"})]
    with pytest.raises(InputError, match=r"x\.parquet:1: column 'qestion' is not in the record; .*mean 'question'"):
        records(spec | {"columns": {"inputs": "qestion"}})


MAPPINGS = {
    "unknown key": ({"pth": "x.txt"}, "a source has no 'pth', allowed: path, format, .*did you mean 'path'"),
    "no path": ({"format": "text"}, "the path of a source is None"),
    "empty path": ({"path": ""}, "the path of a source is '', it must be a string or several, not empty"),
    "format": ({"path": "FILE", "format": "jsonlines"}, "format 'jsonlines' is unknown, allowed: .*mean 'jsonl'"),
    "encoding": ({"path": "FILE", "encoding": "latin-7000"}, "encoding 'latin-7000' is unknown.*did you mean"),
    "on_error": ({"path": "FILE", "on_error": "ignore"}, "on_error is 'ignore', allowed: raise, skip"),
    "max_record_bytes": ({"path": "FILE", "max_record_bytes": "1MB"}, "max_record_bytes is '1MB', it must be an int"),
    "split": ({"path": "FILE", "split": "train"}, "has no splits; split=train is for tfds: and directories of"),
    "data_dir for files": ({"path": "FILE", "data_dir": "/d"}, "needs no data_dir=/d, which is for tfds:NAME"),
    "columns": ({"path": "FILE", "columns": ["a"]}, "'columns' of a source is .*, it must map wanted names"),
    "data_dir": ({"path": "FILE", "data_dir": 3}, "'data_dir' of a source is 3, it must be a string"),
}


@pytest.mark.parametrize(("spec", "message"), MAPPINGS.values(), ids=MAPPINGS)
def test_mappings_that_make_no_sense(tmp_path, spec, message):
    (tmp_path / "x.txt").write_text("x")
    if spec.get("path") == "FILE":
        spec = spec | {"path": str(tmp_path / "x.txt")}
    with pytest.raises(InputError, match=message):
        open_source(spec)


def test_empty_files_among_others_have_no_records(tmp_path):
    for name, text in {"a.jsonl": "", "b.jsonl": '{"a": 1}\n', "c.jsonl": "\n"}.items():
        (tmp_path / name).write_text(text)
    assert records(f"{tmp_path}/*.jsonl") == [{"a": 1}]
    with pytest.raises(InputError, match=r"no records in '.*a\.jsonl': empty"):
        open_source(f"{tmp_path}/a.jsonl")
    with pytest.raises(InputError, match=r"no records in '.*c\.jsonl'"):
        check_columns(f"{tmp_path}/c.jsonl", ("a",))


def test_the_identity_changes_when_the_data_may_have(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n')
    os.utime(file, ns=(1, 1))
    first = open_source(str(file)).identity
    assert json.loads(first)["data"] == [[[str(file), 9, "1"]]]
    os.utime(file, ns=(2, 2))
    touched = open_source(str(file)).identity
    file.write_text('{"a": 11}\n')
    os.utime(file, ns=(1, 1))
    grown = open_source(str(file)).identity
    os.utime(file, ns=(2, 2))
    specs = ({}, {"on_error": "skip"}, {"columns": {"b": "a"}}, {"encoding": "latin-1"}, {"format": "text"})
    others = [open_source({"path": str(file)} | spec).identity for spec in specs]
    corpus = open_source("stdlib").identity
    assert len({first, touched, grown, corpus, *others}) == 9
    file.write_text('{"a": 1}\n')
    os.utime(file, ns=(1, 1))
    assert open_source(str(file), part_bytes=2).identity == first
    assert platform.python_version() in corpus


def test_a_path_with_the_home_directory_and_one_relative(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("one\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert records("~/x.txt") == records("x.txt") == [{"text": "one"}]
    assert open_source("~/x.txt").identity == open_source("x.txt").identity


@pytest.fixture
def store():
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", CONTENT)
def test_remote_files(store, suffix, compression):
    for name in ("b", "a"):
        store.pipe(f"/d/{name}{suffix}{compression}", compress(CONTENT[suffix], compression))
    source = open_source(f"memory://d/*{suffix}{compression}", part_bytes=20)
    assert [record for _, record in source.records()] == ROWS * 2
    assert (len(source.parts) > 2) == (not compression and suffix in (".jsonl", ".json", ".tsv"))
    assert records(f"memory://d/a{suffix}{compression}") == ROWS
    check_columns(f"memory://d/b{suffix}{compression}", ("a", "b"))


def test_remote_arrow_and_saved_datasets(store):
    table = pyarrow.Table.from_pylist(ROWS * 9)
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    store.pipe("/d/saved/data.arrow", stream.getvalue())
    store.pipe("/d/saved/state.json", json.dumps({"_data_files": [{"filename": "data.arrow"}]}).encode())
    for spec in ("memory://d/saved", "memory://d/saved/data.arrow"):
        source = open_source(spec, part_bytes=500)
        assert len(source.parts) > 1
        assert [record for _, record in source.records()] == ROWS * 9


def test_remote_mistakes(store, monkeypatch):
    store.pipe("/d/x.jsonl", b'{"a": "1"}\n' * 5 + b"{\n")
    with pytest.raises(InputError, match=r"memory://d/x\.jsonl:6: not a JSON object"):
        list(open_source("memory://d/x.jsonl", part_bytes=25).records())
    identity = open_source("memory://d/x.jsonl").identity
    store.pipe("/d/x.jsonl", b'{"a": "1"}\n' * 5 + b"{\n")
    assert open_source("memory://d/x.jsonl").identity != identity
    store.pipe("/d/x.txt.gz", gzip.compress(b"line\n" * 99)[:-9])
    with pytest.raises(InputError, match=r"cannot read 'memory://d/x\.txt\.gz'"):
        records("memory://d/x.txt.gz")
    for spec in ("memory://d/y.jsonl", "memory://d/*.csv"):
        with pytest.raises(InputError, match=re.escape(f"no file matches '{spec}'")):
            open_source(spec)
    with pytest.raises(InputError, match="'memory://d' is a directory; give its files"):
        open_source("memory://d")
    with pytest.raises(InputError, match="'memry://d/x': unknown protocol 'memry'; did you mean 'memory'"):
        open_source("memry://d/x")
    for url, extra in {"gs://b/x.txt": "gcs", "s3://b/*.jsonl": "s3"}.items():
        for library in ("gcsfs", "s3fs"):
            monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(InputError, match=re.escape(f"'{url}' needs an extra: pip install 't5x_lite[{extra}]'")):
            open_source(url)


def test_the_text_of_a_column():
    record = {"text": "x", "n": 3, "flag": True, "none": None, "list": ["a"], "bytes": b"\xff", "array": np.zeros(2)}
    record["utf8"] = "é".encode()
    texts = {name: text_of("f:1", record, name) for name in ("n", "text", "flag", "utf8")}
    assert texts == {"n": "3", "text": "x", "flag": "True", "utf8": "é"}
    for name, message in {
        "txt": "column 'txt' is not in f:1; its columns are: text, n, .*did you mean 'text'",
        "none": "f:1: column 'none' is null",
        "list": "f:1: column 'list' is a list, not a text",
        "array": "f:1: column 'array' is a ndarray, not a text",
        "bytes": "f:1: column 'bytes' is not valid UTF-8 at byte 1",
    }.items():
        with pytest.raises(InputError, match=message):
            text_of("f:1", record, name)


def test_a_place_in_a_later_part_is_located(tmp_path):
    path = tmp_path / "a file.jsonl"
    path.write_text('{"a": "1"}\n' * 30 + '{"b": "2"}\n')
    source = open_source(str(path), part_bytes=100)
    where, record = list(source.read(len(source.parts) - 1))[-1]
    with pytest.raises(InputError, match=r"column 'a' is not in .*a file\.jsonl:31; its"):
        list(in_batches(TextEncoder(ByteTokenizer(), "a").texts, [(where, record)], None))
    assert locate(f"'{where}' and more") == f"'{path}:31' and more"
    assert locate("x@3+4: no such file") == "x@3+4: no such file"


REAL = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not REAL.exists(), reason="the real data is not here")
@pytest.mark.parametrize("part_bytes", [50_000, 1 << 24])
def test_published_data(part_bytes):
    count = lambda path, **spec: len(records({"path": str(REAL / path)} | spec, part_bytes=part_bytes))  # noqa: E731
    assert count("tasks/gsm8k/train.jsonl") == 7473
    assert count("tasks/sst2/train.tsv", format="text") == 6920
    assert count("tasks/copa-superglue/*.jsonl") == 500
    assert count("tasks/boolq/train.json") == 9427  # one array
    assert count("tasks/small-parallel-enja/train.*", format="text") == 100_000
