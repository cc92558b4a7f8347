"""The ledger gives back what was drawn, bit for bit, or nothing; and it keeps within its size."""

import json

import pytest
import torch
from PIL import Image

from clvr_train.method.score import ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.pprl.ledger import OBJECTS, Ledger, policy_hash, replayed
from clvr_train.pprl.rollout import new_groups
from clvr_train.pprl.tasks import Task

SETTINGS = {"policy": "p", "steps": 8, "cfg": 4.0, "size_px": [96, 96], "window": 48}


def task(name, colour="red"):
    picture = Image.new("RGB", (96, 96), colour)
    return Task(Sample(name, 2, "a goal", ("one", "two"), (picture,)), ProxyPrompt("p", "e", (1,)))


def drawn(names="ab", epoch=0, size=3):
    groups = new_groups([task(name) for name in names], group_size=size, run_seed=0, epoch=epoch)
    for group in groups:
        group.x0 = torch.randn(size, 4, 3, generator=torch.Generator().manual_seed(epoch * 100 + group.place))
        group.scores = [Score(0.25, parts={"a": 0.25}, transcript="good"), Score(None, "down"), Score(1 / 3)]
        group.advantages, group.r, group.nfe = [0.1, None, -0.1], [0.6, None, 0.4], 48
    return groups


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path, max_gb=1)


def again(names="ab", **options):
    return new_groups([task(name) for name in names], group_size=3, **{"run_seed": 0, "epoch": 0} | options)


def test_what_was_drawn_is_there_again(ledger):
    first = drawn()
    ledger.write(0, first, SETTINGS, 2)
    second = again()
    assert ledger.resume(0, second, SETTINGS) == []
    for one, other in zip(first, second, strict=True):
        assert one.x0.equal(other.x0) and one.scores == other.scores and one.nfe == other.nfe
    assert ledger.epochs() == [0] and len(list((ledger.folder / OBJECTS).iterdir())) == 2


@pytest.mark.parametrize(
    ("groups", "settings"),
    [
        (again(run_seed=1), SETTINGS),
        (again(epoch=1), SETTINGS),
        (again("ac"), SETTINGS),
        (again(), SETTINGS | {"policy": "q"}),
        (again(), SETTINGS | {"cfg": 1.0}),
    ],
)
def test_what_was_drawn_otherwise_is_drawn_again(ledger, groups, settings):
    ledger.write(0, drawn(), SETTINGS, 2)
    left = ledger.resume(0, groups, settings)
    assert left == (groups[1:] if groups[1].task.sample.trajectory_id == "c" else groups)
    assert all(group.x0 is None for group in left)


def test_another_picture_in_the_history_is_another_context(ledger):
    ledger.write(0, drawn("a"), SETTINGS, 2)
    groups = new_groups([task("a", "blue")], group_size=3, run_seed=0, epoch=0)
    assert ledger.resume(0, groups, SETTINGS) == groups


def test_what_is_damaged_is_drawn_again(ledger, caplog):
    ledger.write(0, drawn(), SETTINGS, 2)
    entry = json.loads((ledger.folder / "epoch-00000" / "0000.json").read_text())
    stored = ledger.folder / OBJECTS / f"{entry['x0']}.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    (ledger.folder / "epoch-00000" / "0001.json").write_text('{"place": 1, ')
    groups = again()
    assert ledger.resume(0, groups, SETTINGS) == groups
    assert "its content is not what its name says" in caplog.text and "0001.json: not read" in caplog.text
    ledger.write(0, drawn(), SETTINGS, 2)
    assert ledger.resume(0, groups, SETTINGS) == [], "what is drawn again is kept again"


def test_the_oldest_epochs_go_and_what_others_name_stays(tmp_path):
    one = 2 * sum(path.stat().st_size for path in _objects(Ledger(tmp_path / "x", 1), drawn("a")))
    ledger = Ledger(tmp_path, max_gb=2 * one / 1e9)
    for epoch in range(5):
        ledger.write(epoch, drawn(epoch=epoch), SETTINGS, 2)
        ledger.prune()
    assert ledger.epochs() == [3, 4] and len(list((tmp_path / OBJECTS).iterdir())) == 4
    ledger.write(5, drawn(epoch=3), SETTINGS, 2)  # the same tokens as in epoch 3
    ledger.write(6, drawn(epoch=6), SETTINGS, 2)
    ledger.prune()
    assert ledger.epochs() == [5, 6]
    assert all(ledger.tokens(entry) is not None for epoch in (5, 6) for entry in ledger.entries(epoch))
    small = Ledger(tmp_path, max_gb=1e-9)
    small.prune()
    assert small.epochs() == [6], "the newest stays"


def _objects(ledger, groups):
    ledger.write(0, groups, SETTINGS, 2)
    return list((ledger.folder / OBJECTS).iterdir())


def test_no_ledger(tmp_path):
    ledger = Ledger(tmp_path, max_gb=0)
    ledger.write(0, drawn(), SETTINGS, 2)
    assert not list(tmp_path.iterdir())
    groups = again()
    assert ledger.resume(0, groups, SETTINGS) == groups


def test_a_group_to_replay_has_its_task(ledger):
    ledger.write(0, drawn("a"), SETTINGS, 2)
    entry = ledger.entries(0)[0]
    group = replayed(entry, {("a", 2): [task("a", "blue"), task("a")]}, "x")
    assert group.task.sample.references == task("a").sample.references
    assert group.seeds == drawn("a")[0].seeds and group.scores == drawn("a")[0].scores
    with pytest.raises(ValueError, match="x: step 2 of trajectory 'a' is not in the data; give the data"):
        replayed(entry, {}, "x")
    with pytest.raises(ValueError, match="x: step 2 of trajectory 'a' has another context in the data"):
        replayed(entry, {("a", 2): [task("a", "blue")]}, "x")


def test_a_policy_is_known_by_its_weights():
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    same = {"b": torch.zeros(3, dtype=torch.bfloat16), "a": torch.ones(2)}
    assert policy_hash(tensors) == policy_hash(same) != policy_hash(tensors | {"a": torch.tensor([1.0, 1.0 + 1e-7])})


def test_what_no_entry_names_is_swept_away(tmp_path):
    """Left by a kill between two writes, or by an epoch that was drawn again otherwise."""
    ledger = Ledger(tmp_path, max_gb=1)
    ledger.write(0, drawn(epoch=0), SETTINGS, 2)
    ledger.write(0, drawn(epoch=1), SETTINGS, 2)  # again, otherwise
    (tmp_path / OBJECTS / "x.safetensors.tmp").touch()
    (tmp_path / "epoch-00000" / "0000.json.tmp").touch()
    assert len(list((tmp_path / OBJECTS).iterdir())) == 5
    ledger.sweep()
    assert len(list((tmp_path / OBJECTS).iterdir())) == 2 and len(list((tmp_path / "epoch-00000").iterdir())) == 2
    assert all(ledger.tokens(entry) is not None for entry in ledger.entries(0))


def test_an_epoch_is_whole_with_all_its_groups(ledger):
    groups = drawn()
    ledger.write(0, groups[:1], SETTINGS, 2)
    assert not ledger.whole(0) and not ledger.whole(1)
    ledger.write(0, groups[1:], SETTINGS, 2)
    assert ledger.whole(0)


def test_rollouts_of_another_prompt_are_judged_again(ledger):
    ledger.write(0, drawn(), SETTINGS, 2)
    groups = again()
    groups[1].task = Task(groups[1].task.sample, ProxyPrompt("another", "e", (1,)))
    assert ledger.resume(0, groups, SETTINGS) == []
    assert groups[0].scores == drawn()[0].scores and all(score.missing for score in groups[1].scores)
    assert groups[1].x0.equal(drawn()[1].x0)
