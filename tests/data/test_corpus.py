import asyncio
import inspect

import pytest

from t5x_lite.data import corpus
from t5x_lite.errors import InputError

SOURCE = '''#!/usr/bin/env python3
# A first comment line that is long enough,
#   and its second line.
#########################

"""A module docstring of more than twenty characters.

    # not a comment, though it looks just like one
"""
x = 1  # a trailing comment is no block of its own
# short

def f():
    """   Does   something\tuseful with whitespace.  """
    # A comment inside of the function f.
    return """
# this line is inside a string, no comment
""" + f"""
# and so is this one, which is in an f-string {x}
"""

#: A comment for the documentation tool.
'''


def test_passages_of_a_file_in_order_of_line(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    assert corpus._passages(str(tmp_path / "m.py")) == [
        ("A first comment line that is long enough, and its second line.", "comment"),
        (
            "A module docstring of more than twenty characters. # not a comment, though it looks just like one",
            "docstring",
        ),
        ("Does something useful with whitespace.", "docstring"),
        ("A comment inside of the function f.", "comment"),
        ("A comment for the documentation tool.", "comment"),
    ]


def test_a_form_feed_does_not_shift_the_line_numbers(tmp_path):
    (tmp_path / "m.py").write_text(
        'x = 1\n\x0c\n\x0c\ny = """\n# inside a string, not a comment\n"""\n# A comment after a form feed.\n'
    )
    assert corpus._passages(str(tmp_path / "m.py")) == [("A comment after a form feed.", "comment")]


@pytest.mark.parametrize("source", [b"def f(:\n", b"# \xff\xfe not UTF-8 in any way\n", b"x = '\0'\n"])
def test_files_that_do_not_parse_are_skipped(tmp_path, source):
    (tmp_path / "m.py").write_bytes(source)
    assert corpus._passages(str(tmp_path / "m.py")) == []


def test_the_library():
    documents = list(corpus.stdlib_documents())
    assert len(documents) > 5000
    texts = [document.text for document in documents]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= 20
    assert all(text == " ".join(text.split()) for text in texts)
    assert {document.kind for document in documents} == {"docstring", "comment"}
    assert not any({"test", "tests", "lib2to3", "site-packages"} & set(d.module.split(".")) for d in documents)
    run = next(d for d in documents if d.text == " ".join(inspect.getdoc(asyncio.run).split()))
    assert (run.package, run.module, run.kind) == ("asyncio", "asyncio.runners", "docstring")
    assert any(document.module == "asyncio" for document in documents)  # __init__.py is the package itself
    assert documents == list(corpus.stdlib_documents())


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="no sources of the standard library in"):
        corpus._read_stdlib.__wrapped__()
