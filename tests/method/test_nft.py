"""Identities of the DiffusionNFT loss in float64: no tolerance beyond rounding."""

import pytest
import torch

from clvr_train.method.nft import advantage_to_r, blend_, kl_loss, nft_loss, old_decay

CLIP = 5.0


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    shape = (6, 9, 4)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    t = torch.rand(shape[0], generator=g, dtype=torch.float64) * 0.9 + 0.05
    x0, noise = draw(*shape), draw(*shape)
    x_t = (1 - t.view(-1, 1, 1)) * x0 + t.view(-1, 1, 1) * noise
    r = torch.rand(shape[0], generator=g, dtype=torch.float64)
    return {"v": draw(*shape), "v_old": draw(*shape), "x0": x0, "x_t": x_t, "t": t, "r": r, "target": noise - x0}


def loss_of(case, v, beta, weighting, r=None):
    r = case["r"] if r is None else r
    return nft_loss(
        v, case["v_old"], case["x0"], case["x_t"], case["t"], r,
        beta_nft=beta, adv_clip_max=CLIP, weighting=weighting,
    )  # fmt: skip


def mean(x):
    return x.flatten(1).mean(1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_v_space_form_is_constant_plus_advantage_plus_trust_region(case, beta):
    """c/b |u|^2 + 2 A <delta, u> + c b |delta|^2 with A = c (2 r - 1)."""
    delta, u = case["v"] - case["v_old"], case["v_old"] - case["target"]
    advantage = CLIP * (2 * case["r"] - 1)
    expected = CLIP / beta * mean(u**2) + 2 * advantage * mean(delta * u) + CLIP * beta * mean(delta**2)
    assert torch.allclose(loss_of(case, case["v"], beta, "none"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_optimum_is_the_scaled_negative_advantage(case, beta):
    """delta* = -A u / (c b) where the expectation is over one point."""
    u = case["v_old"] - case["target"]
    advantage = (CLIP * (2 * case["r"] - 1)).view(-1, 1, 1)
    v = (case["v_old"] - advantage * u / (CLIP * beta)).requires_grad_(True)
    loss_of(case, v, beta, "none").sum().backward()
    assert v.grad.abs().max() < 1e-11


def test_adaptive_weight_is_t_over_the_mean_error(case):
    """(x0+- - x0)^2 / w = t (v+- - target)^2 / mean |v+- - target|."""
    beta, t = 0.5, case["t"]
    plus = beta * case["v"] + (1 - beta) * case["v_old"] - case["target"]
    minus = (1 + beta) * case["v_old"] - beta * case["v"] - case["target"]
    branch = [t * mean(e**2) / mean(e.abs()) for e in (plus, minus)]
    expected = CLIP / beta * (case["r"] * branch[0] + (1 - case["r"]) * branch[1])
    assert torch.allclose(loss_of(case, case["v"], beta, "adaptive"), expected, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weighting", ["adaptive", "none"])
def test_gradient_on_policy_is_the_signed_flow_matching_gradient_for_any_beta(case, beta, weighting):
    """At v = v_old: dL/dv = 2 A u / D (none) and 2 A t u / (mean|u| D) (adaptive); 0 at r = 1/2, opposite at r = 0
    and 1.
    """
    u = case["v_old"] - case["target"]
    numel = u[0].numel()
    gradients = {}
    for name, r in (("own", case["r"]), ("half", 0.5), ("one", 1.0), ("zero", 0.0)):
        v = case["v_old"].clone().requires_grad_(True)
        r = r if isinstance(r, torch.Tensor) else torch.full_like(case["r"], r)
        loss_of(case, v, beta, weighting, r).sum().backward()
        gradients[name] = v.grad
    advantage = (CLIP * (2 * case["r"] - 1)).view(-1, 1, 1)
    expected = 2 * advantage * u / numel
    if weighting == "adaptive":
        expected = expected * (case["t"] / mean(u.abs())).view(-1, 1, 1)
    assert torch.allclose(gradients["own"], expected, rtol=1e-9, atol=1e-12)
    assert gradients["half"].abs().max() < 1e-12
    assert torch.allclose(gradients["one"], -gradients["zero"], rtol=1e-9)


def test_gradient_reaches_the_policy_alone(case):
    v, v_old = case["v"].clone().requires_grad_(True), case["v_old"].clone().requires_grad_(True)
    nft_loss(v, v_old, case["x0"], case["x_t"], case["t"], case["r"], beta_nft=0.5).sum().backward()
    assert v.grad is not None and v_old.grad is None
    kl_loss(v, v_old).sum().backward()
    assert v_old.grad is None


def test_advantages_map_to_r():
    a = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 7.0])
    assert advantage_to_r(a, 5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_old_decay_schedules_of_the_official_code():
    assert [old_decay(s, "on_policy") for s in (0, 500)] == [0.0, 0.0]
    assert [old_decay(s, "ramp") for s in (0, 100, 500, 900)] == [0.0, 0.1, 0.5, 0.5]
    assert [old_decay(s, "late") for s in (0, 75, 175, 400)] == [0.0, 0.0, 0.75, 0.999]
    with pytest.raises(ValueError, match="old_schedule='fast'"):
        old_decay(0, "fast")


def test_blend_is_a_slow_average_and_a_copy_at_zero():
    old, policy = [torch.zeros(3)], [torch.ones(3)]
    blend_(old, policy, 0.75)
    assert old[0].tolist() == [0.25] * 3
    blend_(old, policy, 0.0)
    assert old[0].tolist() == [1.0] * 3


@pytest.mark.parametrize(("changes", "message"), [({"beta_nft": 0.0}, "beta_nft"), ({"weighting": "x"}, "weighting")])
def test_bad_options_are_refused(case, changes, message):
    options = {"beta_nft": 0.5, "weighting": "none"} | changes
    with pytest.raises(ValueError, match=message):
        nft_loss(case["v"], case["v_old"], case["x0"], case["x_t"], case["t"], case["r"], **options)
    with pytest.raises(ValueError, match="r must lie"):
        nft_loss(case["v"], case["v_old"], case["x0"], case["x_t"], case["t"], case["r"] + 1, beta_nft=0.5)
