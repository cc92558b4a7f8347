"""run_closed_loop and evaluate with a controller on a chat server: it dies, and the same command goes on."""

import json
from pathlib import Path

import pytest

from clvr_train.data.images import open_image
from clvr_train.data.readers import load_trajectories
from clvr_train.method.truncation import truncate
from recipes.run_closed_loop import main
from tests.inference.test_chat_controller import answers
from tests.services.server import ScriptedServer

GOALS = ["a red circle", "two squares", "three circles"]
TURNS = ["draw it\ngenerate <IMG_GEN_1>", "it is too dark\nedit <IMG_GEN_2>", "fine\nstop"]


def polite(goal, turn, request):
    return TURNS[turn]


def dies_on_squares(goal, turn, request):
    return 400 if goal == "two squares" and turn else TURNS[turn]


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """run(turn, *overrides) -> (summary by goal, requests); the server has one address all along."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLLER_KEY", "sesame")
    (tmp_path / "goals.txt").write_text("\n".join(GOALS))

    def run(server: ScriptedServer, turn, *overrides):
        server.script, before = [answers(turn)], len(server.requests)
        main(["run=loop", "goals_file=goals.txt", f"controller.url={server.url}", "controller.model=my/vlm",
              "controller.chat.key_env=CONTROLLER_KEY", "controller.chat.retries=0", f"model.folder={tiny_folder}",
              "model.window=48", "steps=1", *overrides])  # fmt: skip
        rows = json.loads(Path("runs/loop/closed_loop.json").read_text())
        return {row["goal"]: row for row in rows}, server.requests[before:]

    return run


def test_a_controller_that_dies_costs_one_goal_and_the_same_command_draws_it(run, caplog) -> None:
    with ScriptedServer(answers(polite)) as server:
        rows, _ = run(server, dies_on_squares, "active=2")
        assert [rows[goal]["stop_reason"] for goal in GOALS] == ["stop", "controller: HTTP 400: it broke", "stop"]
        assert [rows[goal]["images"] for goal in GOALS] == [2, 1, 2]
        assert "1 goals got no reply (controller: HTTP 400: it broke)" in caplog.text
        page = Path("runs/loop/pages/goal-0002.html").read_text()
        assert "controller: HTTP 400" in page and page.count("data:image/png") == 1
        again, requests = run(server, polite, "active=2")
        assert {request["messages"][0]["content"] for request in requests} == {"two squares"}
        assert all(row["stop_reason"] == "stop" and row["images"] == 2 for row in again.values())
        assert again["a red circle"] == rows["a red circle"]
        assert run(server, polite, "active=2")[1] == [], "all is done"
    assert not [path for path in Path("runs").rglob("*") if path.is_file() and b"sesame" in path.read_bytes()]


def test_what_is_written_is_what_training_reads_and_says_what_it_took(run) -> None:
    with ScriptedServer(answers(polite)) as server:
        rows, _ = run(server, polite, "cfg=4")
    trajectories = load_trajectories(Path("runs/loop/trajectories.jsonl"))
    assert [each.goal for each in trajectories] == GOALS
    for each in trajectories:
        assert [(step.reasoning, step.action) for step in each.steps] == [
            ("draw it", "generate"), ("it is too dark", "edit"), ("fine", "stop")]
        assert len({open_image(image).size for image in each.images}) == 1
        assert [sample.step for sample in truncate(each)] == [1, 2]
    for line in Path("runs/loop/trajectories.jsonl").read_text().splitlines():
        record = json.loads(line)
        facts = record["closed_loop"]
        goal = record["conversations"][0]["value"]
        assert rows[goal] == {"id": record["id"], "goal": goal, **facts}
        assert facts["stop_reason"] == "stop" and facts["nfe"] == 2 * 2 and len(facts["turn_seconds"]) == 3
        assert facts["seconds"] == pytest.approx(sum(facts["turn_seconds"]), abs=0.01)


def test_other_goals_under_the_same_name_are_refused(run, capsys) -> None:
    with ScriptedServer(answers(polite)) as server:
        run(server, polite)
        Path("goals.txt").write_text("a blue circle")
        with pytest.raises(SystemExit):
            run(server, polite)
    assert "goal-0001 was another goal, 'a red circle'; choose another run=" in capsys.readouterr().err


def test_the_number_of_steps_is_that_of_the_kind_of_model(run) -> None:
    """The tiny model is a base: 28 steps with guidance."""
    with ScriptedServer(answers(polite)) as server:
        rows, _ = run(server, polite, "steps=null", "max_nfe=60")
    assert {(row["nfe"], row["stop_reason"]) for row in rows.values()} == {(56, "max_nfe")}


def test_evaluate_asks_a_chat_server_and_scores_nothing_that_it_did_not_answer(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from recipes.evaluate import main

    monkeypatch.chdir(tmp_path)
    alive = True
    with ScriptedServer(answers(lambda goal, turn, request: TURNS[turn] if alive else 400)) as server:
        command = ["mode=closed_loop", f"controller={server.url}", "controller_name=my/vlm", "num=3", "steps=1",
                   "cfg=1", f"model.folder={tiny_folder}", "model.window=48"]  # fmt: skip
        alive = False
        with pytest.raises(SystemExit):
            main([*command, "run=eval"])
        assert "3 of 3 goals got no reply (controller: HTTP 400: it broke); run the same" in capsys.readouterr().err
        assert not Path("runs/eval/evaluation.json").exists()
        alive = True
        main([*command, "run=eval"])
    summary = json.loads(Path("runs/eval/evaluation.json").read_text())
    assert (summary["n"], summary["rounds_per_goal"]) == (3, 2.0)
