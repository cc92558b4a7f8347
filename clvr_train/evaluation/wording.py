"""The questions of a benchmark in its authors' own words, read from the scorer's source without running it.

What a judge is asked decides its scores, so the words are taken from the checkout, and none of them is kept here. Only
literals, f-strings over given values, names and straight assignments are understood; anything else is no wording.
"""

import ast
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
_BOUND = 4 << 20  # bytes of a source file


class NoWording(ValueError):
    """The source is not there, or is not written as it was when this reader was."""


def function_value(path: Path, name: str, given: Mapping[str, Any]) -> Any:
    """What a function of the file returns where its arguments are `given`: texts, lists and mappings of them.

    Raises:
        NoWording: there is no such function, or it does more than put texts together.
    """
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            names = dict(given)
            for statement in node.body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    names[statement.targets[0].id] = _value(statement.value, names)
                elif isinstance(statement, ast.Return) and statement.value is not None:
                    return _value(statement.value, names)
                elif not isinstance(statement, ast.Expr):  # a docstring
                    break
    raise NoWording(f"{path}: no function {name} that returns texts")


def constant(path: Path, name: str) -> str:
    """The text that a name of the file stands for. Raises NoWording."""
    for node in _tree(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            text = _value(node.value, {})
            if isinstance(text, str):
                return text
    raise NoWording(f"{path}: no text {name}")


def _tree(path: Path) -> ast.Module:
    try:
        if path.stat().st_size > _BOUND:
            raise NoWording(f"{path}: too long")
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoWording(f"{path}: {error.strerror}") from None
    except (ValueError, SyntaxError, RecursionError) as error:
        raise NoWording(f"{path}: {error}") from None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Subscript(value=inner, slice=ast.Constant(value=key)):
            try:
                return _value(inner, names)[key]
            except (LookupError, TypeError):
                raise NoWording(f"no value for [{key!r}]") from None
        case ast.JoinedStr(values=values):
            return "".join(str(_value(value, names)) for value in values)
        case ast.FormattedValue(value=inner, conversion=-1, format_spec=None):
            return _value(inner, names)
        case ast.List(elts=elements):
            return [_value(element, names) for element in elements]
        case ast.Dict(keys=keys, values=values) if all(keys):
            return {_value(k, names): _value(v, names) for k, v in zip(keys, values, strict=True)}
    raise NoWording(f"line {getattr(node, 'lineno', '?')} is more than texts put together")


def without(error: NoWording) -> str:
    """Says that the questions are in this project's words, and why; returns what is recorded as their origin."""
    logger.warning("the judge is asked in clvr_train's own words (%s): not to be compared with published scores", error)
    return "clvr_train"
