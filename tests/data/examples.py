"""Trajectories for the tests of readers and writers, and damage to do to a record."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from clvr_train.data.images import open_image
from clvr_train.data.records import Entry
from clvr_train.data.sharegpt import FILE_NAME, write_trajectories
from clvr_train.data.stored import in_memory
from clvr_train.method.trajectory import Step, Trajectory


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, (72, 64)).save(buffer, format="JPEG")
    return buffer.getvalue()


def trajectory(name: str = "a-1", seed: int = 1, reasoning: str = "Start with the circle.") -> Trajectory:
    return Trajectory(name, "a red circle\nand no square", (
        Step(reasoning, "generate", picture(seed)), Step("Two lines\nof doubt.", "verify"),
        Step("Make it red.", "edit", in_memory("stored", jpeg(seed))), Step("All there.", "stop"),
    ))  # fmt: skip


def write_lines(folder: Path, records: Sequence[object]) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    (folder / FILE_NAME).write_bytes(b"\n".join(lines) + b"\n")
    return folder / FILE_NAME


def good_records(folder: Path, num: int = 3) -> list[dict]:
    write_trajectories(folder, [trajectory(f"t{n}", n) for n in range(num)])
    return [json.loads(line) for line in (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()]


def content(value: Trajectory) -> tuple:
    """All that a trajectory says, its images as pixels."""
    steps = [(s.reasoning, s.action, s.image and open_image(s.image).tobytes()) for s in value.steps]
    return value.id, value.goal, steps


def image_bytes(value: Trajectory) -> list[bytes]:
    return [image.read_bytes() if isinstance(image, Path) else image.read() for image in value.images]


@dataclass(frozen=True)
class Deadly:
    """A chunk of records that kills the process which opens it, as a lack of memory would."""

    file: Path = Path("deadly.tar")
    weight: int = 1

    def entries(self) -> Iterator[Entry]:
        os._exit(1)


_MARKS = ("<image>", "<IMG_GEN_")
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() and not any(mark in text for mark in _MARKS)
)
reasonings = texts.map(str.strip)
images = st.integers(0, 5).flatmap(
    lambda n: st.sampled_from([picture(n), picture(n, (65, 90)), in_memory("stored", jpeg(n))])
)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    steps = []
    for number in range(draw(st.integers(1, 5))):
        drawn = any(step.draws for step in steps)
        action = draw(st.sampled_from(["generate", "verify", "stop"] + ["edit"] * 2 * drawn))
        steps.append(Step(draw(reasonings), action, draw(images) if action in ("generate", "edit") else None))
        if action == "stop" or number == 4:
            break
    return Trajectory(draw(texts), draw(texts), tuple(steps))


data_sets = st.lists(trajectories(), min_size=1, max_size=4, unique_by=lambda t: t.id)
