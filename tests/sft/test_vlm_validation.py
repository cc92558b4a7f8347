import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from clvr_train.method.protocol import chat_messages, format_turn
from clvr_train.method.trajectory import Step, Trajectory
from clvr_train.models.qwen_vl import Controller, load_vlm, make_tiny_controller
from clvr_train.runtime.distributed import World
from clvr_train.runtime.metrics import read_metrics
from clvr_train.sft.chats import chat_of, fit_chats
from clvr_train.sft.vlm import ControllerTrainer, sft_config, train_controller
from clvr_train.sft.vlm_validation import judge_reply, questions, turn_numbers, validate
from clvr_train.shapes.controller import make_trajectories
from tests.sft.test_vlm import engine_with

RED, BLUE = (Image.new("RGB", (96, 96), color) for color in ("red", "blue"))
STEPS = (Step("draw", "generate", RED), Step("look", "verify"), Step("mend", "edit", BLUE), Step("done", "stop"))
TALE = Trajectory("tale", "a goal", STEPS)
BLIND = Trajectory("blind", "another goal", (Step("hm", "verify"), Step("no", "stop")))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "controller"
    texts = [format_turn(s, 1) for t in make_trajectories(200, 0, "train") for s in t.steps]
    make_tiny_controller(folder, texts, seed=0, width=64, layers=2)
    return folder


class Scripted:
    """A controller that knows what to say, by the length of the history."""

    def __init__(self, replies: dict[str, list[str]]) -> None:
        self.replies, self.asked = replies, []

    def reply(self, conversations: list[list[dict]]) -> list[str]:
        self.asked += conversations
        turns = [sum(m["role"] == "assistant" for m in messages) for messages in conversations]
        goals = [messages[0]["content"][0]["text"] for messages in conversations]
        return [self.replies[goal][turn] for goal, turn in zip(goals, turns, strict=True)]


def test_questions_hold_the_true_history() -> None:
    asked = questions(TALE, 4)
    assert [question.next_image for question in asked] == [1, 2, 2, 3]
    assert [question.action for question in asked] == ["generate", "verify", "edit", "stop"]
    assert [question.messages for question in asked] == [chat_messages("a goal", TALE.steps[:n]) for n in range(4)]
    assert len(questions(TALE, 2)) == 2


@pytest.mark.parametrize("reply, verdict", [
    ("mend it\nedit <IMG_GEN_2>", (True, True)), ("look\nverify", (True, False)),
    ("mend it\nedit <IMG_GEN_3>", (False, False)), ("edit <IMG_GEN_2>", (False, False)), ("", (False, False)),
])  # fmt: skip
def test_a_reply_parses_and_is_right(reply: str, verdict: tuple[bool, bool]) -> None:
    assert judge_reply(reply, questions(TALE, 4)[2]) == verdict


def test_turns_are_numbered_where_there_is_loss() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7, -100, 8], [1, -100, -100, 2, 3, -100, -100, -100]])
    assert turn_numbers(labels).tolist() == [[0, 1, 1, 0, 0, 2, 0, 3], [1, 0, 0, 2, 2, 0, 0, 0]]


def test_losses_by_turn_and_shares_are_those_worked_out_by_hand(base: Path, tmp_path: Path) -> None:
    cases = [(t, chat_of(t)) for t in (TALE, BLIND)]
    model, processor = load_vlm(base)
    trainer = ControllerTrainer(model, processor, [c for _, c in cases], sft_config(tmp_path, steps=1, batch=1))
    replies = {
        "a goal": ["a\ngenerate <IMG_GEN_1>", "b\nstop", "nothing", "c\nstop"],
        "another goal": ["d\nverify", "e"],
    }
    before, training = torch.get_rng_state(), model.train().training
    found = validate(model, Scripted(replies), cases, trainer.inputs, World())
    sums: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for _, chat in cases:
            inputs = trainer.inputs([chat])
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")
            for token, number in enumerate(turn_numbers(labels)[0, 1:].tolist()):
                sums.setdefault(number, []).append(losses[token])
    sums.pop(0)
    assert sorted(sums) == [1, 2, 3, 4]
    for number, losses in sums.items():
        assert found[f"val_loss_turn_{number}"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    whole = torch.cat([torch.stack(losses) for losses in sums.values()])
    assert found["val_loss"] == pytest.approx(whole.mean().item(), rel=1e-5)
    assert found["val_parsed"] == 4 / 6 and found["val_action"] == 3 / 6
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), before)


def test_turns_that_were_cut_off_are_not_asked_for(base: Path, tmp_path: Path) -> None:
    model, processor = load_vlm(base)
    chat = chat_of(TALE)
    short = fit_chats([chat], processor, 60, "shorten").chats[0]
    assert 0 < short.turns < chat.turns
    trainer = ControllerTrainer(model, processor, [chat], sft_config(tmp_path, steps=1, batch=1))
    scripted = Scripted({"a goal": ["a\ngenerate <IMG_GEN_1>"] * 4})
    found = validate(model, scripted, [(TALE, short)], trainer.inputs, World())
    assert len(scripted.asked) == short.turns
    assert f"val_loss_turn_{short.turns}" in found and f"val_loss_turn_{short.turns + 1}" not in found


def test_validation_during_training_changes_nothing_but_the_log(base: Path, tmp_path: Path) -> None:
    trajectories = list(make_trajectories(8, 0, "train"))
    chats = [chat_of(t) for t in trajectories]
    weights = {}
    for name, cases in (("with", [(TALE, chat_of(TALE)), (BLIND, chat_of(BLIND))]), ("without", [])):
        model, processor = load_vlm(base)
        config = sft_config(tmp_path / name, steps=3, batch=4, micro_batch=2, log_every=1)
        options = {"validation": cases, "validate_every": 2, "max_new_tokens": 4}
        folder = train_controller(model, processor, chats, tmp_path / name, config, engine_with(), **options)
        weights[name] = load_vlm(folder)[0].state_dict()
    assert all(torch.equal(tensor, weights["without"][name]) for name, tensor in weights["with"].items())
    rows = [row for row in read_metrics(tmp_path / "with") if "val_loss" in row]
    assert [row["step"] for row in rows] == [2, 3]
    assert all(math.isfinite(row["val_loss"]) and row["val_parsed"] == row["val_action"] == 0 for row in rows)
    model, processor = load_vlm(tmp_path / "with/model")
    trainer = ControllerTrainer(model, processor, chats, sft_config(tmp_path / "again", steps=1, batch=1))
    controller = Controller(model, processor, max_new_tokens=4)
    again = validate(model, controller, [(TALE, chat_of(TALE)), (BLIND, chat_of(BLIND))], trainer.inputs, World())
    assert again == {name: rows[-1][name] for name in again}
