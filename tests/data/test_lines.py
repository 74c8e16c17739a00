"""Lines one by one: what is in a good one, and what a bad one says instead."""

import gzip
import json

import pytest

from t5x_lite.data.lines import Column, Line, LineFile
from t5x_lite.errors import InputError

TEXT = Column(("input", "text"))
PAIR = (Column(("inputs",), ""), Column(("targets",)))


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def test_text_has_a_text_on_every_line(tmp_path):
    path = written(tmp_path, "x.txt", "\ufeffone\r\n\n three\x0cé \u2028 \nfour".encode())
    file = LineFile(path, [TEXT])
    assert list(file.read()) == [
        Line(1, ("one",)), Line(2, ("",)), Line(3, (" three\x0cé \u2028 ",)), Line(4, ("four",))
    ]  # fmt: skip
    assert file.count == 4
    assert [line.values for line in LineFile(written(tmp_path, "r.txt", b"a\r\r\nb\r"), [TEXT]).read()] == [
        ("a\r",), ("b\r",)
    ]  # fmt: skip
    marked = next(LineFile(written(tmp_path, "m.txt", "\ufeffa".encode() + b"\xff"), [TEXT]).read())
    assert marked.error == "not valid UTF-8 (0xff at byte 2)"
    assert next(LineFile(path, PAIR).read()) == Line(1, ("", "one"))
    with pytest.raises(InputError, match=r"one text a line; inputs and targets of a line go into a file of .jsonl"):
        LineFile(path, [Column(("inputs",)), Column(("targets",))])


def test_a_bad_line_does_not_keep_the_others_from_being_read(tmp_path):
    lines = [
        b'{"text": "a", "more": 1}',
        b"   ",
        b'{"text": "a"',
        b'["a"]',
        b'{"txt": "a"}',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "b", "input": "c"}',
        b"[" * 100_000,
        b"9" * 5000,
        b"{}",
        b'{"\\ud800": "x", "inputs\\n": 1, "\xc3\xa9": 1}',
        json.dumps({f"{n} " + "long " * 9: 1 for n in range(5000)}).encode(),
        b"null",
    ]
    file = LineFile(written(tmp_path, "x.jsonl", b"\n".join(lines)), [TEXT])
    read = {line.number: line.error or line.values[0] for line in file.read()}
    assert read.pop(3).startswith("not a JSON object on one line (")
    assert read.pop(10).startswith("not a JSON object on one line (")
    assert read.pop(11).startswith("not a JSON object on one line (")
    long = read.pop(14)
    assert len(long) < 600
    assert long.endswith("9 long long long long long long long lon and 4990 more")
    assert read == {
        1: "a",
        4: "a JSON list, not an object",
        5: "no field 'input' or 'text'; the fields are: txt",
        6: "field 'text' is 5, not a text",
        7: "field 'text' has half of a surrogate pair, which is no character",
        8: "not valid UTF-8 (0xff at byte 11)",
        9: "c",
        12: "no field 'input' or 'text'; the fields are: none",
        13: r"no field 'input' or 'text'; the fields are: \ud800, inputs\n, \u00e9; did you mean 'inputs\n'?",
        15: "a JSON null, not an object",
    }
    assert file.count == 14
    bad = next(LineFile(written(tmp_path, "y.jsonl", b'{"a\\n": 1}'), [Column(("a\n",))]).read())
    assert bad.error == r"field 'a\n' is 1, not a text"
    half = next(LineFile(written(tmp_path, "y.jsonl", b'{"a\\n": "\\ud800"}'), [Column(("a\n",))]).read())
    assert half.error.startswith(r"field 'a\n' has half")
    assert next(LineFile(file.path, [Column(("\ud800\n",))]).read()).error.startswith(r"no field '\ud800\n'")


def test_a_table_names_its_columns_first(tmp_path):
    path = written(tmp_path, "x.tsv", b'targets\tn\n"a\t1\n\nb\nc\t2\t3\n')
    read = list(LineFile(path, PAIR).read())
    assert read[0] == Line(2, ("", '"a'))
    assert [(line.number, line.error) for line in read[1:]] == [
        (4, "1 fields where the first line has 2"),
        (5, "3 fields where the first line has 2"),
    ]
    with pytest.raises(InputError, match=r"x.tsv:1: no field 'target'; the fields are: targets, n; did you mean"):
        LineFile(path, [Column(("target",))])
    with pytest.raises(InputError, match=r"y.tsv:1: more than one column is called 'b'"):
        LineFile(written(tmp_path, "y.tsv", b"targets\tb\tb\na\t1\t2\n"), PAIR)
    with pytest.raises(InputError, match=r"has no row of names: not valid UTF-8"):
        LineFile(written(tmp_path, "bad.tsv", b"\xff\na"), PAIR)


def test_reading_goes_on_anywhere(tmp_path):
    content = "".join(json.dumps({"text": str(n)}) + "\n" * (1 + n % 2) for n in range(9)).encode()
    for name in ("x.jsonl", "x.jsonl.gz"):
        file = LineFile(written(tmp_path, name, content), [TEXT])
        lines = list(file.read())
        assert [line.values[0] for line in lines] == [*map(str, range(9))]
        assert file.count == 9
        assert [list(file.read(start)) for start in (4, 9)] == [lines[4:], []]


def test_a_file_is_known_by_what_it_says(tmp_path):
    plain = LineFile(written(tmp_path, "a.txt", b"one\ntwo\n"), [TEXT])
    assert LineFile(written(tmp_path, "b.txt.gz", b"one\ntwo\n"), [TEXT]).sha256 == plain.sha256
    assert LineFile(written(tmp_path, "c.txt", b"one\ntwo"), [TEXT]).sha256 != plain.sha256


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"a", "must end in .txt .text .jsonl .json .tsv, plain or with .gz"),
        ("x.txt", b"", "x.txt has no lines"),
        ("x.jsonl", b"\n \n", "x.jsonl has no lines"),
        ("x.tsv", b"input\n", "x.tsv has no lines"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, words):
    with pytest.raises(InputError, match=words):
        LineFile(written(tmp_path, name, content), [TEXT])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*x.txt: No such file"):
        LineFile(tmp_path / "x.txt", [TEXT])
    (tmp_path / "dir.txt").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        LineFile(tmp_path / "dir.txt", [TEXT])
    whole = gzip.compress(b"a line\n" * 1000)
    for content in (whole[:-9], b"no gzip"):
        (tmp_path / "x.txt.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*x.txt.gz: "):
            LineFile(tmp_path / "x.txt.gz", [TEXT])
