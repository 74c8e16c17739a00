import gzip
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from t5x_lite.data import sources
from t5x_lite.data.sources import check_columns, read_records
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
