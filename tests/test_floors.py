"""The floors: who may import whom, read from the source (CONTRIBUTING.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "method": 0,
    "data": 1,
    "services": 1,
    "runtime": 1,
    "models": 2,
    "rewards": 2,
    "shapes": 2,
    "sft": 3,
    "proxy": 3,
    "pprl": 3,
    "inference": 3,
    "evaluation": 3,
}
# One door per dependency: where a package may be imported, as prefixes of paths.
DOORS = {
    "hydra": ("recipes/",),
    "omegaconf": ("recipes/",),
    "wandb": ("clvr_train/runtime/metrics.py",),
    "wandb_workspaces": ("clvr_train/runtime/workspace.py",),
    "diffusers": ("clvr_train/models/",),
    "trl": ("clvr_train/sft/vlm.py",),
    "deepspeed": ("clvr_train/runtime/",),
    "accelerate": ("clvr_train/runtime/",),
    "openai": ("clvr_train/services/",),
    "httpx": ("clvr_train/services/",),
    "starlette": ("clvr_train/inference/web.py",),
    "uvicorn": ("recipes/serve_closed_loop.py",),
    "pickle": (),
    "dill": (),
    "joblib": (),
}
LIBRARY = sorted((ROOT / "clvr_train").rglob("*.py"))
SOURCES = LIBRARY + sorted((ROOT / "recipes").glob("*.py"))
# What must not be called: in the library, and anywhere in the sources.
LIBRARY_CALLS = {"print", "hasattr", "breakpoint"}
CALLS = {"eval", "exec", "torch.load", "torch.save"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those inside functions included."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(source: str, path: Path) -> list[str]:
    """What a source file does against the floors and the doors."""
    tree, name, found = ast.parse(source), name_of(path), []
    room = name.split("/")[1] if name.startswith("clvr_train/") and name.count("/") > 1 else None
    for line, module in imports(tree, path):
        top, *inner = module.split(".")
        if top in DOORS and not name.startswith(DOORS[top] or ("nowhere",)):
            found.append(f"{name}:{line}: {top} is imported only in {', '.join(DOORS[top]) or 'no file'}")
        if name.startswith("clvr_train/") and top == "recipes":
            found.append(f"{name}:{line}: the library does not know the recipes")
        target = inner[0] if top == "clvr_train" and inner and inner[0] in FLOORS else room
        if room and target != room and FLOORS[target] >= FLOORS[room]:
            found.append(f"{name}:{line}: {room} (floor {FLOORS[room]}) imports {module}")
    banned = CALLS | (LIBRARY_CALLS if name.startswith("clvr_train/") else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in banned:
            found.append(f"{name}:{node.lineno}: {ast.unparse(node.func)}( is not used here")
        if isinstance(node, ast.ExceptHandler) and name.startswith("clvr_train/"):
            caught = ast.unparse(node.type) if node.type else "everything"
            if caught in ("everything", "Exception", "BaseException"):
                found.append(f"{name}:{node.lineno}: catches {caught}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_floors_hold(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == []


def test_every_room_has_a_floor() -> None:
    rooms = {
        path.relative_to(ROOT / "clvr_train").parts[0] for path in LIBRARY if path.parent.name != "clvr_train"
    }
    assert rooms <= FLOORS.keys()


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("method", "from clvr_train.data import images"),
        ("method", "def f():\n    import clvr_train.runtime.files"),
        ("data", "from ..runtime.files import write_atomic"),
        ("rewards", "from clvr_train.shapes.world import World"),
        ("rewards", "from clvr_train import shapes"),
        ("pprl", "import recipes._recipe"),
        ("data", "import hydra.core"),
        ("sft", "from diffusers import Flux2KleinPipeline"),
        ("runtime", "import wandb"),
        ("data", "import pickle"),
        ("data", "import torch\ntorch.load('x')"),
        ("data", "print(1)"),
        ("data", "try:\n    pass\nexcept Exception:\n    pass"),
    ],
)
def test_the_reader_sees_what_it_must_refuse(room: str, source: str) -> None:
    assert len(violations(source, ROOT / "clvr_train" / room / "example.py")) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("method", "from clvr_train.method.score import Score\nfrom ..method import score"),
        ("pprl", "from clvr_train.models import klein\nfrom clvr_train import __version__"),
        ("data", "try:\n    pass\nexcept ValueError:\n    pass"),
    ],
)
def test_the_reader_lets_pass_what_is_allowed(room: str, source: str) -> None:
    assert violations(source, ROOT / "clvr_train" / room / "example.py") == []
