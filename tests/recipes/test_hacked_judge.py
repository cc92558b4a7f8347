"""A judge that likes saturated images is caught before the true score has fallen by 0.1, and the policy rolled back."""

import json

from recipes import train_pprl

# Few and small rollouts, and a rate at which a few updates are a hack.
HACKED = ["experiment=shapes_pprl", "model.folder=base", "data.folder=runs/data", "run=hacked", "reward=saturation",
          "pprl.weight_edit=0", "rollout.groups=4", "rollout.group_size=6", "rollout.cfg=1", "rollout.steps=6",
          "pprl.num_times=2", "pprl.anchor=0", "pprl.lr=3e-3", "pprl.epochs=5", "sentinel.probe=12",
          "sentinel.held_out.shapes=1", "sentinel.action=roll_back", "sentinel.every=1"]  # fmt: skip


def lines(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_hack_is_caught_and_undone(world, monkeypatch):
    monkeypatch.chdir(world)
    train_pprl.main(HACKED)
    run = world / "runs" / "hacked"
    rows, noted = lines(run, "metrics.jsonl"), lines(run, "sentinel.jsonl")
    caught = next(row for row in noted if row["action"] == "roll_back")
    assert caught["epoch"] <= 4 and caught["kept"] < caught["epoch"]
    assert noted[0]["state"] == "warned" and noted[0]["epoch"] == caught["epoch"] - 1
    assert any("saturation is" in message for message in caught["messages"])
    # Changes of the true score on the probe, which is small, since the start; docs/pprl.md has them on more goals.
    assert all(row["held_out"] + row["held_out_error"] > -0.1 for row in rows[: caught["epoch"]])
    acted, after = rows[caught["epoch"] - 1 : caught["epoch"] + 1]
    assert 1 < after["saturation"] < acted["saturation"]  # one update after the state that was kept
