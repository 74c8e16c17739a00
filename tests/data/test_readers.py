"""Lines and JSON arrays: parts of any size, encodings, records that are malformed or too long, memory."""

import gc
import gzip
import io
import json
import pickle
import random
import tracemalloc
import warnings

import pytest
import zstandard

from t5x_lite.data import readers
from t5x_lite.data.parts import Reading, locate
from t5x_lite.data.sources import open_source, read_records
from t5x_lite.errors import InputError

SKIP = Reading(on_error="skip")


def whole(path, reading=None):
    return [record for _, record in open_source(str(path), reading).records()]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def random_text(rng, kind):
    """Some lines of `text`, `jsonl` or `tsv`: short and long ones, blank ones, both line ends, several scripts."""
    lines = ["a\tb"] if kind == "tsv" else []
    for number in range(rng.randrange(12)):
        word = "".join(rng.choice("ab é日\u2028\x0c😀") for _ in range(rng.choice((0, 1, 3, 40))))
        if kind == "text":
            lines.append(word)
        else:
            values = {"a": word, "b": str(number)}
            lines.append("\t".join(values.values()) if kind == "tsv" else json.dumps(values, ensure_ascii=False))
            lines += [""] * rng.randrange(2)
    text = "".join(line + rng.choice(("\n", "\r\n")) for line in lines)
    return rng.choice(("", "\ufeff")) + (text if rng.randrange(2) else text.rstrip("\r\n"))


@pytest.mark.parametrize("kind", ["text", "jsonl", "tsv"])
def test_every_record_is_in_one_part_whatever_the_size_of_parts(tmp_path, kind, monkeypatch):
    rng = random.Random(kind)
    for _ in range(40):
        text = random_text(rng, kind)
        path = write(tmp_path / f"x.{kind.replace('text', 'txt')}", text)
        if not text.strip("\ufeff"):
            continue
        lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
        monkeypatch.setattr(readers, "_BLOCK", rng.choice((1, 2, 7, 1 << 16)))
        expected = None
        for part_bytes in (10**9, rng.randrange(1, 9), rng.randrange(9, 60)):
            source = pickle.loads(pickle.dumps(open_source(str(path), part_bytes=part_bytes)))
            assert len(source.parts) == -(-path.stat().st_size // part_bytes)
            # Read last to first: a part needs no other.
            rows = [list(source.read(index)) for index in reversed(range(len(source.parts)))]
            rows = [row for part in reversed(rows) for row in part]
            for where, record in rows:
                file, _, number = locate(where).rpartition(":")
                line = lines[int(number) - 1].removesuffix("\r")
                shown = {"text": record.get("text"), "jsonl": json.dumps(record, ensure_ascii=False)}
                assert file == str(path)
                assert line == shown.get(kind, "\t".join(record.values()))
            expected = expected or [record for _, record in rows]
            assert [record for _, record in rows] == expected
            if expected:
                assert list(source.records()) == rows


@pytest.mark.parametrize("kind", ["text", "jsonl", "tsv"])
def test_malformed_records_are_in_one_part_too(tmp_path, kind, monkeypatch):
    """Lines that are too long, also longer than several parts, and lines that are not UTF-8."""
    rng = random.Random(kind)
    for _ in range(60):
        lines = [rng.choice(("good", "x" * rng.randrange(25, 200), "b\xff", "")) for _ in range(rng.randrange(1, 12))]
        if kind == "jsonl":
            lines = [json.dumps({"a": line}, ensure_ascii=False) for line in lines]
        path = tmp_path / f"x.{kind.replace('text', 'txt')}"
        text = "\n".join(["a", *lines] if kind == "tsv" else lines) + rng.choice(("", "\n"))
        path.write_bytes(text.encode("latin-1"))
        if not text:
            continue
        reading = Reading("skip", max_record_bytes=rng.choice((20, 40, 10**6)))
        monkeypatch.setattr(readers, "_BLOCK", rng.choice((1, 3, 30, 1 << 16)))
        expected = None
        for part_bytes in (10**9, *(rng.randrange(1, 150) for _ in range(4))):
            source, skipped, rows = open_source(str(path), reading, part_bytes), [], []
            for index in range(len(source.parts)):
                rows += source.read(index, lambda *why: skipped.append(why))  # noqa: B023
            found = [(locate(where), what) for where, what in rows], [(locate(where), why) for where, why in skipped]
            expected = expected or found
            assert found == expected, part_bytes
        assert len(expected[1]) == sum("\xff" in line or len(line) > reading.max_record_bytes for line in lines)


def test_what_cannot_be_cut_is_one_part(tmp_path):
    line = '{"a": "é"}\n' * 20
    for name, data in {
        "x.csv": ("a\n" + "é\n" * 20).encode(),
        "x.jsonl.gz": gzip.compress(line.encode()),
        "x.jsonl.zst": zstandard.compress(line.encode()),
        "array.json": ("[" + ",".join(['{"a": "é"}'] * 20) + "]").encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        source = open_source(str(tmp_path / name), part_bytes=1)
        assert len(source.parts) == 1
        assert [record for _, record in source.records()] == [{"a": "é"}] * 20
    write(tmp_path / "x.jsonl", line, "utf-16")
    assert len(open_source(str(tmp_path / "x.jsonl"), Reading(encoding="utf-16"), part_bytes=1).parts) == 1
    write(tmp_path / "lines.json", line)
    assert len(open_source(str(tmp_path / "lines.json"), part_bytes=60).parts) == 4


def test_c4_as_allenai_publishes_it(tmp_path):
    record = {"text": "Beginners BBQ\nClass \u2019s", "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b/c"}
    for shard in range(2):
        lines = (json.dumps(record | {"url": f"{shard}/{number}"}) + "\n" for number in range(3))
        (tmp_path / f"c4-train.{shard:05}-of-01024.json.gz").write_bytes(gzip.compress("".join(lines).encode()))
    source = open_source(f"{tmp_path}/c4-train.*.json.gz")
    assert len(source.parts) == 2
    assert [row[1]["url"] for row in source.records()] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert next(source.read(1)) == (f"{tmp_path}/c4-train.00001-of-01024.json.gz:1", record | {"url": "1/0"})


ENCODINGS = ["utf-8", "UTF8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "shift_jis", "iso2022_jp", "gb18030"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(tmp_path, encoding):
    rows = [{"a": "日本, the", "b": "語"}, {"a": "あ", "b": "second"}]
    for name, text in {
        "x.txt": "日本, the\n\nあ\n",
        "x.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "x.json": json.dumps(rows, ensure_ascii=False),
        "x.tsv": "a\tb\r\n日本, the\t語\r\nあ\tsecond",
        "x.csv": 'a,b\n"日本, the",語\nあ,second\n',
    }.items():
        records = whole(write(tmp_path / name, text, encoding), Reading(encoding=encoding))
        assert records == ([{"text": row["a"]} for row in rows] if name == "x.txt" else rows), name


def test_single_byte_encodings(tmp_path):
    path = write(tmp_path / "x.txt", "caf\u00e9 \u20ac\n", "cp1252")
    assert whole(path, Reading(encoding="windows-1252")) == [{"text": "café €"}]
    assert whole(path, Reading(encoding="latin-1")) == [{"text": "café \x80"}]


GOOD = {".txt": b"one\n", ".jsonl": b'{"a": "1"}\n', ".tsv": b"1\t2\n", ".csv": b"1,2\n"}
BAD = {
    ".txt": (b"ab\xff\n", r":8: invalid UTF-8 \(0xff\) at byte 3"),
    ".jsonl": (b'{"a": \n', r":8: not a JSON object on one line \(Expecting value\)"),
    ".tsv": (b"1\t2\t3\n", r":8: 3 fields where the header has 2 \(a, b\)"),
    ".csv": (b'1,"2"2\n', r":8: ',' expected after '\"'"),
}
HEADERS = {".tsv": b"a\tb\n", ".csv": b"a,b\n"}


@pytest.mark.parametrize("suffix", GOOD)
@pytest.mark.parametrize("part_bytes", [1 << 24, 12])
def test_a_malformed_record_raises_or_is_skipped_and_counted(tmp_path, suffix, part_bytes):
    path = tmp_path / f"x{suffix}"
    bad, message = BAD[suffix]
    before = HEADERS.get(suffix, GOOD[suffix]) + GOOD[suffix] * 6
    path.write_bytes(before + bad + GOOD[suffix] * 3)
    with pytest.raises(InputError, match=str(path) + message):
        list(open_source(str(path), part_bytes=part_bytes).records())
    source = open_source(str(path), SKIP, part_bytes)
    skipped = []
    records = list(source.records(lambda *why: skipped.append(why)))
    assert len(records) == 9 + (suffix not in HEADERS)
    assert [locate(where) for where, _ in skipped] == [f"{path}:8"]
    assert len(list(source.records())) == len(records)


@pytest.mark.parametrize("suffix", HEADERS)
def test_a_header_is_not_skipped(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"\xff" + HEADERS[suffix] + GOOD[suffix] * 2)
    with pytest.raises(InputError, match=r":1: invalid UTF-8 \(0xff\) at byte 1"):
        whole(path, SKIP)


@pytest.mark.parametrize("encoding", ["utf-16-le", "shift_jis", "ascii"])
def test_bytes_that_are_not_of_the_encoding(tmp_path, encoding):
    bad = b"\x00\xd8\n\x00" if encoding == "utf-16-le" else b"ab\xff\n"
    path = tmp_path / "x.txt"
    path.write_bytes("one\ntwo\n".encode(encoding) + bad + "four\n".encode(encoding))
    place = r" \(0xff\) at byte 3" if encoding != "utf-16-le" else "$"
    with pytest.raises(InputError, match=rf"x\.txt:3: invalid {encoding}{place}"):
        whole(path, Reading(encoding=encoding))
    skipped = []
    source = open_source(str(path), Reading("skip", encoding))
    assert [row[1]["text"] for row in source.records(lambda *why: skipped.append(why))] == ["one", "two", "four"]
    assert [where for where, _ in skipped] == [f"{path}:3"]


def test_invalid_bytes_inside_a_quoted_field_spoil_their_record_alone(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'a,b\n"x\n\xff\ny",1\nz,2\n')
    with pytest.raises(InputError, match=r"x\.csv:4: invalid UTF-8 \(0xff\) at byte 1"):
        whole(tmp_path / "x.csv")
    assert whole(tmp_path / "x.csv", SKIP) == [{"a": "z", "b": "2"}]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".tsv", ".csv", ".json"])
@pytest.mark.parametrize("block", [1, 5, 1 << 16])
def test_records_that_are_too_long(tmp_path, suffix, block, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK", block)
    short, long = "x" * 20, "x" * 21
    rows = [{"a": short}, {"a": long}, {"a": short}]
    values = [row["a"] for row in rows]
    lines = {".txt": values, ".tsv": ["a", *values], ".csv": ["a", *values], ".json": [json.dumps(rows)]}
    text = "\n".join(lines.get(suffix) or [json.dumps(row) for row in rows])
    path = write(tmp_path / f"x{suffix}", text)
    limit = 29 if "json" in suffix else 21 if suffix == ".csv" else 20  # the line end of a CSV record is part of it
    number = 1 if suffix == ".json" else 2 + (suffix in HEADERS)
    with pytest.raises(InputError, match=rf"x\{suffix}:{number}: longer than max_record_bytes={limit}"):
        whole(path, Reading(max_record_bytes=limit))
    kept = [next(iter(record.values())) for record in whole(path, Reading("skip", max_record_bytes=limit))]
    assert kept == [short, short]
    assert len(whole(path, Reading(max_record_bytes=limit + 1))) == 3


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json"])
def test_an_endless_line_is_not_held_in_memory(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with path.open("wb") as file:
        file.write({".csv": b'a\n"', ".json": b'[{"'}.get(suffix, b""))
        file.truncate(32 << 20)  # zeros, which the disk does not hold either
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="longer than max_record_bytes=1000000"):
            whole(path, Reading(max_record_bytes=1_000_000))
        # Of the limit a small multiple: the pieces, the whole of them, and their text.
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.jsonl.zst"])
def test_memory_stays_flat(tmp_path, name):
    rows = [{"a": str(number) * 200} for number in range(8_000)]  # 6 MB
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "x.json":
        text = json.dumps(rows)
    if name == "x.csv":
        text = "a\n" + "".join(row["a"] + "\n" for row in rows)
    data = text.encode()
    compress = {"x.jsonl.gz": gzip.compress, "x.jsonl.zst": zstandard.compress}.get(name, bytes)
    (tmp_path / name).write_bytes(compress(data))
    tracemalloc.start()
    try:
        count = sum(1 for _ in open_source(str(tmp_path / name)).records())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == len(rows)
    assert peak < 2_000_000  # buffers, and the lines of a block; the data has three times that


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_files_are_closed(tmp_path, name):
    compress = {"x.jsonl.gz": gzip.compress, "x.jsonl.zst": zstandard.compress}.get(name, bytes)
    (tmp_path / name).write_bytes(compress(b'{"a": 1}\n' * 9))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        rows = open_source(str(tmp_path / name)).records()
        next(rows)
        rows.close()
        del rows
        gc.collect()
    assert not [warning for warning in warned if issubclass(warning.category, ResourceWarning)]


@pytest.mark.parametrize("peeked", [1, 3, 10, 1 << 16])
def test_json_arrays(tmp_path, peeked, monkeypatch):
    monkeypatch.setattr(readers, "_PEEKED", peeked)
    rows = [{"a": 'x"]},{[\\', "n": {"b": [1, 2, {"c": None}]}}, {}, {"a": "é😀"}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), "\ufeff " + json.dumps(rows) + "\n"):
        # With a window of one byte only the first decides, so that the blank has to go.
        assert whole(write(tmp_path / "x.json", text.lstrip("\ufeff ") if peeked < 8 else text)) == rows
    write(tmp_path / "x.json", "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    assert [locate(where) for where, _ in open_source(f"{tmp_path}/x.json").records()] == [
        f"{tmp_path}/x.json:{number}" for number in (2, 3, 4)
    ]


ARRAYS = {
    "empty": ("[]", "no records"),
    "cut short": ('[{"a": 1},', r"x\.json:1: a JSON array: it has no end|not a JSON object in an array"),
    "cut in a record": ('[{"a": 1}, {"a', r"x\.json:1: not a JSON object in an array \(Unterminated string"),
    "no comma": ('[{"a": 1}\n{"a": 2}]', r"x\.json:2: a JSON array: ',' or '\]' expected, not '\{'"),
    "number": ('[{"a": 1},\n7, {"a": 2}]', r"x\.json:2: a JSON int, not an object"),
    "half a surrogate pair": ('[{"a": "\\ud800"}]', r"x\.json:1: half of a surrogate pair"),
    "text behind": ('[{"a": 1}]\n{"a": 2}', r"x\.json:2: text behind the JSON array"),
}


@pytest.mark.parametrize(("text", "message"), ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("peeked", [2, 1 << 16])
def test_json_arrays_that_are_malformed(tmp_path, text, message, peeked, monkeypatch):
    monkeypatch.setattr(readers, "_PEEKED", peeked)
    with pytest.raises(InputError, match=message):
        whole(write(tmp_path / "x.json", text))


def test_invalid_bytes_in_a_json_array(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"a": "1"},\n{"a": "\xff"}]')
    with pytest.raises(InputError, match=r"x\.json:2: invalid UTF-8 \(0xff\)"):
        whole(tmp_path / "x.json")


def test_an_element_that_is_no_object_is_skipped(tmp_path):
    assert whole(write(tmp_path / "x.json", '[{"a": 1}, 7, [2], {"a": 3}]'), SKIP) == [{"a": 1}, {"a": 3}]


def test_emoji_as_ascii_spells_them(tmp_path):
    write(tmp_path / "x.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud800"}\n')
    assert whole(tmp_path / "x.jsonl") == [{"a": "😀"}, {"a": "\\ud800"}]


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"on_error": "ski"}, "on_error is 'ski', allowed: raise, skip; did you mean 'skip'"),
        ({"encoding": "utf-9"}, "encoding 'utf-9' is unknown.*did you mean 'utf_"),
        ({"encoding": "base64"}, "encoding 'base64' is unknown"),
        ({"max_record_bytes": 0}, "max_record_bytes is '0'"),
    ],
)
def test_readings_that_make_no_sense(reading, message):
    with pytest.raises(InputError, match=message):
        Reading(**reading)


def test_the_standard_input(monkeypatch):
    def give(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))

    give("one\n\ntwo é".encode())
    source = open_source("-")
    assert source.is_stream
    assert list(source.records()) == [("standard input:1", {"text": "one"}), ("standard input:3", {"text": "two é"})]
    with pytest.raises(InputError, match="the standard input has been read already"):
        list(source.records())
    with pytest.raises(InputError, match="by this process only"):
        pickle.dumps(source)
    give(b'{"a": 1}\n{"a": \n')
    with pytest.raises(InputError, match="standard input:2: not a JSON object on one line"):
        list(open_source({"path": "-", "format": "jsonl"}).records())
    give("a\tb\n1\t2\n".encode("utf-16"))
    rows = open_source({"path": "-", "format": "tsv", "encoding": "utf-16"}).records()
    assert list(rows) == [("standard input:2", {"a": "1", "b": "2"})]
    with pytest.raises(InputError, match="format parquet needs a file; the standard input is text, jsonl, json"):
        open_source({"path": "-", "format": "parquet"})
    with pytest.raises(InputError, match="the standard input is read alone"):
        open_source("-,stdlib")
    assert open_source("-").identity != open_source("-").identity


def test_the_standard_input_is_read_as_it_comes(monkeypatch):
    """A line is a record as soon as it is there: who waits for an answer need not end the input first."""
    import os
    import threading

    receiving, sending = os.pipe()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.FileIO(receiving))))
    os.write(sending, b"one\ntw")
    found = []
    thread = threading.Thread(target=lambda: found.append(next(open_source("-").records())), daemon=True)
    thread.start()
    thread.join(timeout=10)
    os.close(sending)
    assert found == [("standard input:1", {"text": "one"})]


def test_read_records_reads_parts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("t5x_lite.data.sources.PART_BYTES", 5)
    write(tmp_path / "x.txt", "one\ntwo\nthree\n")
    assert [record["text"] for record in read_records(str(tmp_path / "x.txt"))] == ["one", "two", "three"]
