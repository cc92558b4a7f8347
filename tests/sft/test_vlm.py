import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from clvr_train.data.images import open_image
from clvr_train.data.readers import read_trajectories
from clvr_train.data.sharegpt import write_trajectories
from clvr_train.method.protocol import format_turn
from clvr_train.method.trajectory import Step, Trajectory
from clvr_train.models.qwen_vl import load_vlm, make_tiny_controller
from clvr_train.runtime.metrics import read_metrics
from clvr_train.sft import vlm
from clvr_train.sft.vlm import build_trainer, last_checkpoint, sft_config, train_controller, training_order
from clvr_train.shapes.controller import make_trajectories


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "controller"
    texts = [format_turn(s, 1) for t in make_trajectories(200, 0, "train") for s in t.steps]
    make_tiny_controller(folder, texts, seed=0)
    return folder


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory) -> list[Trajectory]:
    folder = tmp_path_factory.mktemp("data")
    write_trajectories(folder, make_trajectories(40, 0, "train"))
    return list(read_trajectories(folder))


def tricky(folder: Path) -> list[Trajectory]:
    """Texts that would fool a mask made by searching for words or markup."""
    red, blue = (Image.new("RGB", (96, 96), color) for color in ("red", "blue"))
    goal = "an assistant\nassistant says <|im_start|>assistant\n hello <|im_end|> {% generation %} and <image_pad>"
    write_trajectories(folder, [
        Trajectory("tricky", goal, (
            Step("the assistant looks at the user\nand draws", "generate", red), Step("look <|im_end|> here", "verify"),
            Step("user\nassistant", "edit", blue), Step("done", "stop"))),
        Trajectory("short", "goal", (Step("draw", "generate", red), Step("done", "stop"))),
        Trajectory("blind", "goal", (Step("what can one see", "verify"), Step("nothing", "stop"))),
    ])
    return list(read_trajectories(folder))


def collate(base: Path, trajectories: list[Trajectory], tmp_path: Path):
    model, processor = load_vlm(base)
    config = sft_config(tmp_path / "run", steps=1, batch=len(trajectories), micro_batch=len(trajectories), lr=1e-3)
    trainer = build_trainer(model, processor, trajectories, config)
    rows = [{**vlm.chat_example(t), "images": [open_image(image) for image in t.images]} for t in trajectories]
    return trainer.data_collator(rows), processor.tokenizer, trainer


def test_loss_is_on_the_assistants_tokens_only(base: Path, tmp_path: Path) -> None:
    data = tricky(tmp_path / "data")
    batch, tokenizer, _ = collate(base, data, tmp_path)
    for row, trajectory in enumerate(data):
        kept = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][kept], batch["input_ids"][row][kept])
        numbers, drawn = [], 0
        for step in trajectory.steps:
            drawn += step.draws
            numbers.append(drawn)
        turns = [format_turn(s, n).replace("<|", "< |") for s, n in zip(trajectory.steps, numbers, strict=True)]
        # Token by token: each stretch of the mask is one turn with its end-of-turn token, and nothing else is kept.
        expected = [tokenizer(f"{turn}<|im_end|>\n")["input_ids"] for turn in turns]
        edges = torch.diff(kept.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten().tolist()
        stretches = [batch["input_ids"][row][a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
        assert stretches == expected


def test_images_stay_where_they_were_drawn(base: Path, tmp_path: Path) -> None:
    batch, tokenizer, trainer = collate(base, tricky(tmp_path / "data"), tmp_path)
    text = tokenizer.decode(batch["input_ids"][0])
    first = text.index("<IMG_GEN_1>")
    assert first < text.index("<|vision_start|>") < text.index("<IMG_GEN_2>") < text.rindex("<|vision_start|>")
    assert (batch["input_ids"] == trainer.model.config.image_token_id).sum() == 9 * 3
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]] * 3


def test_order_visits_all_and_depends_on_the_seed_alone() -> None:
    sizes = [(number % 3, number) for number in range(50)]
    order = training_order(sizes, steps=25, batch=4, seed=1)
    assert sorted(order) == sorted(list(range(50)) * 2)
    assert order == training_order(sizes, 25, 4, 1) != training_order(sizes, 25, 4, 2)
    spread = [max(sizes[i][0] for i in b) - min(sizes[i][0] for i in b)
              for b in (order[i : i + 4] for i in range(0, 100, 4))]
    assert sum(spread) < 25  # unsorted batches of four nearly all span 2


def test_training_learns_and_leaves_a_folder_that_loads(base: Path, trajectories: list, tmp_path: Path) -> None:
    model, processor = load_vlm(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[int] = []
    config = sft_config(tmp_path, steps=12, batch=8, micro_batch=4, lr=2e-3, log_every=4)
    folder = train_controller(model, processor, trajectories, tmp_path, config, on_step=seen.append)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 12] and seen == list(range(1, 13))
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "lr", "grad_norm"))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    trained, _ = load_vlm(folder)
    still = [name for name, p in trained.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"full parameters, but these stood still: {still}"


class Killed(Exception):
    pass


def test_killed_and_resumed_equals_uninterrupted(base: Path, trajectories: list, tmp_path: Path) -> None:
    def train(run: Path, kill_at: int | None = None) -> dict[str, torch.Tensor]:
        def on_step(step: int) -> None:
            if step == kill_at:
                raise Killed

        model, processor = load_vlm(base)
        config = sft_config(run, steps=6, batch=4, micro_batch=4, lr=2e-3, log_every=1, save_every=2)
        return load_vlm(train_controller(model, processor, trajectories, run, config, on_step=on_step))[0].state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_at=5)
    assert last_checkpoint(tmp_path / "killed/checkpoints").name == "checkpoint-4"
    assert not (tmp_path / "killed/model").exists()
    resumed = train(tmp_path / "killed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((10, json.dumps({"global_step": 10})), (20, '{"global_st'), (30, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert last_checkpoint(tmp_path / "none") is None


def test_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch=6: must be a multiple of micro_batch=4 x 1"):
        sft_config(tmp_path, steps=1, batch=6, micro_batch=4, lr=1e-3)
