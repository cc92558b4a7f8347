"""The plan of `train_pprl`: of an epoch the network evaluations, FLOPs and seconds, and bytes on every GPU."""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from omegaconf import DictConfig

from clvr_train.data.images import reference_size
from clvr_train.data.mixing import STEP_CLASSES, Shares, step_weights
from clvr_train.method.flow import num_velocities
from clvr_train.models.adapters import ADAPTERS, POLICY, parameters
from clvr_train.models.plan import (
    CHOICES,
    GPUS,
    Settings,
    cheapest_fit,
    model_bytes,
    network_evaluations,
    state_bytes,
)
from clvr_train.models.trace import count_parameters, encoder_flops, klein_shapes
from clvr_train.models.trace_policy import (
    Forward,
    Update,
    add_policies_to_shapes,
    decoding_of,
    forward_of,
    trace_update,
)
from clvr_train.runtime.distributed import World
from recipes._plan import NODE, key_of, model_name

KINDS = ("rollout", "old", "reference", "policy")


class Epoch:
    """The first epoch of a training: which groups every GPU draws, all of which take part in the update.

    `references`: images of history of every group; None for the mix of `pprl.t2i_share`, of which a group has up to
    four.
    """

    def __init__(self, training: DictConfig, gpus: int, references: int | None) -> None:
        self.rollout, self.pprl, self.references = training.rollout, training.pprl, references
        shares = Shares(step_weights(range(STEP_CLASSES + 1), training.pprl.t2i_share))
        kinds = [shares.at(place)[0] for place in range(self.rollout.groups)]
        self.kinds = kinds if references is None else [references] * len(kinds)
        self.by_gpu = [Counter(World(rank, gpus).share(self.kinds)) for rank in range(gpus)]
        self.rollouts = self.rollout.groups * self.rollout.group_size
        self.drawn = self.rollouts if training.replay is None else 0  # the others come from a ledger
        self.items = self.rollouts * self.pprl.num_times
        self.anchored = round(self.items * self.pprl.anchor_share) if self.pprl.anchor > 0 else 0
        self.branches = 2 if self.pprl.cfg > 1 else 1  # of guidance in training
        self.velocities = num_velocities(self.rollout.steps, self.rollout.solver)

    @property
    def most_references(self) -> int:
        """Of a group in any epoch."""
        if self.references is not None:
            return self.references
        return STEP_CLASSES if self.pprl.t2i_share < 1 else 0

    @property
    def busiest(self) -> float:
        """What the GPU with the most groups does, over what it would if they could be split evenly."""
        return max(map(Counter.total, self.by_gpu)) * len(self.by_gpu) / self.rollout.groups

    def evaluations(self) -> dict[str, int]:
        """See `models.plan.network_evaluations`."""
        options = {"steps": self.velocities, "cfg": self.rollout.cfg, "beta_kl": self.pprl.beta_kl}
        options |= {"training_cfg": self.pprl.cfg, "anchored": self.anchored}
        return network_evaluations(self.drawn, self.items, **options)

    def probe(self, tasks: int) -> dict[str, int]:
        """Evaluations of the sentinel's probe (`pprl.signals.Probe`), which are not in those of the epoch: at the start
        of a training, and at every look.
        """
        each = self.velocities * (2 if self.rollout.cfg > 1 else 1)
        return {"start": tasks * (each + 1), "look": tasks * (each + 2)}

    def forwards(self) -> dict[str, int]:
        """Calls of the transformer by all GPUs, groups of one length of history sharing them."""
        rollout, pprl = self.rollout, self.pprl
        calls = self.velocities * (2 if rollout.cfg > 1 and not rollout.batched_cfg else 1)
        drawn = sum(self._calls(kinds, rollout.group_size, rollout.batch) for kinds in self.by_gpu)
        parts = pprl.steps_per_epoch
        update = [parts * self._calls(k, rollout.group_size * pprl.num_times / parts, pprl.micro_batch)
                  for k in self.by_gpu]  # fmt: skip
        turns, held = sum(update), sum(update) if self.anchored else 0
        blanks = len(update) * max(update) - turns  # a GPU that is through draws them until all are
        return {
            "rollout": drawn * calls if self.drawn else 0,
            "old": turns * self.branches,
            "reference": (turns * self.branches if pprl.beta_kl > 0 else 0) + held,
            "policy": turns * self.branches + held + blanks,
        }

    @staticmethod
    def _calls(kinds: Counter, each: float, most: int) -> int:
        return sum(math.ceil(number * each / most) for number in kinds.values())


@dataclass
class Parts:
    """The models without weights, and what their forwards take by number of references."""

    models: dict[str, torch.nn.Module]
    window: int
    target: tuple[int, int]
    reference: tuple[int, int]

    def update(
        self, references: int, batch: int, dtype: torch.dtype, lora_dtype: torch.dtype, branches: int = 1
    ) -> Update:
        return trace_update(*self._sizes(references, batch, dtype, lora_dtype), branches)

    def forward(self, references: int, batch: int, dtype: torch.dtype, lora_dtype: torch.dtype) -> Forward:
        return forward_of(*self._sizes(references, batch, dtype, lora_dtype))

    def decoding(self, batch: int, dtype: torch.dtype) -> Forward:
        return decoding_of(self.models["vae"], dtype, batch, self.target)

    def _sizes(self, references: int, batch: int, dtype: torch.dtype, lora_dtype: torch.dtype) -> tuple:
        transformer = self.models["transformer"]
        return transformer, dtype, lora_dtype, batch, self.window, self.target, [self.reference] * references


def settings_of(cfg: DictConfig, training: DictConfig, epoch_items: int) -> Settings:
    """The plan's settings: those of the training, on `gpus` GPUs, or on one or a node as its engine has it.

    Raises:
        ValueError: as `train_pprl`, of an engine that it does not have.
    """
    engine = training.engine
    gpus = cfg.gpus or (1 if engine.name == "single" else NODE)
    chosen = {key: engine["name" if key == "engine" else key] for key in CHOICES}
    micro_batch = min(training.pprl.micro_batch, max(1, epoch_items // gpus))
    return Settings(gpus=gpus, micro_batch=micro_batch, **chosen)


def has_engine(settings: Settings) -> bool:
    """Whether train_pprl has it: whole frozen weights on every GPU, policies in float32."""
    return settings.stage < 3 and settings.offload == "none" and settings.precision != "bf16_states"


def plan_pprl(cfg: DictConfig, training: DictConfig) -> dict:
    """All that is printed. A step is an epoch: rollouts of all groups, and the update from them; numbers of it are over
    all GPUs, bytes of one.
    """
    gpu, rollout = GPUS[cfg.gpu], training.rollout
    settings = settings_of(cfg, training, rollout.groups * rollout.group_size * training.pprl.num_times)
    if not has_engine(settings):
        raise ValueError(f"engine={settings.engine}, precision={settings.precision}, offload={settings.offload}: "
                         "train_pprl has single, ddp, zero1 and zero2, fp32 and bf16")  # fmt: skip
    epoch = Epoch(training, settings.gpus, cfg.references)
    parts, weights = _build(cfg, training, settings)
    transformer = parts.models["transformer"]
    policy = list(parameters(transformer, POLICY))
    limit = gpu.memory_bytes - int(cfg.reserve_gb * 1e9)
    largest = epoch.most_references
    branches = epoch.branches + (epoch.anchored > 0)

    @functools.cache
    def kept(micro_batch: int, dtype: torch.dtype, lora_dtype: torch.dtype) -> Update:
        return parts.update(largest, micro_batch, dtype, lora_dtype, branches)

    @functools.cache
    def drawing(dtype: torch.dtype, lora_dtype: torch.dtype) -> dict[str, int]:
        batch = min(rollout.batch, max(map(Counter.total, epoch.by_gpu)) * rollout.group_size)
        doubled = 2 * batch if rollout.batched_cfg and rollout.cfg > 1 else batch
        forward = parts.forward(largest, doubled, dtype, lora_dtype).peak_bytes
        return {"rollout": forward, "decoding": parts.decoding(batch, dtype).peak_bytes}

    def held(chosen: Settings) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of one GPU by kind, and those of activations in each phase, of which one is under way at a time."""
        trained = chosen if chosen.stage else replace(chosen, precision="fp32")  # without DeepSpeed: float32 policy
        states = state_bytes(policy, sum(weights.values()), trained)
        states.pop("host")
        lora_dtype = trained.dtype
        update = kept(chosen.micro_batch, chosen.dtype, lora_dtype).trace.activations(chosen.checkpointing)
        phases = {"update": sum(update)} | drawing(chosen.dtype, lora_dtype)
        states["activations"] = max(phases.values())
        return states | {"total": sum(states.values())}, phases

    bytes_held, phases = held(settings)
    flops, recomputed = _flops(epoch, parts, settings)
    extra = _encoding_flops(cfg, epoch, parts, settings.dtype)
    forwards, total = epoch.forwards(), sum(flops.values())
    peak = (gpu.fp32 if settings.precision == "fp32" else gpu.bf16) * settings.gpus * cfg.mfu
    change = cheapest_fit(settings, lambda chosen: has_engine(chosen) and held(chosen)[0]["total"] <= limit)
    number = sum(p.numel() for p in policy)
    calls = {"text_encoder": rollout.groups, "vae": sum(epoch.kinds)}
    shown = {key: rollout[key] for key in ("groups", "group_size", "steps", "solver", "cfg", "batch", "batched_cfg")}
    shown |= {key: training.pprl[key] for key in ("num_times", "beta_kl", "anchor", "steps_per_epoch")}
    return {
        "recipe": "train_pprl",
        "settings": asdict(settings) | shown | {"training_cfg": training.pprl.cfg, "gpu": cfg.gpu, "mfu": cfg.mfu},
        "parameters": count_parameters(transformer) - len(ADAPTERS) * number,
        "trained_parameters": number,
        "frozen_parameters": sum(map(count_parameters, parts.models.values())) - number,
        "bytes_per_gpu": bytes_held,
        "weights_per_gpu": weights | {"policy": bytes_held["weights"] - sum(weights.values())},
        "activations_per_gpu": phases,
        "host_bytes_per_gpu": 0,
        "gpu_bytes": gpu.memory_bytes,
        "reserve_bytes": int(cfg.reserve_gb * 1e9),
        "flops_per_step": total,
        "flops": flops,
        "recomputed_flops_per_step": recomputed,
        "encoder_flops_per_step": extra,
        "forwards_per_step": sum(forwards.values()),
        "forwards": forwards,
        "evaluations_per_step": epoch.evaluations(),
        "probe_evaluations": epoch.probe(training.sentinel.probe),
        "images_per_step": epoch.rollouts,
        "items_per_step": epoch.items,
        "anchored_per_step": epoch.anchored,
        "encodings_per_step": {"cached": dict.fromkeys(calls, 0), "uncached": calls},
        "seconds_per_step": (total + recomputed + extra) / peak * epoch.busiest,
        "fits": bytes_held["total"] <= limit,
        "change": change and {key_of(setting, "pprl"): value for setting, value in change.items()},
    }


def _build(cfg: DictConfig, training: DictConfig, settings: Settings) -> tuple[Parts, dict[str, int]]:
    """The models with their LoRA, and the bytes of all that is frozen on every GPU."""
    model = training.model
    models = klein_shapes(model_name(model), model.layers, model.window)
    names = {"transformer": "base", "text_encoder": "text_encoder", "vae": "vae"}
    weights = {names[part]: model_bytes(module, settings.dtype) for part, module in models.items()}
    transformer = models["transformer"]
    add_policies_to_shapes(transformer, rank=training.lora.rank, alpha=training.lora.alpha)
    for adapter in ADAPTERS:
        if adapter != POLICY:
            weights[adapter] = sum(4 * p.numel() for p in parameters(transformer, adapter))
    token_px = 2 ** len(models["vae"].config.block_out_channels)
    target_px = tuple(model.size_px)
    if any(side % token_px for side in target_px):
        raise ValueError(f"model.size_px={list(target_px)}: both sides must be multiples of {token_px}")
    reference_px = reference_size(tuple(cfg.reference_px or target_px), token_px)
    target, reference = (tuple(side // token_px for side in px) for px in (target_px, reference_px))
    return Parts(models, model.window, target, reference), weights


def _flops(epoch: Epoch, parts: Parts, settings: Settings) -> tuple[dict[str, int], int]:
    """FLOPs of an epoch by what runs, and those of recomputed blocks. Anchored items are taken to be spread evenly."""
    flops, recomputed = dict.fromkeys(KINDS, 0), 0
    evaluations, each = epoch.evaluations(), {}
    for kind, number in sorted(Counter(epoch.kinds).items()):
        if all(k in each for k in range(kind - 3, kind)):  # all references have one size: a polynomial of degree 2
            each[kind] = [3 * c - 3 * b + a for a, b, c in zip(*(each[kind - n] for n in (3, 2, 1)), strict=True)]
        else:
            one = parts.update(kind, 1, torch.float32, torch.float32)  # dtypes play no part in FLOPs
            forward = one.trace.flops
            again = one.trace.recomputed_flops(settings.checkpointing)
            each[kind] = [forward, forward, one.reference, forward + one.backward, again]
        share = number / len(epoch.kinds)
        for what, cost in zip(KINDS, each[kind], strict=False):
            flops[what] += round(evaluations[what] * share * cost)
        recomputed += round(evaluations["policy"] * share * each[kind][-1])
    return flops, recomputed


def _encoding_flops(cfg: DictConfig, epoch: Epoch, parts: Parts, dtype: torch.dtype) -> int:
    """FLOPs of pictures of all rollouts, and, unless they are cached, of a text and its references for every group."""
    found = epoch.rollouts * parts.decoding(1, dtype).flops
    if not cfg.cached:
        token_px = 2 ** len(parts.models["vae"].config.block_out_channels)
        reference_px = tuple(side * token_px for side in parts.reference)
        text, image = encoder_flops(parts.models, parts.window, [reference_px])
        found += len(epoch.kinds) * text + sum(epoch.kinds) * image
    return found


def rows(plan: dict) -> Iterable[tuple[str, str]]:
    """Lines of a table that other trainings do not have."""
    evaluations = plan["evaluations_per_step"]
    shown = ", ".join(f"{evaluations[kind]:,} {kind}" for kind in KINDS)
    gigabytes = {kind: f"{number / 1e9:.3f} GB" for kind, number in plan["weights_per_gpu"].items()}
    yield "weights of", ", ".join(f"{kind} {text}" for kind, text in gigabytes.items())
    yield "phases", ", ".join(f"{phase} {n / 1e9:.3f} GB" for phase, n in plan["activations_per_gpu"].items())
    yield "evaluations", f"{evaluations['total']:,} per step, an epoch of {plan['images_per_step']:,} images: {shown}"
