"""Scripted trajectories end well, stay within their limits, and the teacher resolves them."""

from collections import Counter
from dataclasses import replace

import pytest

from clvr_train.method.score import TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.method.truncation import truncate
from clvr_train.shapes.controller import MAX_IMAGES, MAX_WORDS, Habits, ScriptedController, make_trajectories
from clvr_train.shapes.edits import parse_edits
from clvr_train.shapes.goals import split_of
from clvr_train.shapes.judge import ShapesJudge
from clvr_train.shapes.language import parse_goal
from clvr_train.shapes.render import confident_scene, render
from clvr_train.shapes.teacher import ShapesTeacher
from clvr_train.shapes.world import Thing, satisfied


@pytest.fixture(scope="module")
def trajectories():
    return list(make_trajectories(400, seed=0))


def test_trajectories_end_with_the_goal_met(trajectories):
    for trajectory in trajectories:
        assert satisfied(parse_goal(trajectory.goal), confident_scene(trajectory.images[-1]))
        assert trajectory.steps[-1].action == "stop" and len(trajectory.images) <= MAX_IMAGES
        assert all(len(step.reasoning.split()) <= MAX_WORDS for step in trajectory.steps)
        assert split_of(parse_goal(trajectory.goal)) == "train"


def test_all_counts_of_images_occur(trajectories):
    counts = Counter(min(len(trajectory.images), 4) for trajectory in trajectories)
    assert all(counts[n] >= 12 for n in (1, 2, 3, 4)), counts
    assert any(step.action == "verify" for trajectory in trajectories for step in trajectory.steps)


def test_trajectories_repeat_from_their_seed(trajectories):
    again = next(make_trajectories(400, seed=0))
    assert [step.reasoning for step in again.steps] == [step.reasoning for step in trajectories[0].steps]
    assert [image.tobytes() for image in again.images] == [
        image.tobytes() for image in trajectories[0].images
    ]
    assert len({trajectory.id for trajectory in trajectories}) == len(trajectories)


def test_a_controller_whose_tool_always_slips_gives_up_and_counts():
    controller = ScriptedController(Habits(draw_slip=1.0, edit_slip=1.0))
    results = [controller.trajectory("a red circle left of a blue square", seed, "t") for seed in range(30)]
    assert controller.discarded == results.count(None) > 0


def test_the_teacher_resolves_the_steps_and_reads_no_target(trajectories):
    teacher, judge = ShapesTeacher(), ShapesJudge()
    samples = [sample for trajectory in trajectories for sample in truncate(trajectory)]
    assert len(samples) >= 500
    resolved = followed = 0
    for sample in samples:
        try:
            prompt = teacher.proxy_prompt(replace(sample, target=None))
        except TeacherRefusal:
            continue
        resolved += 1
        score = judge.global_score(sample.target, prompt.p_t2i)
        followed += score.value > 1 - 1e-9
        if sample.step > 1:
            edit = judge.edit_score(sample.references[prompt.idx[0] - 1], sample.target, prompt.p_i2i)
            assert not edit.missing and parse_edits(prompt.p_i2i)
    assert resolved >= 0.99 * len(samples)
    assert followed >= 0.75 * len(samples)  # the rest are the drawing tool's slips


def test_without_drawing_slips_every_target_is_what_the_teacher_asks_for():
    controller = ScriptedController(Habits(draw_slip=0.0, edit_slip=0.0, plan_slip=0.6, incremental=0.7))
    teacher, judge = ShapesTeacher(), ShapesJudge()
    steps = 0
    for trajectory in make_trajectories(250, seed=1, controller=controller):
        for sample in truncate(trajectory):
            prompt = teacher.proxy_prompt(sample)
            assert judge.global_score(sample.target, prompt.p_t2i).value == pytest.approx(1.0)
            if sample.step > 1:
                score = judge.edit_score(sample.references[-1], sample.target, prompt.p_i2i)
                assert score.value == pytest.approx(1.0), (prompt, sample.reasonings)
            steps += 1
    assert steps >= 500


def test_going_back_is_told_in_idx(trajectories):
    controller = ScriptedController(Habits(edit_slip=0.6, go_back=1.0))
    found = 0
    for trajectory in make_trajectories(60, seed=2, controller=controller):
        for sample in truncate(trajectory):
            if "go back to the first picture" in sample.reasonings[-1]:
                assert ShapesTeacher().proxy_prompt(sample).idx == (1,)
                found += 1
    assert found > 3


def sample_of(goal, *reasonings, scenes=()):
    return Sample("t", len(scenes) + 1, goal, reasonings, tuple(render(scene) for scene in scenes))


def test_indirect_words_are_resolved_from_goal_plan_and_picture():
    teacher = ShapesTeacher()
    goal = "a red circle and a blue square"
    plan = sample_of(goal, "the first one top-left , the other one directly below it .")
    wanted = "a red circle in the top-left and a blue square in the left and nothing else"
    assert teacher.proxy_prompt(plan).p_t2i == wanted
    scene = (Thing("circle", "red", 0), Thing("square", "green", 4))
    report = "i see red circle top-left , green square centre . the square has the wrong colour ."
    words = ("make it blue .", "give it the colour of the last one .", "make the square blue .")
    for instruction in words:
        prompt = teacher.proxy_prompt(
            sample_of(goal, "just draw .", f"{report} {instruction}", scenes=[scene])
        )
        assert prompt.p_i2i == "make the green square in the centre blue" and prompt.idx == (1,)
    verified = sample_of(goal, "just draw .", "the square should be blue .", "fix that .", scenes=[scene])
    assert teacher.proxy_prompt(verified).p_i2i == "make the green square in the centre blue"


@pytest.mark.parametrize(
    ("reasoning", "scenes", "reason"),
    [
        ("something nice .", [], "cannot resolve the plan"),
        ("fix that .", [(Thing("circle", "red", 0),)], "cannot resolve the edit in 'fix that .'"),
        ("i see red circle top-left .", [(Thing("circle", "red", 0),)], "no edit"),
        ("remove the circle .", [(Thing("circle", "red", 0),)], "empty picture"),
    ],
)
def test_the_teacher_refuses_with_a_reason(reasoning, scenes, reason):
    texts = ("draw it .", reasoning) if scenes else (reasoning,)
    with pytest.raises(TeacherRefusal, match=reason):
        ShapesTeacher().proxy_prompt(sample_of("a red circle", *texts, scenes=scenes))


def test_the_teacher_refuses_a_goal_it_cannot_read():
    with pytest.raises(TeacherRefusal, match="goal"):
        ShapesTeacher().proxy_prompt(sample_of("a cat", "draw it ."))
