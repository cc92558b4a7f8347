"""Pictures of a benchmark before a judge behind a chat server: each is judged once, what fails is missing.

Every verdict is kept as it comes, so a judge that goes away loses nothing: the same command asks only for what lacks.
"""

import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clvr_train.evaluation.checkout import Benchmark, Item, Verdicts
from clvr_train.evaluation.drawing import append_rows, read_rows
from clvr_train.services.chat import Answer, ChatClient
from clvr_train.services.replies import answer_of, strict_json

logger = logging.getLogger(__name__)
FILE = "verdicts.jsonl"
_NO_MORE = r"(?!\d|\.\d|\s*[/–-]\s*\d)"  # a number ends here, and is not the first of a range or a fraction
_MIME = {".png": "image/png", ".jpg": "image/jpeg"}


def judge_pictures(
    benchmark: Benchmark, items: Sequence[Item], images: Path, run: Path, client: ChatClient, fields: Mapping[str, Any]
) -> Verdicts:
    """(id, part) -> value, or the reason why it is missing, of the items, whose pictures are there.

    A reply that is no value is missing for good; it stands in verdicts.jsonl like the others. Of what got no reply at
    all nothing is kept.

    Args:
        fields: what a request holds besides the model, the messages and the bound of the reply.

    Raises:
        OSError: the judge is away, and lacks some; nothing that it judged is lost.
    """
    kept = {row["question"]: row for row in read_rows(run.glob(FILE))}
    verdicts: Verdicts = {}
    away: list[str] = []
    questions = [(item, part) for item in items for part in benchmark.parts]
    pool = ThreadPoolExecutor(max(1, client.options.limit))
    try:
        waiting = [pool.submit(_judge, benchmark, item, part, images, client, fields, kept) for item, part in questions]
        for (item, part), row, answer in _as_they_come(waiting):
            if answer is not None and (not answer.reason or answer.unusable):
                append_rows(run / FILE, [row])
            elif answer is not None and answer.away:
                away.append(answer.reason)
            verdicts[item, part] = row["reason"] if row["value"] is None else row["value"]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if away:
        raise OSError(
            f"{client.options.url}: the judge is away, {len(away)} of {len(questions)} answers are lacking ({away[0]});"
            f" {run / FILE} keeps the others; run the same command again to go on"
        )
    return verdicts


def _as_they_come(waiting: list[Future]) -> Iterator[tuple]:
    with tqdm(total=len(waiting), desc="judge", unit="answer") as bar:
        for future in as_completed(waiting):
            bar.update()
            yield future.result()


def _judge(
    benchmark: Benchmark,
    item: Item,
    part: str,
    images: Path,
    client: ChatClient,
    fields: Mapping[str, Any],
    kept: Mapping[str, dict],
) -> tuple[tuple[str, str], dict, Answer | None]:
    """The key, the row and the answer of a question; no answer where the row was there before."""
    messages = benchmark.judging.ask(item, part, picture_part(images / item.file))
    asked = json.dumps([client.options.model, client.options.max_tokens, dict(fields), messages])
    question = hashlib.sha256(asked.encode()).hexdigest()
    if question in kept:
        return (item.id, part), kept[question], None
    answer = client.ask(messages, lambda text: benchmark.judging.read(part, text), fields)
    row = {"id": item.id, "part": part, "value": answer.value, "reason": answer.reason, "reply": answer.text}
    return (item.id, part), row | {"judge": client.options.model, "question": question}, answer


def picture_part(path: Path) -> dict:
    """A picture as a part of a message: the bytes of its file, as they are."""
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{_MIME[path.suffix]};base64,{data}"}}


def messages_of(system: str, text: str, picture: dict) -> list[dict]:
    """A system's words, then a user's with the picture behind them."""
    user = {"role": "user", "content": [{"type": "text", "text": text}, picture]}
    return [{"role": "system", "content": system}, user]


def filled(messages: list[dict], picture: dict) -> list[dict]:
    """Messages in the authors' words, with the picture where they have one, or behind the last part."""
    last = messages[-1]
    parts = [part for part in last["content"] if part.get("type") == "text"]
    return [*messages[:-1], {"role": last["role"], "content": [*parts, picture]}]


def numbers(text: str, names: Sequence[str], most: float) -> list[float]:
    """The numbers of a reply with a line `Name: number` for each name, from 0 to `most`; other lines may stand between.

    Raises:
        ValueError: a name has no such line, or several, or the number is beyond `most`.
    """
    found = []
    for name in names:
        pattern = rf"^[\s*#>-]*{re.escape(name)}[*\s]*[:：]?[*\s]*(\d+(?:\.\d+)?)(?:\s*/\s*{most:g})?{_NO_MORE}"
        values = re.findall(pattern, answer_of(text), re.MULTILINE | re.IGNORECASE)
        if len(values) != 1:
            raise ValueError(f"{len(values)} lines '{name}: number', one is needed")
        if float(values[0]) > most:
            raise ValueError(f"{name}: {values[0]} is beyond {most:g}")
        found.append(float(values[0]))
    return found


def json_field(text: str, name: str) -> Any:
    """A field of the one JSON object in a reply, which may have words around it. Raises ValueError."""
    found = re.search(r"\{.*\}", answer_of(text), re.DOTALL)
    if not found:
        raise ValueError("no JSON object")
    row = {key.strip(): value for key, value in strict_json(re.sub(r",\s*\}$", "}", found[0])).items()}
    if name not in row:
        raise ValueError(f"no field {name!r}")
    return row[name]
