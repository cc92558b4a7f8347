import time

import pytest
from PIL import Image

from clvr_train.inference.closed_loop import Budget, NoReply, Result, Run, advance, run_closed_loop
from clvr_train.method.truncation import truncate


class Scripted:
    """Answers from a script keyed by the goal; records how it was asked."""

    def __init__(self, scripts: dict) -> None:
        self.scripts = scripts
        self.greedy: list[int] = []
        self.seeds: list[int] = []

    def reply(self, conversations, seed=None):
        if seed is None:
            self.greedy.append(len(conversations))
        else:
            self.seeds.append(seed)
        return [self.answer(messages, seed) for messages in conversations]

    def answer(self, messages, seed):
        turn = sum(message["role"] == "assistant" for message in messages)
        images = sum("image" in message["content"][0] for message in messages)
        script = self.scripts[messages[0]["content"][0]["text"]]
        line = script(turn, seed) if callable(script) else script[turn]
        return line if isinstance(line, NoReply) else line.format(n=images + 1)


class Brush:
    def __init__(self) -> None:
        self.batches: list[list] = []
        self.seeds: list[tuple] = []

    def draw(self, samples, seeds):
        self.batches.append(list(samples))
        self.seeds += seeds
        return [Image.new("RGB", (8, 8), (sample.step, 0, 0)) for sample in samples]


GENERATE, EDIT, VERIFY, STOP = (
    "draw\ngenerate <IMG_GEN_{n}>", "change\nedit <IMG_GEN_{n}>", "look\nverify", "done\nstop",
)  # fmt: skip


def run(scripts: dict, **settings) -> tuple[list[Result], Scripted, Brush]:
    controller, brush = Scripted(scripts), Brush()
    goals = [(f"id-{i}", goal) for i, goal in enumerate(scripts)]
    return run_closed_loop(controller, brush.draw, goals, **settings), controller, brush


def test_goals_advance_together_and_end_apart() -> None:
    scripts = {"long": [GENERATE, VERIFY, EDIT, STOP], "short": [GENERATE, STOP]}
    results, controller, brush = run(scripts, nfe_per_image=4)
    assert [[step.action for step in r.trajectory.steps] for r in results] == [
        ["generate", "verify", "edit", "stop"], ["generate", "stop"]]
    assert [(r.stop_reason, r.nfe) for r in results] == [("stop", 8), ("stop", 4)]
    assert controller.greedy == [2, 2, 1, 1]
    assert [len(batch) for batch in brush.batches] == [2, 1]
    assert all(r.seconds > 0 for r in results)


def test_the_drawing_model_sees_what_training_showed_it() -> None:
    results, _, brush = run({"goal": [GENERATE, VERIFY, EDIT, STOP]})
    shown = [sample for batch in brush.batches for sample in batch]
    for seen, trained in zip(shown, truncate(results[0].trajectory), strict=True):
        assert (seen.reasonings, seen.references, seen.key) == (trained.reasonings, trained.references, trained.key)
        assert seen.target is None


def test_never_more_images_than_allowed() -> None:
    results, _, brush = run({"goal": lambda turn, seed: EDIT if turn else GENERATE}, budget=Budget(max_rounds=3))
    assert results[0].stop_reason == "max_rounds"
    assert len(results[0].trajectory.images) == len(brush.seeds) == 3


def test_looking_forever_is_bounded() -> None:
    results, controller, _ = run({"goal": lambda turn, seed: VERIFY if turn else GENERATE}, budget=Budget(max_verify=2))
    assert results[0].stop_reason == "max_verify"
    assert [step.action for step in results[0].trajectory.steps] == ["generate", "verify", "verify"]
    assert len(controller.greedy) == 4


def test_malformed_turn_is_retried_then_the_canvas_stands() -> None:
    results, controller, _ = run({"goal": lambda turn, seed: "mumble" if turn else GENERATE}, retries=2)
    assert results[0].stop_reason.startswith("malformed: the last line 'mumble'")
    assert len(results[0].trajectory.images) == 1
    assert len(controller.seeds) == len(set(controller.seeds)) == 2


def test_a_retry_can_save_the_turn() -> None:
    results, _, _ = run({"goal": lambda turn, seed: STOP if turn else "" if seed is None else GENERATE})
    assert results[0].stop_reason == "stop" and len(results[0].trajectory.images) == 1


@pytest.mark.parametrize("script, reason", [
    ([EDIT], "malformed: 'edit' before any image"),
    ([STOP], "stop"),
    ([VERIFY, VERIFY, VERIFY], "max_verify"),
    (["draw\ngenerate <IMG_GEN_2>"], "malformed: <IMG_GEN_2>"),
])
def test_nothing_drawn_is_no_trajectory(script: list[str], reason: str) -> None:
    results, _, brush = run({"goal": script}, retries=0)
    assert results[0].trajectory is None and results[0].nfe == 0 and not brush.seeds
    assert results[0].stop_reason.startswith(reason)


def test_noise_depends_on_the_goal_and_not_on_its_neighbours() -> None:
    alone = run({"b": [GENERATE, EDIT, STOP]})[2].seeds
    controller, brush = Scripted({"a": [GENERATE, STOP], "b": [GENERATE, EDIT, STOP]}), Brush()
    run_closed_loop(controller, brush.draw, [("id-9", "a"), ("id-0", "b")])
    assert alone == [seed for seed in brush.seeds if "id-0" in seed]


def test_no_goals_and_bad_arguments() -> None:
    assert run({})[0] == []
    for bounds in ({"max_rounds": 0}, {"max_rounds": 2.5}, {"max_verify": -1}, {"max_nfe": 0}, {"verify_every": 0},
                   {"max_seconds": -1}, {"max_seconds": float("nan")}):  # fmt: skip
        with pytest.raises(ValueError, match="=".join(map(str, *bounds.items()))):
            Budget(**bounds)
    with pytest.raises(ValueError, match="max_nfe=3: an image takes 4 network evaluations"):
        run({"goal": [STOP]}, budget=Budget(max_nfe=3), nfe_per_image=4)
    with pytest.raises(ValueError, match="twice"):
        run_closed_loop(Scripted({}), Brush().draw, [("a", "x"), ("a", "y")])


def forever(turn, seed):
    return EDIT if turn else GENERATE


def test_network_evaluations_are_bounded() -> None:
    results, _, brush = run({"goal": forever}, budget=Budget(max_nfe=11), nfe_per_image=4)
    assert (results[0].stop_reason, results[0].nfe, len(brush.seeds)) == ("max_nfe", 8, 2)


def test_seconds_are_bounded_but_not_before_the_first_image() -> None:
    results, _, _ = run({"goal": forever}, budget=Budget(max_seconds=0))
    assert results[0].stop_reason == "max_seconds" and len(results[0].trajectory.images) == 1
    assert len(results[0].turn_seconds) == 1 and results[0].seconds == sum(results[0].turn_seconds)


def test_a_second_look_after_every_other_image() -> None:
    script = [GENERATE, EDIT, EDIT, STOP, STOP]  # the third turn is read as a look, so that the fourth decides
    results, _, _ = run({"goal": script}, budget=Budget(verify_every=2))
    assert [(s.reasoning, s.action) for s in results[0].trajectory.steps] == [
        ("draw", "generate"), ("change", "edit"), ("change", "verify"), ("done", "stop")]
    assert results[0].stop_reason == "stop"


def test_no_more_goals_under_way_than_allowed_and_the_next_joins_in_the_middle() -> None:
    scripts = {"a": [GENERATE, STOP], "b": [GENERATE, EDIT, EDIT, STOP], "c": [GENERATE, STOP], "d": [GENERATE, STOP]}
    ended: list[str] = []
    results, controller, brush = run(scripts, active=2, on_result=lambda name, result: ended.append(name))
    assert [r.stop_reason for r in results] == ["stop"] * 4
    assert controller.greedy == [2, 2, 2, 2, 1, 1] and ended == ["id-0", "id-1", "id-2", "id-3"]
    # The first image of c and the third of b are drawn in one batch.
    assert [[(s.trajectory_id, s.step) for s in batch] for batch in brush.batches] == [
        [("id-0", 1), ("id-1", 1)], [("id-1", 2)], [("id-1", 3), ("id-2", 1)], [("id-3", 1)]]
    alone = run(scripts)[2]
    assert sorted(alone.seeds) == sorted(brush.seeds)
    with pytest.raises(ValueError, match="active=0"):
        run(scripts, active=0)


def test_runs_with_budgets_of_their_own_share_batches() -> None:
    controller, brush = Scripted({"one": forever, "two": forever}), Brush()
    one, two = Run("x", "one", Budget(max_rounds=1)), Run("y", "two", Budget(max_rounds=3))
    for _ in range(4):
        advance(controller, brush.draw, [one, two])
    assert (one.stop_reason, two.stop_reason) == ("max_rounds", "max_rounds")
    assert [len(batch) for batch in brush.batches] == [2, 1, 1]


def test_no_reply_ends_the_goal_with_its_canvas_and_leaves_the_others_alone() -> None:
    away = NoReply("no connection")
    scripts = {"dies": lambda turn, seed: away if turn else GENERATE, "lives": [GENERATE, EDIT, STOP]}
    results, controller, _ = run(scripts)
    assert [r.stop_reason for r in results] == ["controller: no connection", "stop"]
    assert len(results[0].trajectory.images) == 1 and results[0].image.size == (8, 8)
    assert not controller.seeds, "the client has made its own attempts"


def test_a_reply_that_was_cut_is_asked_for_again() -> None:
    cut = NoReply("reply: cut", again=True)
    results, controller, _ = run({"goal": lambda turn, seed: cut if seed is None else STOP if turn else GENERATE})
    assert results[0].stop_reason == "stop" and len(controller.seeds) == 2
    results, _, _ = run({"goal": lambda turn, seed: cut}, retries=1)
    assert results[0].stop_reason == "malformed: reply: cut" and results[0].image is None


def test_seconds_begin_with_the_goal_and_a_late_turn_is_not_drawn() -> None:
    def slow(turn, seed):
        time.sleep(0.02)
        return forever(turn, seed)

    scripts = {str(number): slow for number in range(4)}
    results, _, brush = run(scripts, budget=Budget(max_seconds=0.03), active=1)
    assert [r.stop_reason for r in results] == ["max_seconds"] * 4
    assert [r.nfe for r in results] == [1] * 4 and len(brush.seeds) == 4, "the second turn came too late to be drawn"
