"""Trajectories on disk: ShareGPT conversations, a line each, with the images beside them (CLVR A.3, A.6).

`<folder>/trajectories.jsonl`:
`{"id": ..., "conversations": [{"from": "human", "value": goal},
{"from": "gpt", "value": "r_1\\ngenerate <IMG_GEN_1>"}, {"from": "human", "value": "<image>"}, ...],
"images": ["images/<id>_1.png", ...]}`

The number of `<image>` turns equals the number of images, as LLaMA-Factory and ms-swift ask for.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from clvr_train.data.images import ImageError, check_image, open_image
from clvr_train.method.protocol import CONTINUE_TURN, IMAGE_TURN, ProtocolError, format_turn, parse_turn
from clvr_train.method.trajectory import DRAWING_ACTIONS, Step, Trajectory

FILE_NAME = "trajectories.jsonl"
_ID_FOR_FILES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FIELDS = {"id": str, "conversations": list, "images": list}


class DataError(ValueError):
    """A record is not usable: `<file>:<number of the record>: <field>: <rule>`."""


class _FieldError(ValueError):
    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}")


# ---------------------------------------------------------------------------- reading


def read_trajectories(folder: Path, decode: bool = False) -> Iterator[Trajectory]:
    """The trajectories of a folder, in file order; their images are paths that `open_image` opens later.

    Every record is checked whole before it is given out. Of an image only the header is read unless `decode`.

    Raises:
        FileNotFoundError: if the folder holds no `trajectories.jsonl`.
        DataError: at the first record that is malformed, or whose images are missing, unreadable or outside
            the folder.
    """
    folder = Path(folder)
    file = folder / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a folder of trajectories holds {FILE_NAME}")
    seen: set[str] = set()
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                trajectory = _parse_record(line, folder, decode)
                if trajectory.id in seen:
                    raise _FieldError("id", f"{trajectory.id!r} stands in an earlier record too")
            except _FieldError as error:
                raise DataError(f"{file}:{number}: {error}") from error
            seen.add(trajectory.id)
            yield trajectory
    if not seen:
        raise DataError(f"{file}:1: record: the file is empty")


def _parse_record(line: bytes, folder: Path, decode: bool) -> Trajectory:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise _FieldError("record", f"not a line of JSON in UTF-8 ({reason})") from error
    if not isinstance(record, dict):
        raise _FieldError("record", "must be a JSON object")
    for field, kind in _FIELDS.items():
        if field not in record:
            raise _FieldError(field, "is missing")
        if not isinstance(record[field], kind):
            raise _FieldError(field, f"must be a {'string' if kind is str else 'list'}")
    paths = enumerate(record["images"], start=1)
    images = [_image_path(value, f"images[{n}]", folder, decode) for n, value in paths]
    goal, steps = _parse_turns(record["conversations"], images)
    try:
        return Trajectory(record["id"], goal, steps)
    except ValueError as error:
        field, _, rule = str(error).partition(": ")
        raise _FieldError(field, rule) from error


def _parse_turns(turns: list, images: list[Path]) -> tuple[str, tuple[Step, ...]]:
    values = [_turn_value(turn, index) for index, turn in enumerate(turns)]
    if len(values) < 2:
        raise _FieldError("conversations", "needs a goal (human) and at least one round (gpt)")
    goal = values[0]
    if IMAGE_TURN in goal:
        raise _FieldError(_where(0), f"the goal holds {IMAGE_TURN}; images follow the round that drew them")
    steps: list[Step] = []
    number = 0
    for index in range(1, len(values), 2):
        try:
            reasoning, action = parse_turn(values[index], number + 1)
        except ProtocolError as error:
            raise _FieldError(_where(index), str(error)) from error
        draws = action in DRAWING_ACTIONS
        number += draws
        answer = values[index + 1] if index + 1 < len(values) else None
        expected = IMAGE_TURN if draws else CONTINUE_TURN if action == "verify" else None
        # A trajectory may end with a verify that nobody answers, but an image that was drawn must be there.
        if answer != expected and not (action == "verify" and answer is None):
            rule = f"must be {expected!r} after {action!r}" if expected else "nothing follows 'stop'"
            raise _FieldError(_where(index + 1), rule)
        if number > len(images):
            raise _FieldError("images", f"has {len(images)} files for {number} or more {IMAGE_TURN} turns")
        steps.append(Step(reasoning, action, images[number - 1] if draws else None))
    if number != len(images):
        raise _FieldError("images", f"has {len(images)} files for {number} {IMAGE_TURN} turns")
    return goal, tuple(steps)


def _turn_value(turn: object, index: int) -> str:
    role = "gpt" if index % 2 else "human"
    if not isinstance(turn, dict) or turn.get("from") != role:
        raise _FieldError(f"conversations[{index + 1}].from", f"must be {role!r}: human and gpt take turns")
    if not isinstance(turn.get("value"), str):
        raise _FieldError(_where(index), "must be a string")
    if any("\ud800" <= character <= "\udfff" for character in turn["value"]):
        raise _FieldError(_where(index), "holds half a surrogate pair, which is no text")
    return turn["value"]


def _where(index: int) -> str:
    return f"conversations[{index + 1}].value"


def _image_path(value: object, field: str, folder: Path, decode: bool) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _FieldError(field, "must be a path relative to the folder")
    windows = PureWindowsPath(value)
    if "://" in value or value.startswith("data:"):
        raise _FieldError(field, f"{value[:80]!r} is a URL; only files inside the folder are read")
    if PurePosixPath(value).is_absolute() or windows.is_absolute() or windows.drive or windows.root:
        raise _FieldError(field, f"{value[:80]!r} is absolute; only files inside the folder are read")
    path = folder / value
    if not path.resolve().is_relative_to(folder.resolve()):  # also through a link
        raise _FieldError(field, f"{value[:80]!r} leads out of the folder")
    try:
        open_image(path) if decode else check_image(path)
    except ImageError as error:
        raise _FieldError(field, str(error)) from error
    return path


# ---------------------------------------------------------------------------- writing


def write_trajectories(folder: Path, trajectories: Iterable[Trajectory]) -> int:
    """Write trajectories and their images (as PNG) and return how many there were.

    `trajectories.jsonl` appears, or replaces an older one, only once the last record is written: who finds
    it finds all of it. A killed call leaves at most `trajectories.jsonl.tmp` and image files, which the next
    call overwrites.

    Raises:
        DataError: if an id cannot name a file or comes twice, a text breaks the protocol, or an image is
            unreadable.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    staging = folder / (FILE_NAME + ".tmp")
    seen: set[str] = set()
    try:
        with staging.open("w", encoding="utf-8") as lines:
            for number, trajectory in enumerate(trajectories, start=1):
                try:
                    record = _record(folder, trajectory, seen)
                except _FieldError as error:
                    raise DataError(f"{folder / FILE_NAME}:{number}: {error}") from error
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        os.replace(staging, folder / FILE_NAME)
    finally:
        staging.unlink(missing_ok=True)
    return len(seen)


def _record(folder: Path, trajectory: Trajectory, seen: set[str]) -> dict:
    if trajectory.id in seen:
        raise _FieldError("id", f"{trajectory.id!r} stands in an earlier record too")
    seen.add(trajectory.id)
    if not _ID_FOR_FILES.fullmatch(trajectory.id):
        rule = "cannot name a file: letters, digits, '.', '_' and '-' only"
        raise _FieldError("id", f"{trajectory.id[:80]!r} {rule}")
    if IMAGE_TURN in trajectory.goal:
        raise _FieldError("goal", f"holds {IMAGE_TURN}, which marks the place of an image")
    turns = [{"from": "human", "value": trajectory.goal}]
    images: list[str] = []
    for index, step in enumerate(trajectory.steps, start=1):
        if step.image is not None:
            images.append(f"images/{trajectory.id}_{len(images) + 1}.png")
            _save_image(folder / images[-1], step, f"steps[{index}].image")
        try:
            turns.append({"from": "gpt", "value": format_turn(step, len(images))})
        except ProtocolError as error:
            raise _FieldError(f"steps[{index}].reasoning", str(error)) from error
        if step.action != "stop":
            turns.append({"from": "human", "value": IMAGE_TURN if step.draws else CONTINUE_TURN})
    return {"id": trajectory.id, "conversations": turns, "images": images}


def _save_image(path: Path, step: Step, field: str) -> None:
    staging = path.with_name(path.name + ".tmp")
    try:
        open_image(step.image).save(staging, format="PNG")
    except ImageError as error:
        raise _FieldError(field, str(error)) from error
    os.replace(staging, path)
