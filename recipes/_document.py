"""Writes the pages that are made from the sources: docs/configuration.md and docs/code.md.

Command: python recipes/_document.py
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from clvr_train.runtime.files import write_atomic
from recipes._config import experiments

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = """# Configuration reference

Made from `conf/` by `python recipes/_document.py`; a test fails where the two differ.
`python recipes/<recipe>.py --help` prints the same keys with the values that a command would give them.

- A key is set on the command line, `key=value`, with dots between levels: `train.lr=1e-4`. A list is `key=[a,b]`.
- A **group** is a choice of several keys at once: `model=klein_4b` takes all of `conf/model/klein_4b.yaml`.
- An **experiment** (`experiment=<name>`) sets keys and groups. What the command line says comes after it.
- `???` has no default and must be given. `null` is no value. `${a.b}` is the value of another key.
"""

CODE = """# The code

Every module with the first words of its docstring, made by `python recipes/_document.py`. The rooms stand in the order
of their floors ([CONTRIBUTING.md](../CONTRIBUTING.md)): a room imports only rooms of lower floors.
"""
ROOMS = ("method", "data", "services", "runtime", "models", "rewards", "shapes", "sft", "proxy", "pprl", "inference")
ROOMS += ("evaluation",)


def rows(file: Path) -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every key of a YAML file, in its order; groups of its defaults list first.

    The meaning is the comment on the key's line, with the lines below it that hold nothing but a comment in the same
    column. A key that holds others has a row of its own only if it has a comment.
    """
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = yaml.compose(text)

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            meaning = _comment(lines, key.end_mark if _is_block(value) else value.end_mark)
            if name == "defaults":
                yield from _groups(value, lines)
            elif isinstance(value, yaml.MappingNode) and _is_block(value):
                if meaning:
                    yield name, "", meaning
                yield from walk(value, f"{name}.")
            else:
                yield name, _default(text, value), meaning

    yield from walk(tree, "") if tree else ()


def _groups(defaults: yaml.SequenceNode, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for entry in defaults.value:
        if isinstance(entry, yaml.MappingNode):
            group, choice = entry.value[0]
            if group.value not in ("experiment", "override") and not group.value.startswith("override "):
                link = f"[group](#group-{group.value})"
                meaning = _comment(lines, choice.end_mark)
                yield group.value, choice.value, f"{link}: {meaning}" if meaning else link


def _is_block(node: yaml.Node) -> bool:
    return isinstance(node, yaml.CollectionNode) and not node.flow_style


def _default(text: str, node: yaml.Node) -> str:
    if _is_block(node):  # a list, an entry a line
        return f"[{', '.join(_default(text, entry) for entry in node.value)}]"
    return " ".join(text[node.start_mark.index : node.end_mark.index].split())


def _comment(lines: list[str], mark: yaml.Mark) -> str:
    line = lines[mark.line] if mark.line < len(lines) else ""
    found = re.match(r":?\s*#\s*", line[mark.column :])
    if not found:
        return ""
    column = line.index("#", mark.column)
    words = [line[column + 1 :].strip()]
    for below in lines[mark.line + 1 :]:
        if below[:column].strip() or below[column : column + 1] != "#":
            break
        words.append(below[column + 1 :].strip())
    return " ".join(words)


def elsewhere(file: Path, conf: Path) -> dict[str, str]:
    """Meanings of keys that have no comment in the file: those of the other choices of a group, and of the recipe whose
    keys the file sets. A key within another may have that one's.
    """
    groups = [other for other in sorted(file.parent.glob("*.yaml")) if file.parent != conf]
    if file.parent.name == "tiny" or file.stem == "plan":
        keys = {key for key, _, _ in rows(file)}
        recipes = [conf / f"train_{what}.yaml" for what in ("dit", "vlm", "pprl")]
        groups = sorted(recipes, key=lambda recipe: -len(keys & {key for key, _, _ in rows(recipe)}))
    found: dict[str, str] = {}
    for other in groups:
        for key, _, meaning in rows(other):
            if meaning:
                found.setdefault(key, meaning)
    return found


def table(file: Path, conf: Path) -> str:
    """The keys of a file as a table of Markdown; the meaning is empty where there is no comment, here or elsewhere."""
    known, lines = elsewhere(file, conf), ["| key | default | meaning |", "|---|---|---|"]
    sets_all = file.parent == conf or "@package _global_" in file.read_text(encoding="utf-8")
    group = "" if sets_all else f"{file.parent.name}."
    for key, default, own in rows(file):
        meaning = own or known.get(key) or known.get(key.rpartition(".")[0], "")
        cells = [f"`{group}{key}`", f"`{default}`" if default else "", meaning.replace("<", "&lt;")]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def header(file: Path) -> str:
    """The comment that a file of a group begins with."""
    lines = re.match(r"(#.*\n)*", file.read_text(encoding="utf-8"))[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines if not line.startswith("# @package")).strip()


def purpose(file: Path) -> str:
    """The first paragraph of a module's docstring."""
    found = re.match(r'"""(.*?)(?:\n\n|""")', file.read_text(encoding="utf-8"), re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def configuration(conf: Path = ROOT / "conf") -> str:
    """docs/configuration.md: every key with its default and, from the comment beside it, its meaning."""
    names = sorted(path.stem for path in conf.glob("*.yaml"))
    groups = sorted(path.name for path in conf.iterdir() if path.is_dir() and path.name != "experiment")
    parts = [CONFIGURATION]
    parts.append("Recipes: " + ", ".join(f"[{name}](#{name})" for name in names) + ".")
    parts.append("Groups: " + ", ".join(f"[{name}](#group-{name})" for name in groups) + ".")
    for name in names:
        known = ", ".join(f"`{option}`" for option in experiments(name, conf)) or "none"
        parts += [f"## {name}", purpose(ROOT / "recipes" / f"{name}.py"), f"Experiments: {known}."]
        parts.append(table(conf / f"{name}.yaml", conf))
        inherited = re.findall(r"^  - (\w+)\s*#", (conf / f"{name}.yaml").read_text(encoding="utf-8"), re.MULTILINE)
        parts += [f"and the keys of [{base}](#{base})." for base in inherited if base != "_self_"]
    for group in groups:
        parts.append(f"## Group {group}")
        for file in sorted((conf / group).rglob("*.yaml")):
            parts += [f"### {group}={file.relative_to(conf / group).with_suffix('').as_posix()}", header(file)]
            parts += [table(file, conf)] if any(rows(file)) else []
            base = re.search(r"^  - (?!_self_)(\w+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            parts += [f"and the keys of `{group}={base[1]}`."] if base else []
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def code() -> str:
    """docs/code.md: every module with its purpose."""
    folders = [*(ROOT / "clvr_train" / room for room in ROOMS), ROOT / "recipes"]
    parts = [CODE.strip()]
    for folder in folders:
        files = [file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]
        parts.append(f"## {folder.relative_to(ROOT).as_posix()}")
        parts.append("\n".join(f"- `{file.name}`: {purpose(file).replace('<', '&lt;')}" for file in files))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_atomic(ROOT / "docs" / "configuration.md", configuration())
    write_atomic(ROOT / "docs" / "code.md", code())
