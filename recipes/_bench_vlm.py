"""What the `vlm` part of the benchmark measures: train_vlm's step at full size, against the GPU's peak and the plan.

Weights, texts and images are random and made on the fly; nothing is read but a folder's config.json.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from clvr_train.models.qwen_vl import set_checkpointing
from clvr_train.models.trace import vlm_shapes
from clvr_train.runtime.distributed import World
from clvr_train.runtime.engine import Engine
from clvr_train.sft.vlm import add_loss_head
from recipes._bench import Row, gpu_name, on_gpu
from recipes._config import check_job
from recipes._recipe import CONF
from recipes.plan import make_plan

TRAINED = 4  # of so many text tokens one has a loss: about the assistant's share


def bench_vlm(cfg: DictConfig, device: str) -> list[Row]:
    """Seconds of a step, share of the GPU's peak, memory against the plan.

    On a CPU there is no peak and no peak memory: those rows are left out.
    """
    cuda = device == "cuda"
    plan = plan_of(cfg, gpu_name() if cuda else "h100")
    step = make_step(cfg, torch.device(device))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(cfg.vlm.warmup):
        step()
    ours = median(_seconds(step, cuda) for _ in range(cfg.vlm.steps))
    per_second = plan["flops_per_step"] / ours
    rows = [
        Row("seconds of a step", ours, "s"),
        Row("tokens a second", cfg.vlm.batch * cfg.vlm.tokens / ours, "/s"),
        Row("TFLOP/s of the model", per_second / 1e12, "TFLOP/s"),
    ]
    if cuda:
        rows += on_gpu(per_second, 0.40, plan["bytes_per_gpu"]["total"])
    return rows


def plan_of(cfg: DictConfig, gpu: str) -> dict:
    """What recipes/plan.py says of these steps."""
    GlobalHydra.instance().clear()
    vlm = cfg.vlm
    size = f"image_px=[{vlm.image_px[0]},{vlm.image_px[1]}]"
    own = ["recipe=train_vlm", f"tokens={vlm.tokens}", f"images={vlm.images}", size, f"gpu={gpu}", "gpus=1"]
    asked = check_job("plan", CONF, own)
    training = check_job("train_vlm", CONF, [f"controller.folder={vlm.folder}", "controller.max_pixels=null"])
    train = {"batch": vlm.batch, "micro_batch": vlm.micro_batch}
    return make_plan(asked, "train_vlm", OmegaConf.merge(training, {"engine": cfg.engine, "train": train}))


def make_step(cfg: DictConfig, device: torch.device) -> Callable[[], None]:
    """A step as train_vlm does it: micro-batches of whole conversations, the engine's update."""
    vlm, engine = cfg.vlm, cfg.engine
    model = random_model(vlm.folder, torch.float32 if engine.precision == "fp32" else torch.bfloat16, device)
    set_checkpointing(model.train(), engine.checkpointing)
    add_loss_head(model)
    options = {"name": engine.name, "precision": engine.precision, "optimizer": engine.optimizer}
    made = Engine(model, World(device=device), lr=1e-5, total_steps=10**9, schedule="constant", **options)
    rows = random_inputs(model, vlm.batch, vlm.tokens, vlm.images, tuple(vlm.image_px))
    parts = [rows[first : first + vlm.micro_batch] for first in range(0, vlm.batch, vlm.micro_batch)]
    number = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)

    def step() -> None:
        for part in made.turns(parts):
            inputs = {key: torch.cat([row[key] for row in part]) for key in part[0]}
            out = made.module(**inputs, fused_lm_head=True, use_cache=False)
            made.backward(-out.log_probs.sum() / number)
        made.step()

    return step


def random_model(folder: str, dtype: torch.dtype, device: torch.device) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of the size of a folder, or of the published one, with random weights."""
    config = vlm_shapes(folder).config
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def random_inputs(
    model: Qwen3VLForConditionalGeneration, batch: int, tokens: int, images: int, image_px: tuple[int, int]
) -> list[dict[str, Tensor]]:
    """Conversations of exactly so many tokens, those of their images included, each of one row.

    Raises:
        ValueError: the images alone have more tokens.
    """
    config, device = model.config, model.device
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    grid = [max(1, round(px / side)) * vision.spatial_merge_size for px in image_px]
    visual = grid[0] * grid[1] // vision.spatial_merge_size**2
    space = tokens // max(1, images)
    if space < visual + 2:
        raise ValueError(f"vlm.tokens={tokens}: {images} images of {image_px[0]} x {image_px[1]} px do not fit")
    source = torch.Generator().manual_seed(0)
    image_ids = [config.vision_start_token_id, *[config.image_token_id] * visual, config.vision_end_token_id]
    special = torch.tensor([*image_ids, config.video_token_id])
    vocabulary = config.text_config.vocab_size
    rows = []
    for _ in range(batch):
        ids = torch.randint(vocabulary, (tokens,), generator=source)
        ids[torch.isin(ids, special)] = vocabulary // 2  # a token of text, in the tiny vocabulary too
        for image in range(images):
            ids[image * space : image * space + len(image_ids)] = torch.tensor(image_ids)
        labels = torch.where((torch.arange(tokens) % TRAINED == 0) & ~torch.isin(ids, special), ids, -100)
        pixels = torch.randn(
            images * grid[0] * grid[1],
            vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            generator=source,
        )
        row = {
            "input_ids": ids[None],
            "attention_mask": torch.ones(1, tokens, dtype=torch.long),
            "mm_token_type_ids": (ids == config.image_token_id).long()[None],
            "labels": labels[None],
        }
        if images:
            row |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *grid]] * images)}
        rows.append({name: tensor.to(device) for name, tensor in row.items()})
    return rows


def _seconds(step: Callable[[], None], cuda: bool) -> float:
    """Of one step, to its end on the device."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
