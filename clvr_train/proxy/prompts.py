"""Proxy prompts: an offline teacher turns each context into a short judgeable prompt, once (CLVR 3.2).

On disk beside the trajectories: `proxy_prompts.jsonl`, one line a step,
`{"trajectory": id, "step": k, "context": hash, "key": hash, "p_t2i": ..., "p_i2i": ... or null, "idx": [...]}`, and
`rejected.jsonl` with `{"trajectory", "step", "key", "reason"}` for contexts that the teacher refused. Nothing is ever
filled in by default. `context` is the hash of the context's texts: it tells prompts that were made for other
trajectories of the same name. `key` is that of all that went into the answer, images and teacher included: what has it
is not asked again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from clvr_train.data.images import sample_hash
from clvr_train.method.score import ProxyPrompt, TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.method.truncation import trace
from clvr_train.runtime.files import write_atomic

FILE, REJECTED = "proxy_prompts.jsonl", "rejected.jsonl"
PARTIAL = "proxy_prompts.partial.jsonl"  # answers of a run that has not come to its end
MAX_AWAY = 100


class TeacherAway(OSError):
    """The teacher cannot be asked now; another try, later, may succeed."""


class Teacher(Protocol):
    """Reads the truncated context (never the target image) and writes the proxy prompt."""

    name: str  # model and version of its wording: what has the same name gives the same answers

    def proxy_prompt(self, sample: Sample) -> ProxyPrompt:
        """Raises TeacherRefusal with the reason when it cannot, TeacherAway when it could not be asked."""


def check_prompt(sample: Sample, prompt: ProxyPrompt) -> None:
    """Raises TeacherRefusal unless the prompt fits the step: an edit exactly when there is a history, `idx` within
    it.
    """
    if bool(sample.references) != (prompt.p_i2i is not None):
        raise TeacherRefusal(f"p_i2i: {'needed' if sample.references else 'not allowed'} at step {sample.step}")
    if any(not 1 <= i <= len(sample.references) for i in prompt.idx):
        raise TeacherRefusal(f"idx: {prompt.idx} reaches outside the {len(sample.references)} images of the history")


def write_proxy_prompts(
    teacher: Teacher,
    samples: Sequence[Sample],
    folder: Path,
    *,
    workers: int = 0,
    answered: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Asks the teacher for every sample that has no answer of it yet, writes both files whole, and returns (written,
    rejected).

    Args:
        workers: so many samples at a time; 0: one after the other, in this thread.
        answered: called after every sample.

    Raises:
        TeacherAway: for some samples there was no teacher. The answers of the others are kept in a file of their own,
            and the next call goes on from them; `proxy_prompts.jsonl` is as it was.
    """
    known = {row["key"]: row for name in (FILE, REJECTED, PARTIAL) for row in _kept(folder / name)}
    rows: dict[int, dict[str, Any]] = {}
    away: list[TeacherAway] = []
    with (folder / PARTIAL).open("a", encoding="utf-8") as partial:
        partial.write("\n" * (partial.tell() > 0))  # after a line that a kill has cut short
        for place, outcome in _outcomes(teacher, samples, known, workers):
            answered()
            if isinstance(outcome, TeacherAway):
                away.append(outcome)
                if len(away) >= MAX_AWAY:
                    break
                continue
            rows[place] = outcome
            if outcome["key"] not in known:
                partial.write(_line(outcome))
                partial.flush()
    if away:
        raise TeacherAway(f"{len(samples) - len(rows)} of {len(samples)} steps are not answered ({away[0]})")
    ordered = [rows[place] for place in range(len(samples))]
    rejected = [row for row in ordered if "reason" in row]
    written = [row for row in ordered if "reason" not in row]
    for name, part in ((REJECTED, rejected), (FILE, written)):
        write_atomic(folder / name, "".join(map(_line, part)))
    (folder / PARTIAL).unlink()
    return len(written), len(rejected)


Outcome = dict[str, Any] | TeacherAway


def _outcomes(
    teacher: Teacher, samples: Sequence[Sample], known: dict[str, dict[str, Any]], workers: int
) -> Iterator[tuple[int, Outcome]]:
    """(place, outcome) of every sample, as they come."""
    if not workers:
        for place, sample in enumerate(samples):
            yield place, _outcome(teacher, sample, known)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="teacher")
    try:
        places = {pool.submit(_outcome, teacher, sample, known): place for place, sample in enumerate(samples)}
        for future in as_completed(places):
            yield places.pop(future), future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # of an interrupt: do not sit out the requests under way


def _outcome(teacher: Teacher, sample: Sample, known: dict[str, dict[str, Any]]) -> Outcome:
    """The row of a sample. Position and context are those of now, the answer may be a known one."""
    key = answer_key(sample, teacher.name)
    position = {"trajectory": sample.trajectory_id, "step": sample.step}
    if key in known:
        return known[key] | position
    try:
        prompt = teacher.proxy_prompt(sample)
        check_prompt(sample, prompt)
    except TeacherAway as error:
        return error
    except TeacherRefusal as refusal:
        return position | {"key": key, "reason": str(refusal)}
    answer = {"p_t2i": prompt.p_t2i, "p_i2i": prompt.p_i2i, "idx": list(prompt.idx)}
    return position | {"context": context_hash(sample), "key": key} | answer


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _kept(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an earlier run that have a key; a line that a kill has cut short is none."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("key"), str):
            yield row


def context_hash(sample: Sample) -> str:
    """Identifies the texts of a context: goal and reasonings."""
    return hashlib.sha256(trace(sample.goal, sample.reasonings).encode()).hexdigest()[:16]


def answer_key(sample: Sample, teacher: str) -> str:
    """Identifies a context with the pixels of its images, and the teacher that it is given to."""
    return sample_hash(sample, teacher)[:32]


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
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    for number, line in enumerate(text.split("\n") if text else (), start=1):
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
