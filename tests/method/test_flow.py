"""Flow identities in float64, and the time grids against diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.method import flow


def batch(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x0, e = (torch.randn(4, 9, 8, generator=g, dtype=dtype) for _ in range(2))
    return x0, e, torch.rand(4, generator=g, dtype=dtype)


def test_velocity_leads_back_to_data_and_noise():
    x0, e, t = batch(0)
    x_t, v = flow.interpolate(x0, e, t), flow.velocity_target(x0, e)
    assert torch.allclose(flow.x0_from_velocity(x_t, v, t), x0, atol=1e-14)
    assert torch.allclose(x_t + (1 - t).view(-1, 1, 1) * v, e, atol=1e-14)
    assert torch.equal(flow.interpolate(x0, e, torch.zeros_like(t)), x0)
    assert torch.equal(flow.interpolate(x0, e, torch.ones_like(t)), e)


def test_loss_is_zero_at_the_target_and_one_value_a_sample():
    x0, e, _ = batch(1)
    assert flow.flow_matching_loss(e - x0, x0, e).abs().max() == 0
    assert torch.allclose(flow.flow_matching_loss(e - x0 + 2, x0, e), torch.full((4,), 4.0, dtype=torch.float64))


def test_shapes_that_would_broadcast_are_refused():
    x0, e, t = batch(2)
    with pytest.raises(ValueError, match="differ in shape"):
        flow.interpolate(x0, e[:1], t)
    with pytest.raises(ValueError, match="one time a sample"):
        flow.interpolate(x0, e, t[:1])


@given(st.floats(0, 1), st.floats(-2, 3))
def test_shift_keeps_the_ends_and_is_undone_by_its_inverse(t, mu):
    t = torch.tensor(t, dtype=torch.float64)
    assert abs(float(flow.shift_time(flow.shift_time(t, mu), -mu) - t)) < 1e-9
    assert float(flow.shift_time(torch.tensor(0.0), mu)) == 0
    assert float(flow.shift_time(torch.tensor(1.0), mu)) == 1


@pytest.mark.parametrize("tokens", [9, 1024, 4096, 4400])
@pytest.mark.parametrize("steps", [4, 8, 28, 50])
def test_inference_grid_equals_the_schedulers(tokens, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, shift=3.0,
        use_dynamic_shifting=True, time_shift_type="exponential",
    )  # fmt: skip
    mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    assert abs(flow.empirical_mu(tokens, steps) - mu) < 1e-12
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert torch.allclose(flow.inference_times(tokens, steps), scheduler.sigmas, atol=1e-6)


def test_linear_mu_of_flux_training():
    assert [round(flow.linear_mu(n), 2) for n in (256, 1024, 2304, 4096)] == [0.5, 0.63, 0.85, 1.15]


def test_guidance_and_unknown_shift():
    a, b = torch.tensor([3.0]), torch.tensor([1.0])
    assert flow.guided(a, b, 1.0) == a and flow.guided(a, b, 0.0) == b and flow.guided(a, b, 4.0) == 9
    with pytest.raises(ValueError, match="flux_linear, fixed, none"):
        flow.sample_times(2, 9, "cosine", torch.Generator())
