"""The step in one process: schedule, clipping, accumulation, precisions, and that a non-finite gradient changes
nothing.
"""

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from clvr_train.runtime import optimizers, zero
from clvr_train.runtime.checkpoint import CheckpointError, Saver
from clvr_train.runtime.distributed import World
from clvr_train.runtime.engine import Engine, lr_factor
from clvr_train.runtime.optimizers import rounded


def net(seed=0, width=80):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))


def push(engine, value=2.0):
    """Sets every gradient."""
    for parameter in engine.module.parameters():
        parameter.grad = torch.full_like(parameter, value)


def train(engine, steps):
    """Steps on data that depend on the step."""
    values = []
    for _ in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(engine.batches)).to(engine.module[0].weight.dtype)
        for rows in engine.turns([x]):
            engine.backward((engine.module(rows).float() - rows[:, :1].float().sin()).square().mean())
        values.append(engine.step())
    return values


def test_schedules():
    cosine = {"schedule": "cosine", "warmup_steps": 2, "total_steps": 10}
    assert [lr_factor(s, **cosine) for s in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, pytest.approx(0.5), 0.0]
    assert lr_factor(99, schedule="constant", warmup_steps=0, total_steps=10) == 1.0
    with pytest.raises(ValueError, match="schedule='linear'"):
        lr_factor(0, schedule="linear", warmup_steps=0, total_steps=1)


def test_a_step_is_adamw_on_the_clipped_gradient():
    ours, theirs = net(), net()
    engine = Engine(ours, lr=0.1, total_steps=10, schedule="constant", clip=0.5)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        push(engine)
        for p in theirs.parameters():
            p.grad = torch.full_like(p, 2.0)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item()
        reference.step()
        assert engine.step()["grad_norm"] == pytest.approx(norm)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p) and ours_p.grad is None


def test_a_loss_in_parts_is_the_loss():
    """4 x 1 = 1 x 4: rounding only."""
    x, weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), []
    for parts in (1, 4):
        engine = Engine(net(), lr=1e-2, total_steps=10)
        for _ in range(5):
            for rows in engine.turns(x.chunk(parts)):
                engine.backward(engine.module(rows).square().sum() / 4)
            engine.step()
        weights.append(torch.cat([p.detach().flatten() for p in engine.module.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_non_finite_gradients_are_skipped_and_too_many_are_an_error():
    engine = Engine(net(), lr=0.1, total_steps=10, max_skipped=2)
    before = [p.detach().clone() for p in engine.module.parameters()]
    for number in (1, 2):
        push(engine, float("nan"))
        assert engine.step()["skipped"] == number
    after = list(engine.module.parameters())
    assert all(map(torch.equal, before, after)) and not any(engine._backend.moments(n) for n in engine._trained)
    assert (engine.steps, engine.batches) == (0, 2), "the schedule has not moved, the data have"
    push(engine, 1.0)
    engine.step()
    assert (engine.steps, engine.skipped_in_a_row) == (1, 0)
    for _ in range(2):
        push(engine, float("inf"))
        engine.step()
    push(engine, float("inf"))
    with pytest.raises(FloatingPointError, match="3 gradients in a row"):
        engine.step()


def test_a_loss_that_is_not_finite_spoils_the_step_even_if_its_gradient_is():
    engine = Engine(net(), lr=0.1, total_steps=10)
    engine.backward(engine.module(torch.ones(1, 4)).sum() * 0 + float("inf"))
    assert engine.step()["skipped"] == 1


def test_an_average_of_every_second_step():
    engine = Engine(net(), lr=0.1, total_steps=10, ema_decay=0.9, ema_every=2)
    expected = {name: tensor.clone() for name, tensor in engine.full_weights().items()}
    for step in range(1, 6):
        train(engine, 1)
        if step % 2 == 0:
            expected = {name: 0.81 * expected[name] + 0.19 * t for name, t in engine.full_weights().items()}
    found = engine.full_weights(average=True)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


EVERY = [(p, o) for p in ("fp32", "bf16", "bf16_states") for o in ("adamw", "adamw_bf16", "adamw8bit")]


@pytest.mark.parametrize(("precision", "optimizer"), EVERY)
def test_saved_and_resumed_goes_on_as_if_nothing_had_happened(tmp_path, precision, optimizer):
    """Bit for bit, 8-bit moments included, whose checkpoint is float32."""
    options = {"precision": precision, "optimizer": optimizer, "lr": 1e-2, "total_steps": 8, "weight_decay": 0.1}
    width = 1100  # one weight of 4400 elements: smaller ones have no 8-bit moments
    whole = Engine(net(width=width), **options)
    train(whole, 6)
    first = Engine(net(width=width), **options)
    with Saver(tmp_path) as saver:
        assert first.resume(saver) is None
        train(first, 3)
        first.save(saver, 3, {"more": torch.ones(2)})
    second = Engine(net(seed=9, width=width), **options)
    with Saver(tmp_path) as saver:
        step, extra = second.resume(saver)
    assert step == second.steps == 3 and extra["more"].tolist() == [1, 1]
    train(second, 3)
    expected, found = whole.full_weights(), second.full_weights()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert expected["0.weight"].dtype == (torch.bfloat16 if precision == "bf16_states" else torch.float32)


@pytest.mark.parametrize(("precision", "optimizer"), EVERY)
def test_the_first_save_finds_its_memory_made(tmp_path, precision, optimizer):
    engine = Engine(net(), precision=precision, optimizer=optimizer, lr=1e-2, total_steps=8, ema_decay=0.9)
    with Saver(tmp_path) as saver:
        engine.resume(saver)
        train(engine, 1)
        saver.wait()
        made = {name: copy.data_ptr() for name, copy in saver._copies.items()}
        engine.save(saver, 1)
        large = {name: copy.data_ptr() for name, copy in saver._copies.items() if copy.shape == (80, 4)}
        assert len(large) == 4 and all(made[name] == place for name, place in large.items())


@pytest.mark.parametrize(("precision", "optimizer"), EVERY[1:])
def test_every_precision_and_optimizer_learns_as_float32_does(precision, optimizer):
    """The last losses, within a tenth of how far they have come."""
    plain = [v["grad_norm"] for v in train(Engine(net(), lr=1e-2, total_steps=60, schedule="constant"), 60)]
    engine = Engine(net(), precision=precision, optimizer=optimizer, lr=1e-2, total_steps=60, schedule="constant")
    other = [v["grad_norm"] for v in train(engine, 60)]
    mean = [sum(norms[-10:]) / 10 for norms in (plain, other)]
    assert mean[0] < 0.5 * plain[0]
    assert abs(mean[1] - mean[0]) < 0.1 * plain[0]


@pytest.mark.parametrize("precision", ["bf16", "bf16_states"])
def test_frequencies_of_rotary_embeddings_stay_float32(precision):
    """In bfloat16 a position of 8,000 of Qwen3-VL would be turned by up to 7 radians too much or too little."""
    text = Qwen3Config(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=16, vocab_size=9)  # fmt: skip
    model = Qwen3Model(text)
    before = model.rotary_emb.inv_freq.clone()
    Engine(model, lr=0.1, total_steps=1, precision=precision)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.rotary_emb.inv_freq.dtype == torch.float32 and torch.equal(model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16_states"])
def test_moments_of_bfloat16_are_updated_in_parts(monkeypatch, precision):
    """A part of a model that a rank holds under ZeRO would take ten times its bytes at once."""

    def trained():
        engine = Engine(net(), lr=1e-2, total_steps=9, precision=precision, optimizer="adamw_bf16")
        train(engine, 3)
        return torch.cat([weight.flatten().float() for weight in engine.full_weights().values()])

    sizes, whole = [], trained()
    monkeypatch.setattr(optimizers, "CHUNK", 100)
    monkeypatch.setattr(
        optimizers, "rounded", lambda value, source: sizes.append(value.numel()) or rounded(value, source)
    )
    assert torch.allclose(trained(), whole, atol=1e-3 if precision == "fp32" else 0.02)
    assert max(sizes) == 100 and sum(sizes) == 3 * (80 * 4 + 80 + 80 + 1) * (2 if precision == "fp32" else 3)


def test_rounding_at_random_keeps_the_mean():
    """200,000 draws of a value a quarter of the way between two of bfloat16: six standard deviations are 0.006."""
    value = torch.full((200_000,), 1 + 0.25 / 128)
    drawn = rounded(value, torch.Generator().manual_seed(0)).float()
    assert set(drawn.tolist()) == {1.0, 1 + 1 / 128}
    assert (drawn > 1).float().mean().item() == pytest.approx(0.25, abs=0.006)


def test_what_does_not_exist_is_refused(tmp_path):
    frozen = torch.nn.Linear(1, 1).requires_grad_(False)
    for options, message in (
        ({"name": "zero9"}, "engine='zero9' is not one of single, ddp, zero1, zero2, zero3"),
        ({"offload": "weights"}, "engine.offload='weights' is not one of none, optimizer"),
        ({"offload": "optimizer"}, "engine.offload=optimizer, engine=single: only zero1, zero2, zero3 can"),
        ({"name": "zero2", "optimizer": "adamw8bit"}, "engine.optimizer=adamw8bit, engine=zero2"),
        ({"name": "zero2", "optimizer": "adamw_bf16", "offload": "optimizer"}, "adamw_bf16, engine.offload"),
        ({"precision": "fp8"}, "engine.precision='fp8' is not one of fp32"),
        ({"optimizer": "sgd"}, "engine.optimizer='sgd' is not one of adamw"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(net(), lr=0.1, total_steps=1, **options)
    with pytest.raises(ValueError, match="nothing to train"):
        Engine(frozen, lr=0.1, total_steps=1)
    with Saver(tmp_path) as saver:
        Engine(net(), lr=0.1, total_steps=1).save(saver, 0)
        saver.wait()
        with pytest.raises(CheckpointError, match="no weights of weight"):
            Engine(torch.nn.Linear(1, 1), lr=0.1, total_steps=1).resume(saver)


def test_a_lock_that_deepspeed_would_wait_for_is_named(tmp_path, monkeypatch, caplog):
    pytest.importorskip("deepspeed")
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    zero._import("zero1", World())
    assert f"{lock}: DeepSpeed waits" in caplog.text


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
@pytest.mark.parametrize("saved_after", [0, 2])
def test_going_back_forgets_what_the_optimizer_has_learnt_since(tmp_path, optimizer, saved_after):
    """As a roll-back does: the steps after it are those after the save, also if that was before the first step."""

    def step(engine, number):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        engine.backward(engine.module(inputs).square().sum())
        engine.step()

    torch.manual_seed(0)
    engine = Engine(torch.nn.Linear(3, 2), lr=0.1, total_steps=9, optimizer=optimizer)
    with Saver(tmp_path) as saver:
        for number in range(saved_after):
            step(engine, number)
        engine.save(saver, saved_after)
        saver.wait()
        found = []
        for _ in range(2):
            step(engine, 7)
            found.append({name: tensor.clone() for name, tensor in engine.full_weights().items()})
            step(engine, 8)
            engine.resume(saver)
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
