"""The DiffusionNFT update of one epoch: policy gradients over rollouts x times (method/nft.py has the equations)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Module

from clvr_train.method.flow import guided, interpolate
from clvr_train.method.nft import kl_loss, nft_loss
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import OLD, use
from clvr_train.models.conditioning import Conditioner, by_bucket, predict_velocity, rows
from clvr_train.pprl.rollout import Group
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.seeding import generator

TERMS = ("loss_policy", "kl", "v_minus_v_old", "anchor")


@dataclass(frozen=True)
class Item:
    """One term of an epoch's loss: a rollout at one time, and the position that seeds the noise that makes its `x_t`.
    `x0` (N, C) is there on the rank that has drawn it. `anchored`: there the prediction without text is held to that of
    the reference.
    """

    sample: Sample
    x0: Tensor | None
    r: float
    t: float
    seed: tuple
    anchored: bool = False

    @property
    def noise(self) -> Tensor:
        return torch.randn(self.x0.shape, generator=generator("update noise", *self.seed))


@dataclass(frozen=True)
class NFTOptions:
    """The named knobs of the loss; `beta_nft` (trust region) and `beta_kl` (weight of the SFT anchor) share no name.
    `anchor`: weight of the distance to the reference without text. `cfg`: guidance of all predictions, 1 for none.
    """

    beta_nft: float
    beta_kl: float
    adv_clip_max: float
    weighting: str
    anchor: float = 0.0
    cfg: float = 1.0


def training_items(
    groups: Sequence[Group],
    times: Sequence[float],
    *,
    num_times: int,
    run_seed: int,
    epoch: int,
    time_range: tuple[float, float] = (0.0, 1.0),
    stratified: bool = True,
    anchor_share: float = 0.0,
) -> list[Item]:
    """Every rollout that takes part, at `num_times` of the `times` it was drawn in (`method.flow.inference_times`
    without the last), in an order shuffled by (seed, epoch).

    They lie in the part `time_range` of those times (0 is the first one, noise). `stratified` cuts it into `num_times`
    equal parts and draws one time from each; otherwise any of them are drawn, none twice. Rollouts without an advantage
    and those whose advantage is 0, say in a flat group, give no items: nothing in them says where to go, and the trust
    region and the KL term act through the others.
    """
    steps = len(times)
    first, last = (round(share * steps) for share in time_range)
    if not 0 <= first < last <= steps:
        raise ValueError(f"time_range={list(time_range)}: no part of the {steps} steps of a rollout")
    if not 1 <= num_times <= last - first:
        raise ValueError(f"num_times={num_times}: must lie between 1 and the {last - first} steps in time_range")
    items = []
    for group in groups:
        for k, (advantage, r) in enumerate(zip(group.advantages, group.r, strict=True)):
            if advantage is None or abs(advantage) < 1e-6:
                continue
            position = (run_seed, epoch, group.place, *group.task.sample.key, k)
            chosen = _chosen_times(position, first, last, num_times, stratified)
            x0 = None if group.x0 is None else group.x0[k]
            for part, index in enumerate(chosen):
                seed = (*position, part)
                draw = torch.rand(1, generator=generator("update anchor", *seed))
                items.append(Item(group.task.sample, x0, r, times[index], seed, bool(draw < anchor_share)))
    order = torch.randperm(len(items), generator=generator("items", run_seed, epoch))
    return [items[i] for i in order.tolist()]


def _chosen_times(position: tuple, first: int, last: int, num_times: int, stratified: bool) -> list[int]:
    """Indices from `first` to below `last`."""
    source = generator("update times", *position)
    if not stratified:
        return (first + torch.randperm(last - first, generator=source)[:num_times]).tolist()
    edges = [first + part * (last - first) // num_times for part in range(num_times + 1)]
    return [low + int(torch.randint(high - low, (1,), generator=source)) for low, high in pairwise(edges)]


def backward_nft(
    conditioner: Conditioner, items: Sequence[Item], options: NFTOptions, micro_batch: int, engine: Engine | None = None
) -> dict[str, float]:
    """Adds the gradients of the mean NFT loss over the items; returns its parts and the distances between the policies.

    Per micro-batch: one forward of `old` and, if `beta_kl > 0`, one of the reference (adapters off), both without
    gradient, then one of the policy; twice as many with guidance (`options.cfg` above 1). Anchored items cost a forward
    of the policy and of the reference more, without text: guidance at evaluation extrapolates from that branch, which
    the rewards say nothing about.

    Args:
        items: of all ranks, the same ones on each; a rank goes through those whose tokens it has. One with fewer
            micro-batches than another draws blanks, which weigh nothing.
        engine: what adds up the gradients; None: the transformer's own, in one process.
    """
    engine = engine or Engine(conditioner.klein.transformer, lr=0.0, total_steps=1)
    own = [item for item in items if item.x0 is not None]
    sums = torch.zeros(len(TERMS), device=conditioner.klein.device)
    for indices in engine.turns(by_bucket(conditioner, [item.sample for item in own], micro_batch)):
        if indices:
            loss, terms = _losses(conditioner, engine, [own[i] for i in indices], options)
            sums += terms
            engine.backward(loss / len(items))
        else:
            engine.backward(0 * _blank(conditioner, engine))
    told = engine.world.gather(sums.tolist())
    metrics = {name: sum(rank[i] for rank in told) / len(items) for i, name in enumerate(TERMS)}
    loss = metrics["loss_policy"] + options.beta_kl * metrics["kl"] + options.anchor * metrics["anchor"]
    return metrics | {"loss": loss}


def _losses(
    conditioner: Conditioner, engine: Engine, items: Sequence[Item], options: NFTOptions
) -> tuple[Tensor, Tensor]:
    """The loss of items of one bucket, summed over them, and the sums of its terms."""
    transformer, device = conditioner.klein.transformer, conditioner.klein.device
    cond = conditioner.batch([item.sample for item in items])
    x0 = torch.stack([item.x0 for item in items]).to(device)
    t = torch.tensor([item.t for item in items], device=device)
    r = torch.tensor([item.r for item in items], device=device)
    x_t = interpolate(x0, torch.stack([item.noise for item in items]).to(device), t)
    held = [k for k, item in enumerate(items) if item.anchored and options.anchor > 0]
    without = conditioner.without_text(cond) if options.cfg > 1 else None

    def velocity(module: Module) -> Tensor:
        v = predict_velocity(module, x_t, t, cond).float()
        # Not through the engine's module: that expects one forward a turn on every rank.
        return v if without is None else guided(v, predict_velocity(transformer, x_t, t, without).float(), options.cfg)

    v_ref = v_free = free = None
    with torch.no_grad():
        with use(transformer, OLD):
            v_old = velocity(transformer)
        with use(transformer, None):
            if options.beta_kl > 0:
                v_ref = velocity(transformer)
            if held:
                free = conditioner.without_text(rows(cond, held))
                v_free = predict_velocity(transformer, x_t[held], t[held], free).float()
    v = velocity(engine.module)
    policy = nft_loss(
        v, v_old, x0, x_t, t, r,
        beta_nft=options.beta_nft, adv_clip_max=options.adv_clip_max, weighting=options.weighting,
    ).sum()  # fmt: skip
    none = torch.zeros((), device=device)
    kl = none if v_ref is None else kl_loss(v, v_ref).sum()
    anchor = kl_loss(predict_velocity(transformer, x_t[held], t[held], free).float(), v_free).sum() if held else none
    moved = (v.detach() - v_old).square().flatten(1).mean(1).sum()
    loss = policy + options.beta_kl * kl + options.anchor * anchor
    return loss, torch.stack([policy.detach(), kl.detach(), moved, anchor.detach()])


def _blank(conditioner: Conditioner, engine: Engine) -> Tensor:
    """A forward of the policy that keeps this rank in step with the others."""
    klein = conditioner.klein
    height, width = klein.grid(conditioner.size_px)
    cond = conditioner.batch([Sample("blank", 1, "", ())])
    x_t = torch.zeros(1, height * width, klein.transformer.config.in_channels, device=klein.device)
    return predict_velocity(engine.module, x_t, torch.ones(1, device=klein.device), cond).sum()
