"""The SFT loss against its definition, and what the student of a distillation regresses."""

import pytest
import torch
from PIL import Image

from clvr_train.method.flow import flow_matching_loss, guided, interpolate, sample_times
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner, predict_velocity
from clvr_train.runtime.seeding import generator
from clvr_train.sft.distill import backward_distillation, guided_velocity_over
from clvr_train.sft.dit import backward_flow_matching

RED, BLUE = Image.new("RGB", (96, 96), "red"), Image.new("RGB", (96, 96), "blue")
SAMPLES = [
    Sample("a", 1, "a red circle", ("draw",), (), RED),
    Sample("b", 2, "a blue square", ("draw", "edit"), (RED,), BLUE),
    Sample("c", 1, "two circles", ("draw",), (), BLUE),
]
SEEDS = [(0, 0, *sample.key) for sample in SAMPLES]


@pytest.fixture
def conditioner(tiny_klein):
    conditioner = Conditioner(tiny_klein(), (96, 96))
    conditioner.klein.transformer.requires_grad_(True)
    return conditioner


def gradients(transformer):
    result = [p.grad.clone() for p in transformer.parameters()]
    transformer.zero_grad()
    return result


def test_loss_is_the_mean_over_samples_of_the_definition(conditioner):
    transformer = conditioner.klein.transformer
    out = backward_flow_matching(conditioner, SAMPLES, SEEDS, text_dropout=0.0)
    expected = 0.0
    for sample, seed in zip(SAMPLES, SEEDS, strict=True):
        source = generator("sft", *seed)
        t = sample_times(1, 9, "flux_linear", source)
        e = torch.randn(9, 32, generator=source)[None]
        x0 = conditioner.target(sample)[None]
        with torch.no_grad():
            v = predict_velocity(transformer, interpolate(x0, e, t), t, conditioner.batch([sample]))
        expected += flow_matching_loss(v, x0, e).item() / 3
    assert out.loss == pytest.approx(expected, rel=1e-5)
    assert out.metrics.keys() == {"loss_0_references", "loss_1_references", "short_share"}
    assert out.metrics["short_share"] == 1.0, "micro-batches of 2 and 1, where 32 would fit"


def test_gradients_do_not_depend_on_the_order_or_the_micro_batch(conditioner):
    """4 x 1 = 1 x 4, and a sample's noise is its own: rounding only, measured 3e-8."""
    transformer = conditioner.klein.transformer
    backward_flow_matching(conditioner, SAMPLES, SEEDS, micro_batch=1)
    one = gradients(transformer)
    backward_flow_matching(conditioner, SAMPLES[::-1], SEEDS[::-1], micro_batch=8)
    for a, b in zip(one, gradients(transformer), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_text_dropout_is_a_share_and_keeps_references(conditioner):
    backward_flow_matching(conditioner, SAMPLES, SEEDS, text_dropout=1.0)
    dropped = gradients(conditioner.klein.transformer)
    calls = conditioner.text_calls
    empty = [Sample(s.trajectory_id, s.step, "", (), s.references, s.target) for s in SAMPLES]
    for s in empty:
        conditioner._fitted.put((*s.key, "", ()), "", 0)
    backward_flow_matching(conditioner, empty, SEEDS, text_dropout=0.0)
    assert calls == conditioner.text_calls == 1
    for a, b in zip(dropped, gradients(conditioner.klein.transformer), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_one_substep_is_the_guided_velocity_and_many_follow_the_euler_path(conditioner):
    teacher = conditioner.klein.transformer
    cond = conditioner.batch(SAMPLES[:1])
    without = conditioner.without_text(cond)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    start, end = torch.tensor([0.9]), torch.tensor([0.5])

    def velocity(x, t):
        return guided(predict_velocity(teacher, x, t, cond), predict_velocity(teacher, x, t, without), 3.0)

    one = guided_velocity_over(teacher, x, start, end, cond, without, cfg=3.0, substeps=1)
    assert torch.allclose(one, velocity(x, start), atol=1e-5)
    middle = x - 0.2 * velocity(x, start)
    last = middle - 0.2 * velocity(middle, torch.tensor([0.7]))
    two = guided_velocity_over(teacher, x, start, end, cond, without, cfg=3.0, substeps=2)
    assert torch.allclose(two, (x - last) / 0.4, atol=1e-5)


def test_a_student_equal_to_an_unguided_teacher_has_no_loss(conditioner):
    options = {"steps": 2, "substeps": 1, "micro_batch": 8}
    student = conditioner.klein.transformer
    assert backward_distillation(conditioner, student, SAMPLES, SEEDS, cfg=1.0, **options) < 1e-10
    assert backward_distillation(conditioner, student, SAMPLES, SEEDS, cfg=4.0, **options) > 1e-6
