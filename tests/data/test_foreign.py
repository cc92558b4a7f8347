import json
from pathlib import Path

import pytest

from clvr_train.data.readers import read_trajectories
from clvr_train.data.records import DataError
from tests.data.examples import content, good_records, trajectory, write_lines

ROLES = {"human": "user", "gpt": "assistant"}


def messages(record: dict) -> dict:
    """The record as LLaMA-Factory and ms-swift would hold it."""
    turns = [{"role": ROLES.get(turn["from"]), "content": turn["value"]} for turn in record["conversations"]]
    return {"messages": turns, "images": record["images"]}


def test_plain_sharegpt_is_the_same_trajectory(tmp_path: Path) -> None:
    (own,) = good_records(tmp_path, 1)
    plain = messages(own)
    spaced = [{**turn, "content": f"\n{turn['content']} "} if turn["content"] in ("<image>", "continue") else turn
              for turn in plain["messages"]]  # fmt: skip
    system = [{"role": "system", "content": "You draw."}, *plain["messages"]]
    no_id = {key: value for key, value in own.items() if key != "id"}
    forms = [plain, {**plain, "messages": spaced}, {**plain, "messages": system}, {**plain, "system": "You draw."},
             {**plain, "images": [{"bytes": None, "path": path} for path in own["images"]]}, no_id,
             {**plain, "tools": "", "videos": []}]  # fmt: skip
    write_lines(tmp_path, forms)
    read = list(read_trajectories(tmp_path))
    assert [t.id for t in read] == [f"trajectories-{n}" for n in range(1, len(forms) + 1)]
    assert {json.dumps(content(t)[1]) for t in read} == {json.dumps(trajectory().goal)}
    assert all(content(t)[1:] == content(read[0])[1:] for t in read)


def one_image(record: dict) -> dict:
    return {**record, "messages": record["messages"][:3], "images": record["images"][0]}


def test_one_image_as_a_text(tmp_path: Path) -> None:
    (own,) = good_records(tmp_path, 1)
    write_lines(tmp_path, [one_image(messages(own))])
    assert len(next(read_trajectories(tmp_path)).images) == 1


def turn(index: int, **fields: object):
    return lambda r: {**r, "messages": [{**t, **fields} if i == index else t for i, t in enumerate(r["messages"])]}


REFUSED = {
    "image in the answer": (turn(1, content="see <image>\ngenerate <IMG_GEN_1>"), "image_marker", "in the assistant"),
    "images before the start": (turn(0, content="<image><image> join them"), "image_marker", "the goal holds <image>"),
    "system with image": (lambda r: {**r, "system": "<image>"}, "no_place", "the system prompt holds <image>"),
    "system turn with image": (
        lambda r: {**r, "messages": [{"role": "system", "content": "<image>"}, *r["messages"]]}, "no_place", "system"),
    "tools": (lambda r: {**r, "tools": "[{}]"}, "no_place", "tools: a trajectory has no place for it"),
    "videos": (lambda r: {**r, "videos": ["a.mp4"]}, "no_place", "videos: "),
    "preferences": (lambda r: {**r, "rejected": "no"}, "no_place", "rejected: "),
    "data url": (lambda r: {**r, "images": ["data:image/png;base64,AAAA", "x"]}, "url", "is a URL"),
    "png in base64": (lambda r: {**r, "images": ["iVBORw0KGgo" * 500, "x"]}, "base64", "images[1]: an image in base64"),
    "jpeg in base64": (lambda r: {**r, "images": ["x", "/9j/4AAQSkZJRg" * 9 + "=="]}, "base64", "[2]: an image in"),
    "bytes in json": (lambda r: {**r, "images": [{"bytes": "AAAA"}, "x"]}, "base64", "images[1]: an image in base64"),
    "rejected messages": (lambda r: {**r, "rejected_messages": [{}]}, "no_place", "rejected_messages: it tells good"),
    "rejected response": (lambda r: {**r, "rejected_response": "no"}, "no_place", "rejected_response: it tells good"),
    "bad answer": (lambda r: {**r, "kto_tag": False}, "no_place", "kto_tag: it tells good answers from bad"),
    "good answer": (lambda r: {**r, "kto_tag": True}, "no_place", "kto_tag: "),
    "bad label": (lambda r: {**r, "label": False}, "no_place", "label: it tells good answers from bad"),
    "class": (lambda r: {**r, "label": 0}, "no_place", "label: "),
    "turn without loss": (turn(1, loss=False), "no_place", "messages[2]: loss: the loss is on every turn"),
    "grounding": (lambda r: {**r, "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}, "no_place", "objects: a trajectory"),
    "video in the goal": (turn(0, content="<video> draw"), "no_place", "messages[1].content: the goal holds <video>"),
    "audio in an answer": (turn(1, content="<audio>\ngenerate <IMG_GEN_1>"), "no_place", "[2].content: <audio>"),
    "not a turn": (lambda r: {**r, "messages": ["hi", *r["messages"]]}, "wrong_type", "messages[1]: must be an object"),
    "wrong turn": (turn(1, role="user"), "turn_order", "messages[2].role: must be 'gpt'"),
    "wrong turn behind a system prompt": (
        lambda r: {**r, "messages": [{"role": "system", "content": "hi"}, *r["messages"][1:]]},
        "turn_order", "messages[2].role: must be 'human'"),
    "no turns": (lambda r: {**r, "messages": []}, "no_rounds", "messages: needs a goal"),
    "pairs without turns": (lambda r: {"prompt": "x", "chosen": "a", "rejected": "b"}, "no_place", "chosen: it tells"),
    "query": (lambda r: {"query": "a circle", "response": "ok", "images": r["images"]},
        "missing_field", "conversations: is missing; the query and response of ms-swift are not read"),
    "alpaca": (lambda r: {"instruction": "a circle", "input": "", "output": "ok"},
        "missing_field", "conversations: is missing; the instruction and output of Alpaca are not read"),
    "no action": (turn(1, content="Sure, here it is."), "unknown_action", "is no action"),
    "no number": (turn(1, content="Draw.\ngenerate"), "image_number", "needs <IMG_GEN_n>"),
    "words beside the image": (turn(2, content="<image> what now?"), "wrong_answer", "must be '<image>' after"),
    "parts": (turn(0, content=[{"type": "text", "text": "hi"}]), "no_place", "content in parts"),
    "a tool speaks": (turn(2, role="tool"), "unknown_role", "'tool' is no role"),
    "turns are a text": (lambda r: {**r, "messages": "hi"}, "wrong_type", "messages: must be a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_maps_to_no_trajectory_is_refused_clearly(tmp_path: Path, name: str) -> None:
    change, rule, message = REFUSED[name]
    (own,) = good_records(tmp_path, 1)
    write_lines(tmp_path, [change(messages(own))])
    with pytest.raises(DataError) as error:
        list(read_trajectories(tmp_path))
    assert error.value.rule == rule and message in str(error.value)
    assert len(error.value.message) < 200


def test_notes_beside_a_record_are_ignored(tmp_path: Path) -> None:
    (own,) = good_records(tmp_path, 1)
    notes = {"label": "shapes", "loss": 0.3, "kto_tag": None, "query": "?", "output": "a.png", "objects": {}}
    write_lines(tmp_path, [{**own, **notes}])
    assert len(list(read_trajectories(tmp_path))) == 1


def test_a_turn_is_named_as_in_the_file(tmp_path: Path) -> None:
    (own,) = good_records(tmp_path, 1)
    own["conversations"][1]["from"] = "narrator"
    for record, name in ((own, "conversations[2].from"), (turn(1, role="narrator")(messages(own)), "messages[2].role")):
        write_lines(tmp_path, [record])
        with pytest.raises(DataError) as error:
            list(read_trajectories(tmp_path))
        assert error.value.field == name
