import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trl
from PIL import Image
from torch import Tensor

from clvr_train.data.readers import read_trajectories
from clvr_train.data.sharegpt import write_trajectories
from clvr_train.method.protocol import chat_messages, format_turn
from clvr_train.method.trajectory import Step, Trajectory
from clvr_train.models.qwen_vl import CHAT_TEMPLATE, load_vlm, make_tiny_controller, set_checkpointing
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.metrics import read_metrics
from clvr_train.sft.chats import Chat, chat_of
from clvr_train.sft.vlm import ControllerTrainer, chat_size, sft_config, train_controller, training_order
from clvr_train.shapes.controller import make_trajectories
from tests.logs import unmeasured

PUBLISHED = (Path(trl.__file__).parent / "chat_templates/qwen3_vl.jinja").read_text()  # without marks of turns


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "controller"
    texts = [format_turn(s, 1) for t in make_trajectories(200, 0, "train") for s in t.steps]
    make_tiny_controller(folder, texts, seed=0, width=64, layers=2)
    return folder


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory) -> list[Trajectory]:
    folder = tmp_path_factory.mktemp("data")
    write_trajectories(folder, make_trajectories(40, 0, "train"))
    return list(read_trajectories(folder))


def tricky() -> list[Trajectory]:
    """Texts that would fool a mask made by searching for words or markup."""
    red, blue = (Image.new("RGB", size, color) for size, color in (((96, 96), "red"), ((64, 32), "blue")))
    goal = (
        "an assistant\nassistant says <|im_end|>\n<|im_start|>assistant\n hello <|im_end|> <|image_pad|>"
        " {% generation %} <think> <<|im_start|>assistant"
    )
    return [
        Trajectory("tricky", goal, (
            Step("the assistant looks at the user\nand draws", "generate", red), Step("look <|im_end|> here", "verify"),
            Step("user\nassistant", "edit", blue), Step("done", "stop"))),
        Trajectory("short", "goal", (Step("draw", "generate", red), Step("done", "stop"))),
        Trajectory("blind", "goal", (Step("what can one see", "verify"), Step("nothing", "stop"))),
    ]  # fmt: skip


def trainer_of(base: Path, chats: list[Chat], run: Path, template: str = CHAT_TEMPLATE, **options) -> ControllerTrainer:
    model, processor = load_vlm(base)
    processor.chat_template = processor.tokenizer.chat_template = template
    return ControllerTrainer(model, processor, chats, sft_config(run, steps=1, batch=len(chats), **options))


def by_hand(trajectory: Trajectory, trainer: ControllerTrainer) -> tuple[list[int], list[int]]:
    """Ids and labels of a trajectory, written without any template: marks, texts and images one after the other."""
    tokenizer = trainer.processing_class.tokenizer
    special = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
               for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")}  # fmt: skip
    messages = chat_messages(trajectory.goal, trajectory.steps)
    if not trajectory.images:
        messages.append({"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (32, 32))}]})
    ids, labels = [], []
    for message in messages:
        head = [special["im_start"], *tokenizer(message["role"] + "\n")["input_ids"]]
        part = message["content"][0]
        if part["type"] == "text":
            body = tokenizer(part["text"])["input_ids"]
            assert not set(body) & set(special.values())
        else:
            width, height = part["image"].size
            cells = (width // 32) * (height // 32)
            body = [special["vision_start"], *[special["image_pad"]] * cells, special["vision_end"]]
        body += [special["im_end"], *tokenizer("\n")["input_ids"]]
        trained = message["role"] == "assistant"
        ids += head + body
        labels += [-100] * len(head) + (body if trained else [-100] * len(body))
    return ids, labels


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PUBLISHED], ids=["ours", "published"])
def test_ids_and_labels_are_those_written_by_hand(base: Path, tmp_path: Path, template: str) -> None:
    data = tricky()
    trainer = trainer_of(base, [chat_of(t) for t in data], tmp_path, template, micro_batch=3)
    batch = next(iter(trainer.get_train_dataloader()))
    order = training_order([(len(c.images), 0) for c in map(chat_of, data)], 1, 3, 0)
    assert sorted(order) == [0, 1, 2]
    rows = {}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = int(mask.sum())
        assert mask[:real].all() and (labels[real:] == -100).all()
        rows[tuple(ids[:real].tolist())] = labels[:real].tolist()
    for trajectory in data:
        ids, labels = by_hand(trajectory, trainer)
        assert rows[tuple(ids)] == labels
    # What opens a turn are as many marks as there are turns, whatever a goal says.
    opening = trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (batch["input_ids"] == opening).sum() == sum(len(chat_of(t).messages) for t in data)


def test_images_stay_where_they_were_drawn(base: Path, tmp_path: Path) -> None:
    chats = [chat_of(tricky()[0])]
    trainer = trainer_of(base, chats, tmp_path)
    batch = trainer.inputs(chats)
    text = trainer.processing_class.tokenizer.decode(batch["input_ids"][0])
    first = text.index("<IMG_GEN_1>")
    assert first < text.index("<|vision_start|>") < text.index("<IMG_GEN_2>") < text.rindex("<|vision_start|>")
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6], [1, 2, 4]]
    red, blue = batch["pixel_values"].split([36, 8])
    assert red.reshape(36, 3, -1)[:, 0].min() > 0.9 and blue.reshape(8, 3, -1)[:, 2].min() > 0.9


def test_order_visits_all_and_depends_on_the_seed_alone() -> None:
    sizes = [(number % 3, number) for number in range(50)]
    order = training_order(sizes, steps=25, batch=4, seed=1)
    assert sorted(order) == sorted(list(range(50)) * 2)
    assert order == training_order(sizes, 25, 4, 1) != training_order(sizes, 25, 4, 2)
    spread = [max(sizes[i][0] for i in b) - min(sizes[i][0] for i in b)
              for b in (order[i : i + 4] for i in range(0, 100, 4))]  # fmt: skip
    assert sum(spread) < 25  # unsorted batches of four nearly all span 2


# ----------------------------------------------------------------------------------------------------- training


def engine_with(**options) -> Callable[[torch.nn.Module], Engine]:
    return lambda model: Engine(model, **{"lr": 2e-3, "total_steps": 6} | options)


def train(base: Path, trajectories: list, run: Path, *, steps: int = 6, engine=None, prepare=None, **options) -> tuple:
    """Trains and returns the weights of the result and the rows of the log."""
    model, processor = load_vlm(base)
    if prepare is not None:
        prepare(model)
    own = {key: options.pop(key) for key in ("on_step", "validation", "validate_every") if key in options}
    config = sft_config(run, steps=steps, **{"batch": 4, "micro_batch": 4, "log_every": 1, "save_every": 2} | options)
    chats = [chat_of(t) for t in trajectories]
    folder = train_controller(model, processor, chats, run, config, engine or engine_with(), **own)
    return load_vlm(folder)[0].state_dict(), unmeasured(read_metrics(run))


def test_training_learns_and_leaves_a_folder_that_loads(base: Path, trajectories: list, tmp_path: Path) -> None:
    before, seen = load_vlm(base)[0].state_dict(), []
    after, rows = train(base, trajectories, tmp_path, steps=12, batch=8, log_every=4, on_step=seen.append)
    assert [row["step"] for row in rows] == [4, 8, 12] and seen == list(range(1, 13))
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "lr", "grad_norm"))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert rows[-1]["data_batch"] == 12 and rows[-1]["data_epoch"] == 12 * 8 / len(trajectories)
    measured = read_metrics(tmp_path)[-1]
    phases = [measured[f"seconds_{phase}"] for phase in ("forward_backward", "update", "total")]
    assert min(phases) > 0 and sum(phases[:2]) <= phases[2] and measured["memory_host_gib"] > 0
    assert "mfu" not in measured, "of a CPU"
    still = [name for name in before if torch.equal(after[name], before[name])]
    assert not still, f"full parameters, but these stood still: {still}"


class Killed(Exception):
    pass


@pytest.mark.parametrize("precision, optimizer", [("fp32", "adamw"), ("bf16", "adamw"), ("bf16_states", "adamw_bf16")])
def test_killed_and_resumed_equals_uninterrupted(
    base: Path, trajectories: list, tmp_path: Path, precision: str, optimizer: str
) -> None:
    def on_step(step: int) -> None:
        if step == 5:
            raise Killed

    engine = engine_with(precision=precision, optimizer=optimizer)
    whole, log = train(base, trajectories, tmp_path / "whole", engine=engine)
    with pytest.raises(Killed):
        train(base, trajectories, tmp_path / "killed", engine=engine, on_step=on_step)
    assert not (tmp_path / "killed/model").exists()
    saved = tmp_path / "killed/checkpoints"
    assert {path.name for path in saved.iterdir()} == {"latest", "step-2", "step-4"}
    assert {path.suffix for path in saved.rglob("step-*/*")} == {".safetensors", ".json"}  # no pickle
    again, log_again = train(base, trajectories, tmp_path / "killed", engine=engine)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert log == log_again and len(log) == 6


def test_micro_batches_do_not_change_the_step(base: Path, trajectories: list, tmp_path: Path) -> None:
    """Trajectories have different numbers of tokens: a mean of means would differ."""
    (whole, log), (parts, other) = (
        train(base, trajectories, tmp_path / f"{size}", steps=3, micro_batch=size) for size in (4, 1)
    )
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in other], rel=1e-5)
    assert [row["grad_norm"] for row in log] == pytest.approx([row["grad_norm"] for row in other], rel=1e-4)
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 2e-4


def gradients(model, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs, fused_lm_head=True)
    loss = -out.log_probs.sum() / out.label_mask.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_blank_image_makes_the_tower_run_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    chat = chat_of(tricky()[2])
    trainer = trainer_of(base, [chat], tmp_path)
    blank = trainer.inputs([chat])
    text = blank["input_ids"][0].tolist()
    end = len(text) - 1 - text[::-1].index(trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    plain = {name: blank[name][:, :end] for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids")}
    with_blank, without = (gradients(trainer.model, inputs) for inputs in (blank, plain))
    assert with_blank[0] == pytest.approx(without[0], rel=1e-6)
    tower = [name for name, _ in trainer.model.named_parameters() if ".visual." in name]
    assert tower and not any(name in without[1] for name in tower)
    for name, gradient in with_blank[1].items():
        if name in tower:
            assert not gradient.any(), name  # there, and exactly zero
        else:
            assert torch.allclose(gradient, without[1][name], atol=1e-6), name


def test_a_frozen_tower_stands_still(base: Path, trajectories: list, tmp_path: Path) -> None:
    before = load_vlm(base)[0].state_dict()
    after, _ = train(base, trajectories, tmp_path, steps=3, prepare=lambda m: m.model.visual.requires_grad_(False))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".visual." not in name}


def test_checkpointed_activations_give_the_same_gradients(base: Path, tmp_path: Path) -> None:
    chats = [chat_of(t) for t in tricky()]
    trainer = trainer_of(base, chats, tmp_path)
    model, inputs = trainer.model.train(), trainer.inputs(chats)
    blocks = [*model.model.visual.blocks, *model.model.language_model.layers]
    expected = gradients(model, inputs)
    for kind, chosen in (("selective", [0, 2]), ("full", [0, 1, 2, 3]), ("none", [])):
        set_checkpointing(model, kind)
        assert [i for i, block in enumerate(blocks) if block.gradient_checkpointing] == chosen
        loss, found = gradients(model, inputs)
        assert loss == expected[0] and all(torch.equal(g, found[name]) for name, g in expected[1].items())
    with pytest.raises(ValueError, match="checkpointing='half' is not one of none, selective, full"):
        set_checkpointing(model, "half")


def test_a_loss_that_is_not_finite_is_skipped(
    base: Path, trajectories: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ControllerTrainer.compute_loss, []

    def poisoned(self, *arguments, **named) -> Tensor:
        calls.append(None)
        return real(self, *arguments, **named) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(ControllerTrainer, "compute_loss", poisoned)
    weights, rows = train(base, trajectories, tmp_path, steps=4)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1] and math.isnan(rows[1]["loss"])
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_what_is_never_finite_ends_the_run_and_leaves_what_repeats_it(
    base: Path, trajectories: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = ControllerTrainer.compute_loss, []

    def poisoned(self, *arguments, **named) -> Tensor:
        steps.append(None)
        return real(self, *arguments, **named) * (math.nan if len(steps) > 4 else 1.0)  # two micro-batches a step

    engine = engine_with(dump=tmp_path / "nonfinite", max_skipped=1)
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="2 gradients in a row.*nonfinite"):
        patch.setattr(ControllerTrainer, "compute_loss", poisoned)
        train(base, trajectories, tmp_path, micro_batch=2, engine=engine)
    told = json.loads((tmp_path / "nonfinite/batches.json").read_text())
    assert [entry["batch"] for entry in told] == [2, 3]
    order = training_order([chat_size(chat_of(t)) for t in trajectories], 6, 4, 0)
    assert told[0]["ranks"][0]["trajectories"] == [trajectories[i].id for i in order[8:12]]
    assert told[0]["ranks"][0]["losses"] == ["nan", "nan"]
    (tmp_path / "again").mkdir()
    (tmp_path / "nonfinite").rename(tmp_path / "again/checkpoints")  # a run that goes on from it does those batches
    weights, rows = train(base, trajectories, tmp_path / "again", micro_batch=2)
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    whole, _ = train(base, trajectories, tmp_path / "whole", micro_batch=2)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.items())


def test_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch=6: must be a multiple of micro_batch=4 x 1"):
        sft_config(tmp_path, steps=1, batch=6, micro_batch=4)
