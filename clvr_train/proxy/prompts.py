"""Proxy prompts: an offline teacher turns each context into a short judgeable prompt, once (CLVR 3.2).

On disk beside the trajectories: `proxy_prompts.jsonl`, one line a step,
`{"trajectory": id, "step": k, "context": hash, "p_t2i": ..., "p_i2i": ... or null, "idx": [...]}`, and `rejected.jsonl`
with `{"trajectory", "step", "reason"}` for contexts that the teacher refused. Nothing is ever filled in by default. The
hash of the context's texts tells prompts that were made for other trajectories of the same name.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from clvr_train.method.score import ProxyPrompt, TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.method.truncation import trace
from clvr_train.runtime.files import write_atomic

FILE, REJECTED = "proxy_prompts.jsonl", "rejected.jsonl"


class Teacher(Protocol):
    """Reads the truncated context (never the target image) and writes the proxy prompt."""

    def proxy_prompt(self, sample: Sample) -> ProxyPrompt:
        """Raises TeacherRefusal with the reason when it cannot."""


def check_prompt(sample: Sample, prompt: ProxyPrompt) -> None:
    """Raises TeacherRefusal unless the prompt fits the step: an edit exactly when there is a history, `idx` within
    it.
    """
    if bool(sample.references) != (prompt.p_i2i is not None):
        raise TeacherRefusal(f"p_i2i: {'needed' if sample.references else 'not allowed'} at step {sample.step}")
    if any(not 1 <= i <= len(sample.references) for i in prompt.idx):
        raise TeacherRefusal(f"idx: {prompt.idx} reaches outside the {len(sample.references)} images of the history")


def write_proxy_prompts(teacher: Teacher, samples: Iterable[Sample], folder: Path) -> tuple[int, int]:
    """Asks the teacher for every sample, writes both files whole, and returns (written, rejected)."""
    written, rejected = [], []
    for sample in samples:
        position = {"trajectory": sample.trajectory_id, "step": sample.step}
        context = {"context": context_hash(sample)}
        try:
            prompt = teacher.proxy_prompt(sample)
            check_prompt(sample, prompt)
        except TeacherRefusal as refusal:
            rejected.append(position | {"reason": str(refusal)})
            continue
        written.append(position | context | {"p_t2i": prompt.p_t2i, "p_i2i": prompt.p_i2i, "idx": list(prompt.idx)})
    for name, rows in ((REJECTED, rejected), (FILE, written)):
        write_atomic(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(written), len(rejected)


def context_hash(sample: Sample) -> str:
    """Identifies the texts of a context: goal and reasonings."""
    return hashlib.sha256(trace(sample.goal, sample.reasonings).encode()).hexdigest()[:16]


def read_proxy_prompts(folder: Path, samples: Iterable[Sample]) -> dict[tuple[str, int], ProxyPrompt]:
    """The proxy prompts of samples by (trajectory id, step); samples that the teacher rejected have none.

    Raises:
        FileNotFoundError: none were made for this folder.
        ValueError: a malformed line, as `<file>:<line>: <field>: <rule>`, or one made for another context.
    """
    contexts = {sample.key: context_hash(sample) for sample in samples}
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; make it with recipes/make_proxy_prompts.py data.folder={folder}")
    prompts: dict[tuple[str, int], ProxyPrompt] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            key = (row["trajectory"], row["step"])
            if key in contexts:
                if row["context"] != contexts[key]:
                    raise ValueError("context: made for another context; run recipes/make_proxy_prompts.py again")
                prompts[key] = ProxyPrompt(row["p_t2i"], row["p_i2i"], tuple(row["idx"]))
        except KeyError as error:
            raise ValueError(f"{where}: {error.args[0]}: missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{where}: record: of a wrong type ({error})") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return prompts
