"""The ledger: what every rollout was drawn from, what came out, and what it got, on disk and bounded in size.

    ledger/epoch-00012/0003.json            a group: conditions by hash, seeds, scores with transcripts, advantages, r
    ledger/objects/<sha256>.safetensors     its tokens x0 (G, N, C) in float32, under the hash of that file

A training goes on from the rollouts of an epoch that was interrupted after they were drawn, and another can be trained
from them (`replay`), with the same scores or with those of another judge.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from clvr_train.data.images import sample_hash
from clvr_train.method.score import Score
from clvr_train.pprl.rollout import NOT_JUDGED, Group
from clvr_train.pprl.tasks import Task

logger = logging.getLogger(__name__)
OBJECTS = "objects"
_EPOCH = re.compile(r"epoch-(\d+)")


def policy_hash(tensors: Mapping[str, Tensor]) -> str:
    """Identifies the policy that draws, by its LoRA weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Ledger:
    """Groups of rollouts below a folder.

    Args:
        max_gb: the oldest epochs go once the tokens of all take more; the newest one always stays. 0 keeps nothing.
    """

    def __init__(self, folder: Path, max_gb: float) -> None:
        self.folder, self._max_bytes = folder, max_gb * 1e9

    def write(self, epoch: int, groups: Sequence[Group], settings: Mapping[str, Any], total: int) -> None:
        """Keeps groups as they are now, over what there was of them; `settings` are what they were drawn with, `total`
        the number of groups of their epoch.
        """
        if not self._max_bytes:
            return
        folder = self.folder / f"epoch-{epoch:05d}"
        for path in (folder, self.folder / OBJECTS):
            path.mkdir(parents=True, exist_ok=True)
        for group in groups:
            if not group.stored:
                content = safetensors.torch.save({"x0": group.x0.contiguous()})
                group.stored = hashlib.sha256(content).hexdigest()
                if not self._stored(group.stored).exists():
                    _put(self._stored(group.stored), content)
            entry = {
                "epoch": epoch,
                "place": group.place,
                "groups": total,
                "trajectory": group.task.sample.trajectory_id,
                "step": group.task.sample.step,
                "conditions": sample_hash(group.task.sample),
                "p_t2i": group.task.prompt.p_t2i,
                "p_i2i": group.task.prompt.p_i2i,
                "idx": group.task.prompt.idx,
                "settings": dict(settings),
                "seeds": group.seeds,
                "x0": group.stored,
                "nfe": group.nfe,
                "scores": [asdict(score) for score in group.scores],
                "advantages": group.advantages,
                "r": group.r,
            }
            _put(folder / f"{group.place:04d}.json", json.dumps(entry, ensure_ascii=False, indent=1).encode())

    def _stored(self, name: str) -> Path:
        return self.folder / OBJECTS / f"{name}.safetensors"

    def entries(self, epoch: int) -> list[dict[str, Any]]:
        """What there is of an epoch, by place; an entry that cannot be read is left out, with a warning."""
        found = []
        for path in sorted((self.folder / f"epoch-{epoch:05d}").glob("*.json")):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                logger.warning("%s: not read (%s)", path, error)
        return found

    def whole(self, epoch: int) -> bool:
        """Whether all groups of an epoch are there."""
        entries = self.entries(epoch)
        return bool(entries) and len(entries) == entries[0]["groups"]

    def epochs(self) -> list[int]:
        """The epochs of which there may be entries, in order."""
        found = (_EPOCH.fullmatch(path.name) for path in self.folder.glob("epoch-*"))
        return sorted(int(match[1]) for match in found if match)

    def tokens(self, entry: Mapping[str, Any]) -> Tensor | None:
        """The x0 of an entry; None, with a warning, if it is not there whole."""
        path = self._stored(entry["x0"])
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["x0"]:
                raise ValueError("its content is not what its name says")
            return safetensors.torch.load(content)["x0"]
        except (OSError, ValueError, SafetensorError, KeyError) as error:
            logger.warning("%s: not read (%s)", path, error)
            return None

    def resume(self, epoch: int, groups: Sequence[Group], settings: Mapping[str, Any]) -> list[Group]:
        """Fills in those groups that were drawn before, of the same conditions and with the same `settings`, and
        returns the others. Scores of another prompt are left out.
        """
        by_place = {entry["place"]: entry for entry in self.entries(epoch)} if self._max_bytes else {}
        left = []
        for group in groups:
            entry = by_place.get(group.place)
            same = entry is not None and entry["settings"] == dict(settings) and entry["seeds"] == _plain(group.seeds)
            if not same or entry["conditions"] != sample_hash(group.task.sample):
                left.append(group)
                continue
            fill(group, entry, self.tokens(entry))
            prompt = group.task.prompt
            if [prompt.p_t2i, prompt.p_i2i, list(prompt.idx)] != [entry["p_t2i"], entry["p_i2i"], entry["idx"]]:
                group.scores = [NOT_JUDGED] * group.size
            if group.x0 is None:
                self._stored(entry["x0"]).unlink(missing_ok=True)  # so that it is written again
                left.append(group)
        return left

    def prune(self) -> None:
        """Removes the oldest epochs until the rest fits."""
        sizes = {path.stem: path.stat().st_size for path in (self.folder / OBJECTS).glob("*.safetensors")}
        if sum(sizes.values()) <= self._max_bytes:
            return
        epochs = self.epochs()
        used: dict[str, int] = {}  # the newest epoch that names an object
        for epoch in epochs:
            used |= {entry["x0"]: epoch for entry in self.entries(epoch)}
        for epoch in epochs[:-1]:
            if sum(sizes.values()) <= self._max_bytes:
                break
            for name in [name for name, last in used.items() if last == epoch and name in sizes]:
                self._stored(name).unlink()
                del sizes[name]
            shutil.rmtree(self.folder / f"epoch-{epoch:05d}")

    def sweep(self) -> None:
        """Removes what no entry names: left by a kill, or by an epoch that was drawn again otherwise."""
        named = {entry["x0"] for epoch in self.epochs() for entry in self.entries(epoch)}
        for path in (self.folder / OBJECTS).glob("*"):
            if path.suffix == ".tmp" or path.stem not in named:
                path.unlink()
        for path in self.folder.glob("epoch-*/*.tmp"):
            path.unlink()


def fill(group: Group, entry: Mapping[str, Any], x0: Tensor | None) -> None:
    """Gives a group what an entry holds of it."""
    group.x0, group.nfe, group.stored = x0, entry["nfe"], "" if x0 is None else entry["x0"]
    group.scores = [Score(**score) for score in entry["scores"]]


def replayed(entry: Mapping[str, Any], tasks: Mapping[tuple[str, int], Sequence[Task]], where: str) -> Group:
    """The group of an entry, without its tokens, with the task of this training that has its context; `tasks` by key.

    Raises:
        ValueError: there is no such task.
    """
    key = (entry["trajectory"], entry["step"])
    task = next((task for task in tasks.get(key, ()) if sample_hash(task.sample) == entry["conditions"]), None)
    if task is None:
        reason = "has another context in the data" if key in tasks else "is not in the data"
        raise ValueError(f"{where}: step {key[1]} of trajectory {key[0]!r} {reason}; give the data it was drawn from")
    group = Group(entry["place"], task, [tuple(seed) for seed in entry["seeds"]])
    fill(group, entry, None)
    return group


def _put(path: Path, content: bytes) -> None:
    """Readers see the whole file or none. It is not pushed to disk: what a power cut takes is drawn again."""
    staging = path.with_name(path.name + ".tmp")
    staging.write_bytes(content)
    os.replace(staging, path)


def _plain(seeds: list[tuple]) -> list[list]:
    return [list(seed) for seed in seeds]
