"""What a setting or a preprocessor is, as a text that is the same in every process and changes when it does."""

import dataclasses
import enum
import functools
import hashlib
import inspect
import pickle
import re
import types
from collections.abc import Mapping
from typing import Any


def identity_of(value: Any) -> str:
    """Returns a text that changes when `value` does: for functions and classes, when their source text does.

    What a function calls is not looked at, except for what it is closed over. An object whose attribute `identity` is a
    text speaks for itself.
    """
    return _identity(value, ())


def _identity(value: Any, above: tuple[int, ...]) -> str:
    if id(value) in above:  # a function that calls itself by way of its closure
        return "..."
    within = functools.partial(_identity, above=(*above, id(value)))
    if value is None or isinstance(value, str | int | float | bytes | enum.Enum | re.Pattern):
        return repr(value)
    own = None if isinstance(value, type) else getattr(value, "identity", None)
    if isinstance(own, str):
        return own
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{within(key)}: {within(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(within, value)) + ")"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(within, value))) + "}"
    if isinstance(value, functools.partial):
        return f"partial{within((value.func, value.args, value.keywords))}"
    if isinstance(value, type) or inspect.isroutine(value):
        return _named(value) + within(_bound(value))
    if dataclasses.is_dataclass(value):
        state: Any = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        state = getattr(value, "__dict__", None)
    if state is None:  # such as an array
        return f"{_named(type(value))}{hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()[:16]}"
    return _named(type(value)) + within(state)


def _named(value: Any) -> str:
    name = f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    try:
        source = inspect.getsource(value)
    except (OSError, TypeError):  # typed into an interpreter, or not written in Python
        code = getattr(value, "__code__", None)
        source = "" if code is None else _code(code)
    return f"{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}" if source else name


def _code(code: types.CodeType) -> str:
    constants = [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code!r} {code.co_names} {code.co_varnames} {constants}"


def _bound(value: Any) -> tuple[Any, ...]:
    """Returns what comes with a function: the object that it is a method of, default values, what it is closed over."""
    owner = getattr(value, "__self__", None)
    bound = () if owner is None or isinstance(owner, types.ModuleType) else (owner,)
    defaults = (getattr(value, "__defaults__", None) or (), getattr(value, "__kwdefaults__", None) or {})
    cells = getattr(value, "__closure__", None) or ()
    return (*bound, *(part for part in defaults if part), *(_content(cell) for cell in cells))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None
