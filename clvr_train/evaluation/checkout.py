"""Prompts of an outside benchmark, read from its own checkout: nothing of it is shipped here.

A benchmark is a list of `Item`s, each of which becomes one picture in the file that the benchmark's scorer looks for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clvr_train.services.replies import is_unicode, strict_json

MAX_LINE_BYTES = 1 << 20  # of one prompt with all that belongs to it; the longest of the five has 5 kB
MAX_FILE_BYTES = 64 << 20
PART = "score"  # of a benchmark that asks one question of a picture
Verdicts = dict[tuple[str, str], float | str]  # (id, part) -> value, or why there is none
KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Item:
    """One picture of a benchmark: `text` is drawn into `file`, below the folder of pictures; `row` is its record."""

    id: str
    tag: str
    text: str
    file: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Judging:
    """How a judge is asked.

    `model`: the one that the authors publish their numbers with. `max_tokens` and `extra` (further fields) are those of
    their requests. `wording`: whose words the questions are. `ask(item, part, picture)` gives the messages, `picture`
    being a part of one; `read(part, text)` the value of a reply, and raises ValueError for one that has none.
    """

    model: str
    max_tokens: int
    ask: Callable[[Item, str, dict], list[dict]]
    read: Callable[[str, str], float]
    wording: str = "clvr_train"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """The benchmark's own scorer: its runs (file and arguments), where it runs, what is in its environment, and the
    judge that it asks, if any.
    """

    runs: Sequence[Sequence[str]]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    judge: str | None = None


@dataclass(frozen=True)
class Asked:
    """The judge that a scorer's script is to ask."""

    url: str
    model: str
    key: str
    workers: int


@dataclass(frozen=True)
class Benchmark:
    """An outside benchmark, as its checkout has it.

    `parts`: what is asked of each picture; a value goes from 0 to `scale`, and is 0 or 1 where `binary`. `beside`:
    further files that the scorer looks for among the pictures. `weights`: of the tags in the score. `released`: those
    of the released scorer, where they are others. `script(images, out, judge)` prepares the folder `out` and gives the
    commands; `results(out)` reads what they left there, (id, part) -> value, or the reason why there is none.
    """

    name: str
    items: Sequence[Item]
    binary: bool
    scale: float
    weights: Mapping[str, float]
    script: Callable[[Path, Path, Asked], Script]
    results: Callable[[Path], Verdicts]
    judging: Judging | None = None
    released: Mapping[str, float] | None = None
    parts: tuple[str, ...] = (PART,)
    beside: Mapping[str, str] = field(default_factory=dict)


def find(root: Path, *names: str) -> Path:
    """The first of these files that is in the checkout. Raises FileNotFoundError, naming the first."""
    if not root.is_dir():
        raise FileNotFoundError(f"benchmark.root={root}: no such folder")
    for name in names:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{root / names[0]}: not found; benchmark.root is the folder of the benchmark's checkout")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; empty lines count for nothing.

    Raises:
        ValueError: a line is too long or no JSON object, or there is none; names the line.
    """
    rows = []
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes, which no prompt is")
            if line.strip():
                rows.append(_record(line, f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"{path}: no prompts in it")
    return rows


def read_results(path: Path) -> list[dict[str, Any]]:
    """What a scorer has left, a JSON object a line; none is no error. Raises ValueError, FileNotFoundError."""
    lines = path.read_bytes().split(b"\n")
    return [_record(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]


def read_array(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON file that is one array.

    Raises:
        ValueError: it is too long, no array of objects, or empty.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: longer than {MAX_FILE_BYTES} bytes, which no file of prompts is")
    rows = _json(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: an array of prompts is needed")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, record {number}: not a JSON object")
        if len(repr(row)) > MAX_LINE_BYTES:
            raise ValueError(f"{path}, record {number}: longer than {MAX_LINE_BYTES} bytes, which no prompt is")
    if not rows:
        raise ValueError(f"{path}: no prompts in it")
    return rows


def value_of(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a record. Raises ValueError: it is missing, empty or of another kind; names record and field."""
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is not int and not value):
        raise ValueError(f"{where}: {name}: {KINDS[kind]} is needed, got {repr(value)[:60]}")
    if kind is str and ("\x00" in value or not is_unicode(value)):
        raise ValueError(f"{where}: {name}: not Unicode text")
    return value


def check_distinct(items: Sequence[Item], where: Path) -> None:
    """Raises ValueError: an id comes twice, and with it the file of its picture."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{where}: the id {item.id} comes twice")
        seen.add(item.id)


def _record(line: bytes, where: str) -> dict[str, Any]:
    row = _json(line, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    return row


def _json(content: bytes, where: str) -> Any:
    try:
        return strict_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
