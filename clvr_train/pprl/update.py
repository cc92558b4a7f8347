"""The DiffusionNFT update of one epoch: policy gradients over rollouts x times (method/nft.py has the equations)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clvr_train.method.flow import inference_times, interpolate
from clvr_train.method.nft import kl_loss, nft_loss
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import OLD, use
from clvr_train.models.conditioning import Conditioner, by_bucket, predict_velocity, rows
from clvr_train.pprl.rollout import Group
from clvr_train.runtime.seeding import generator


@dataclass(frozen=True)
class Item:
    """One term of an epoch's loss: a rollout at one time, with the noise that makes its `x_t`. `anchored`: there the
    prediction without text is held to that of the reference.
    """

    sample: Sample
    x0: torch.Tensor
    r: float
    t: float
    noise: torch.Tensor
    anchored: bool = False


@dataclass(frozen=True)
class NFTOptions:
    """The named knobs of the loss; `beta_nft` (trust region) and `beta_kl` (weight of the SFT anchor) share no name.
    `anchor`: weight of the distance to the reference without text.
    """

    beta_nft: float
    beta_kl: float
    adv_clip_max: float
    weighting: str
    anchor: float = 0.0


def training_items(
    groups: Sequence[Group],
    *,
    steps: int,
    num_times: int,
    run_seed: int,
    epoch: int,
    time_range: tuple[float, float] = (0.0, 1.0),
    anchor_share: float = 0.0,
) -> list[Item]:
    """Every rollout that takes part, at `num_times` times of the rollout grid, in an order shuffled by (seed, epoch).

    The times of a rollout are stratified: the part `time_range` of the grid (0 is its first time, noise) is cut into
    `num_times` equal parts and one time is drawn from each. Rollouts without an advantage and flat groups (all
    advantages 0) give no items: nothing in them says where to go, and the trust region and the KL term act through the
    other groups.
    """
    first, last = (round(share * steps) for share in time_range)
    if not 0 <= first < last <= steps:
        raise ValueError(f"time_range={list(time_range)}: no part of the {steps} steps of a rollout")
    if not 1 <= num_times <= last - first:
        raise ValueError(f"num_times={num_times}: must lie between 1 and the {last - first} steps in time_range")
    items = []
    for place, group in enumerate(groups):
        grid = inference_times(group.x0.shape[1], steps)[:-1].tolist()
        if all(advantage is None or abs(advantage) < 1e-6 for advantage in group.advantages):
            continue
        for k, (x0, r) in enumerate(zip(group.x0, group.r, strict=True)):
            if r is None:
                continue
            source = generator("update", run_seed, epoch, place, *group.task.sample.key, k)
            for part in range(num_times):
                low, high = (first + n * (last - first) // num_times for n in (part, part + 1))
                index = low + int(torch.randint(high - low, (1,), generator=source))
                noise = torch.randn(x0.shape, generator=source)
                anchored = bool(torch.rand(1, generator=source) < anchor_share)
                items.append(Item(group.task.sample, x0, r, grid[index], noise, anchored))
    order = torch.randperm(len(items), generator=generator("items", run_seed, epoch))
    return [items[i] for i in order.tolist()]


def backward_nft(
    conditioner: Conditioner, items: Sequence[Item], options: NFTOptions, micro_batch: int
) -> dict[str, float]:
    """Adds the gradients of the mean NFT loss over the items; returns its parts and the distances between the policies.

    Per micro-batch: one forward of `old` and, if `beta_kl > 0`, one of the reference (adapters off), both without
    gradient, then one of the policy. No guidance in training predictions. Anchored items cost a forward of the
    policy and of the reference more, without text: guidance at evaluation extrapolates from that branch, which the
    rewards say nothing about.
    """
    transformer, device = conditioner.klein.transformer, conditioner.klein.device
    sums = {"loss_policy": 0.0, "kl": 0.0, "v_minus_v_old": 0.0, "anchor": 0.0}
    samples = [item.sample for item in items]
    for indices in by_bucket(conditioner, samples, micro_batch):
        chosen = [items[i] for i in indices]
        cond = conditioner.batch([item.sample for item in chosen])
        x0 = torch.stack([item.x0 for item in chosen]).to(device)
        t = torch.tensor([item.t for item in chosen], device=device)
        r = torch.tensor([item.r for item in chosen], device=device)
        x_t = interpolate(x0, torch.stack([item.noise for item in chosen]).to(device), t)
        with torch.no_grad(), use(transformer, OLD):
            v_old = predict_velocity(transformer, x_t, t, cond).float()
        v_ref = None
        if options.beta_kl > 0:
            with torch.no_grad(), use(transformer, None):
                v_ref = predict_velocity(transformer, x_t, t, cond).float()
        v = predict_velocity(transformer, x_t, t, cond).float()
        losses = nft_loss(
            v, v_old, x0, x_t, t, r,
            beta_nft=options.beta_nft, adv_clip_max=options.adv_clip_max, weighting=options.weighting,
        )  # fmt: skip
        loss = losses.sum() / len(items)
        sums["loss_policy"] += losses.detach().sum().item()
        sums["v_minus_v_old"] += (v.detach() - v_old).square().flatten(1).mean(1).sum().item()
        if v_ref is not None:
            kl = kl_loss(v, v_ref)
            sums["kl"] += kl.detach().sum().item()
            loss = loss + options.beta_kl * kl.sum() / len(items)
        held = [k for k, item in enumerate(chosen) if item.anchored and options.anchor > 0]
        if held:
            free = conditioner.without_text(rows(cond, held))
            with torch.no_grad(), use(transformer, None):
                v_ref = predict_velocity(transformer, x_t[held], t[held], free).float()
            anchor = kl_loss(predict_velocity(transformer, x_t[held], t[held], free).float(), v_ref)
            sums["anchor"] += anchor.detach().sum().item()
            loss = loss + options.anchor * anchor.sum() / len(items)
        loss.backward()
    metrics = {name: value / len(items) for name, value in sums.items()}
    loss = metrics["loss_policy"] + options.beta_kl * metrics["kl"] + options.anchor * metrics["anchor"]
    return metrics | {"loss": loss}
