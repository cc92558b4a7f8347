"""What the `pprl` part of the benchmark measures: rollouts and updates of train_pprl, in turn with diffusers' pipeline
and with guidance in one forward, and against the plan.

Weights and images are random; a model that runs is of its real size.
"""

from collections import Counter
from collections.abc import Callable
from statistics import median

import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from clvr_train.data.images import open_image
from clvr_train.method.flow import inference_times
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import ADAPTERS, OLD, POLICY, adapter_weights, add_policies, use
from clvr_train.models.blocks import set_checkpointing
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.klein import pipeline_of
from clvr_train.models.plan import GPUS
from clvr_train.models.sampler import Sampler
from clvr_train.models.tiny import klein_scheduler
from clvr_train.pprl.update import Item, NFTOptions, backward_nft
from clvr_train.runtime.distributed import World
from clvr_train.runtime.engine import Engine
from recipes._bench import Row, gpu_name, seconds_of
from recipes._bench_sft import random_klein, random_samples
from recipes._config import check_job
from recipes._plan_pprl import plan_pprl
from recipes._recipe import CONF

LR = 1e-4


class Pprl:
    """A group's rollouts and its update, as train_pprl makes them, and the same images by diffusers' pipeline."""

    def __init__(self, cfg: DictConfig) -> None:
        self.options, self.device = cfg.pprl, torch.device(cfg.model.device)
        self.size_px = tuple(cfg.model.size_px)
        self.precision = cfg.engine.precision
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        self.klein = random_klein(cfg.model, dtype, cfg.model.device)
        transformer = self.klein.transformer.train()
        add_policies(transformer, rank=self.options.rank, alpha=self.options.alpha, seed=cfg.seed)
        with torch.no_grad():  # old and policy part, as they do after a first update
            for adapter in ADAPTERS:
                for name, weight in adapter_weights(transformer, adapter).items():
                    if ".lora_B." in name:
                        weight.normal_(std=1e-3)
        set_checkpointing(transformer, cfg.engine.checkpointing)
        self.conditioner = Conditioner(self.klein, self.size_px, memory_gb=8.0)
        self.engine = Engine(transformer, World(device=self.device), lr=LR, total_steps=10**9, schedule="constant")
        self.pipe = pipeline_of(self.klein, klein_scheduler())
        self.number = 0
        self.x0 = torch.empty(0)

    def sampler(self, batched_cfg: bool) -> Sampler:
        options = {key: self.options[key] for key in ("steps", "cfg", "batch")}
        return Sampler(self.conditioner, **options, batched_cfg=batched_cfg)

    def sample(self) -> Sample:
        """A context that was not seen before: its text has to be encoded."""
        self.number += 1
        (sample,) = random_samples(1, self.options.references, self.size_px)
        return Sample(f"{self.number}", sample.step, f"{sample.goal} {self.number}", sample.reasonings,
                      sample.references)  # fmt: skip

    def roll_out(self, sampler: Sampler) -> None:
        """The images of a group."""
        size = self.options.group_size
        self.group = self.sample()
        with use(self.klein.transformer, OLD):
            self.x0 = sampler.latents([self.group] * size, [(self.number, k) for k in range(size)])
        sampler.decode(self.x0)

    def upstream(self) -> None:
        """As many images of one prompt by diffusers, through the SFT model."""
        sample = self.sample()
        height, width = self.size_px
        options = {"num_inference_steps": self.options.steps, "guidance_scale": self.options.cfg}
        options |= {"max_sequence_length": self.klein.window, "text_encoder_out_layers": self.klein.layers}
        images = [open_image(image) for image in sample.references] or None
        with torch.no_grad(), use(self.klein.transformer, None):
            self.pipe(prompt=sample.goal, image=images, height=height, width=width,
                      num_images_per_prompt=self.options.group_size, **options)  # fmt: skip

    def items(self) -> list[Item]:
        """The last group at `num_times` of its times, half of it better than the mean."""
        times = inference_times(self.x0.shape[1], self.options.steps)[:-1].tolist()
        each = len(times) // self.options.num_times
        return [
            Item(self.group, x0.cpu(), 0.6 if k % 2 else 0.4, times[part * each], (self.number, k, part))
            for k, x0 in enumerate(self.x0)
            for part in range(self.options.num_times)
        ]

    def update(self) -> None:
        """An optimiser step on the last group."""
        options = NFTOptions(beta_nft=1.0, beta_kl=self.options.beta_kl, adv_clip_max=5.0, weighting="adaptive")
        backward_nft(self.conditioner, self.items(), options, self.options.micro_batch, self.engine)
        self.engine.step()


def in_turn(one: Callable, other: Callable, pairs: int, device: torch.device) -> tuple[float, float, float]:
    """Median seconds of both, which take turns in going first, and the median ratio of `other` over `one`."""
    seconds: dict[Callable, list[float]] = {one: [], other: []}
    for pair in range(pairs):
        for step in (one, other) if pair % 2 == 0 else (other, one):
            seconds[step].append(seconds_of(step, device))
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return median(seconds[one]), median(seconds[other]), median(ratios)


def plan_of(cfg: DictConfig, gpu: str) -> dict:
    """What recipes/plan.py says of one group, drawn and trained."""
    GlobalHydra.instance().clear()
    asked = check_job("plan", CONF, [f"references={cfg.pprl.references}", f"gpu={gpu}", "gpus=1"])
    rollout = {key: cfg.pprl[key] for key in ("group_size", "steps", "cfg", "batch")} | {"groups": 1}
    pprl = {key: cfg.pprl[key] for key in ("num_times", "micro_batch", "beta_kl")}
    changes = {"model": cfg.model, "engine": cfg.engine, "rollout": rollout, "pprl": pprl}
    changes["lora"] = {key: cfg.pprl[key] for key in ("rank", "alpha")}
    return plan_pprl(asked, OmegaConf.merge(check_job("train_pprl", CONF, []), changes))


def bench_pprl(cfg: DictConfig) -> list[Row]:
    """Images a second of rollouts and updates; a GPU's share of its peak and its memory, of which a CPU has none."""
    if cfg.pprl.pairs < 1:
        raise ValueError(f"pprl.pairs={cfg.pprl.pairs}: at least one is needed")
    cuda = cfg.model.device == "cuda"
    plan = plan_of(cfg, gpu_name() if cuda else "h100")
    pprl = Pprl(cfg)
    two, one = pprl.sampler(False), pprl.sampler(True)
    for _ in range(cfg.pprl.warmup):
        for step in (lambda: pprl.roll_out(two), lambda: pprl.roll_out(one), pprl.upstream, pprl.update):
            step()
    counts, rows = _count_rows(pprl, two, plan), _rollout_rows(pprl, two, one)
    rollout_s = pprl.options.group_size / rows[0].value
    update_s = median(seconds_of(pprl.update, pprl.device) for _ in range(cfg.pprl.pairs))
    rows.append(Row(f"update, images a second at {cfg.pprl.num_times} times", pprl.options.group_size / update_s, "/s",
                    at_least=4.0 if pprl.options.goals else None))  # fmt: skip
    if cuda:
        peak = GPUS[gpu_name()].bf16
        trained = sum(plan["flops"][kind] for kind in ("old", "reference", "policy"))
        rows += [
            Row("rollout, share of the peak", plan["flops"]["rollout"] / rollout_s / peak, ""),
            Row("update, share of the peak", trained / update_s / peak, ""),
            Row("peak memory over the plan", torch.cuda.max_memory_allocated() / plan["bytes_per_gpu"]["total"], ""),
        ]
    return counts + rows


def _rollout_rows(pprl: Pprl, two: Sampler, one: Sampler) -> list[Row]:
    """Ours in turn with the pipeline, then guidance in two forwards in turn with one."""
    size, pairs, goals = pprl.options.group_size, pprl.options.pairs, pprl.options.goals
    ours, theirs, faster = in_turn(lambda: pprl.roll_out(two), pprl.upstream, pairs, pprl.device)
    _, batched, gain = in_turn(lambda: pprl.roll_out(one), lambda: pprl.roll_out(two), pairs, pprl.device)
    return [
        Row("rollout, images a second", size / ours, "/s", at_least=2.4 if goals else None),
        Row(f"Flux2KleinPipeline(num_images_per_prompt={size}), images a second", size / theirs, "/s"),
        Row("rollout over the pipeline", faster, "", at_least=1.5 if goals else None),
        Row("rollout with batched guidance, images a second", gain * size / batched, "/s"),
        Row("batched guidance over two forwards", gain, ""),
    ]


def _count_rows(pprl: Pprl, sampler: Sampler, plan: dict) -> list[Row]:
    """Counted in one group's rollouts and update, less what the plan says: nothing may be left."""
    pprl.conditioner.text([""])  # the one of a run, not of an epoch
    counted, calls, before = Counter(), Counter(), pprl.conditioner.text_calls

    def count(transformer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        layer = transformer.transformer_blocks[0].attn.to_q
        kind = "reference" if layer.disable_adapters else layer.active_adapter[0]
        counted[kind] += len(kwargs["hidden_states"])
        calls[kind] += 1

    handle = pprl.klein.transformer.register_forward_pre_hook(count, with_kwargs=True)
    pprl.roll_out(sampler)
    pprl.update()
    handle.remove()
    rows = []
    for name, found, planned in (
        ("evaluations", counted, plan["evaluations_per_step"]),
        ("forwards", calls, plan["forwards"]),
    ):
        expected = {OLD: planned["rollout"] + planned[OLD], POLICY: planned[POLICY], "reference": planned["reference"]}
        rows += [Row(f"{name} of {kind} counted beyond the plan", found[kind] - number, "", 0, 0)
                 for kind, number in expected.items()]  # fmt: skip
    texts = pprl.conditioner.text_calls - before - plan["encodings_per_step"]["uncached"]["text_encoder"]
    return [*rows, Row("texts counted beyond the plan", texts, "", 0, 0)]
