import pytest
from PIL import Image

from clvr_train.inference.closed_loop import Budget, Result, run_closed_loop
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
        return line.format(n=images + 1)


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
    for bounds in ({"max_rounds": 0}, {"max_nfe": 0}, {"verify_every": 0}, {"max_seconds": -1}):
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
