"""FLOPs and activations of a forward, from the shapes of the real classes: no weights, no device.

Models are built on the meta device, and a forward of a micro-batch runs on fake tensors, which have shapes alone: FLOPs
are counted operator by operator, and every tensor that autograd keeps is seen.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from clvr_train.method.flow import flow_matching_loss
from clvr_train.models.blocks import blocks_of, checkpointed
from clvr_train.models.conditioning import Conditioning, predict_velocity
from clvr_train.models.klein import check_kind, image_ids, text_ids
from clvr_train.models.text_encoder import check_text_config, shape_text_encoder

# Where no sample is padded, transformers passes no mask; fake tensors do not say so, and each layer would keep one.
UNPADDED = "sdpa_unpadded"
AttentionInterface.register(UNPADDED, sdpa_attention_forward)
AttentionMaskInterface.register(UNPADDED, lambda *args, **kwargs: None)

# On CPUs torch does not count its flash kernel; that of GPUs, of the same FLOPs, it does. The backward is counted as
# that of plain products, twice the forward, without what a flash kernel computes again.
_aten = torch.ops.aten
CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, out_shape=None, **__: (
        2 * sdpa_flop(q, k, v)
    ),
}

_KLEIN = {"in_channels": 128, "attention_head_dim": 128, "timestep_guidance_channels": 256, "guidance_embeds": False}
_QWEN3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
_TEXT = _QWEN3 | {"max_position_embeddings": 40960}
KLEIN_LAYERS = (9, 18, 27)  # of the text encoder, as the published pipelines stack them
# The published models, of which nothing needs to be on disk. The VAE is that of all FLUX.2: the defaults of its class.
PUBLISHED_KLEIN = {
    "klein_4b": {
        "transformer": _KLEIN
        | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        "text_encoder": _TEXT | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
        "vae": {},
    },
    "klein_9b": {
        "transformer": _KLEIN
        | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        "text_encoder": _TEXT | {"hidden_size": 4096, "intermediate_size": 12288},
        "vae": {},
    },
}
PUBLISHED_VLM = {
    "qwen3vl_8b": {
        "text_config": _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
        "vision_config": {"out_hidden_size": 4096},
    }
}


# ---------------------------------------------------------------------------- models without weights


def klein_shapes(
    name: str, layers: Sequence[int] = KLEIN_LAYERS, window: int = 512, device: str | torch.device = "meta"
) -> dict[str, torch.nn.Module]:
    """`transformer`, `text_encoder` (the layers that are used) and `vae` on the meta device, of a base Klein folder or
    of PUBLISHED_KLEIN; on another device with random weights of torch's default dtype.

    Raises:
        FileNotFoundError, ValueError: as `models.klein.load_klein`, or a part has no config.json.
    """
    if name in PUBLISHED_KLEIN:
        configs = PUBLISHED_KLEIN[name]
    else:
        check_kind(Path(name), "base")
        configs = {part: _config(Path(name) / part) for part in ("transformer", "text_encoder", "vae")}
    text_config = Qwen3Config.from_dict(configs["text_encoder"])
    with torch.device(device):
        transformer = Flux2Transformer2DModel.from_config(configs["transformer"])
        check_text_config(text_config, f"{name}/text_encoder", layers, window, transformer.config.joint_attention_dim)
        return {
            "transformer": transformer,
            "text_encoder": shape_text_encoder(text_config, layers),
            "vae": AutoencoderKLFlux2.from_config(configs["vae"]),
        }


def vlm_shapes(name: str) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL on the meta device, of a transformers folder or of PUBLISHED_VLM.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds another kind of model.
    """
    config = PUBLISHED_VLM.get(name) or _config(Path(name))
    if config.get("model_type", "qwen3_vl") != "qwen3_vl":
        raise ValueError(f"{Path(name) / 'config.json'}: model_type: {config['model_type']!r} is no Qwen3-VL")
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config))
    model.set_attn_implementation(UNPADDED)
    return model


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        known = ", ".join((*PUBLISHED_KLEIN, *PUBLISHED_VLM))
        raise FileNotFoundError(f"{file}: no such file; give a model's folder or one of {known}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------- one forward on shapes alone


@dataclass
class Trace:
    """One forward. Storages that autograd keeps are by id, with their bytes, outside all blocks and in each block.

    `flops`: of the forward; `frozen_flops`: of those, in modules that are not trained. `block_flops`, `block_saved`,
    `block_inputs`: of every block that can be checkpointed, in order.
    """

    flops: int
    frozen_flops: int
    outside: dict[int, int]
    block_flops: list[int]
    block_saved: list[dict[int, int]]
    block_inputs: list[dict[int, int]]

    def activations(self, checkpointing: str) -> tuple[int, int]:
        """Bytes that are kept until the backward, and of those that the largest recomputed block adds during it."""
        chosen = set(self.checkpointed(checkpointing))
        kept = dict(self.outside)
        for block, saved in enumerate(self.block_saved):
            kept |= self.block_inputs[block] if block in chosen else saved
        again = [sum(n for key, n in self.block_saved[b].items() if key not in kept) for b in chosen]
        return sum(kept.values()), max(again, default=0)

    def recomputed_flops(self, checkpointing: str) -> int:
        return sum(self.block_flops[block] for block in self.checkpointed(checkpointing))

    def checkpointed(self, checkpointing: str) -> range:
        """Indices of the blocks that keep only their inputs and are recomputed."""
        return checkpointed(len(self.block_saved), checkpointing)


def fake_weights(
    module: torch.nn.Module, dtype: torch.dtype, lora_dtype: torch.dtype, trained: bool
) -> dict[str, torch.Tensor]:
    """New tensors of the shapes of a module's parameters and buffers, by name."""
    weights = {}
    for name, p in module.named_parameters():
        of_lora = ".lora_" in name
        weights[name] = torch.empty(
            p.shape, dtype=lora_dtype if of_lora else dtype, requires_grad=trained and p.requires_grad
        )
    for name, b in module.named_buffers():
        weights[name] = torch.empty(b.shape, dtype=b.dtype)
    return weights


class Tracer:
    """Runs modules of the meta device on fake tensors, and notes what their forwards compute and keep."""

    def __init__(
        self, blocks: Iterable[torch.nn.Module], dtype: torch.dtype, lora_dtype: torch.dtype = torch.float32
    ) -> None:
        self.blocks, self.dtype, self.lora_dtype = list(blocks), dtype, lora_dtype
        self._weights: set[int] = set()
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no id is used twice
        self._current: int | None = None
        self._before = 0
        self._counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        nothing: list[dict[int, int]] = [{} for _ in self.blocks]
        self.trace = Trace(0, 0, {}, [0] * len(nothing), nothing, [{} for _ in nothing])

    @property
    def flops(self) -> int:
        return self._counter.get_total_flops()

    def call(self, module: torch.nn.Module, *args: object, trained: bool = True, **kwargs: object) -> object:
        """The module's forward with fake weights. Not trained is also what asks for no gradient."""
        weights = fake_weights(module, self.dtype, self.lora_dtype, trained)
        self._weights |= {self._key(w) for w in weights.values()}
        before = self.flops
        output = functional_call(module, weights, args, kwargs)
        self.trace.frozen_flops += 0 if trained else self.flops - before
        return output

    def run(self, step: Callable[["Tracer"], None]) -> Trace:
        handles = [h for i, block in enumerate(self.blocks) for h in self._hooks(i, block)]
        try:
            with FakeTensorMode(), self._counter, saved_tensors_hooks(self._pack, lambda tensor: tensor):
                step(self)
        finally:
            for handle in handles:
                handle.remove()
        self.trace.flops = self.flops
        for saved in (self.trace.outside, *self.trace.block_saved):
            for key in self._weights & saved.keys():
                del saved[key]
        return self.trace

    def _hooks(self, index: int, block: torch.nn.Module) -> Iterator:
        def enter(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            self._current, self._before = index, self.flops
            for value in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor):
                    self.trace.block_inputs[index][self._key(value)] = value.untyped_storage().nbytes()

        def leave(module: torch.nn.Module, args: tuple, output: object) -> None:
            self.trace.block_flops[index] = self.flops - self._before
            self._current = None

        yield block.register_forward_pre_hook(enter, with_kwargs=True)
        yield block.register_forward_hook(leave)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        saved = self.trace.outside if self._current is None else self.trace.block_saved[self._current]
        saved[self._key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def _key(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        return storage._cdata


def fake_inputs(
    config: dict, dtype: torch.dtype, batch: int, window: int, target: tuple[int, int], references: Sequence
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Tokens of the target, times and conditions of a micro-batch: see `trace_transformer`."""

    def tokens(number: int) -> torch.Tensor:
        return torch.empty(batch, number, config.in_channels, dtype=dtype)

    number = math.prod(target)
    cond = Conditioning(
        torch.empty(batch, window, config.joint_attention_dim, dtype=dtype),
        tokens(sum(map(math.prod, references))) if references else None,
        image_ids(target, references),
        text_ids(window),
        number,
    )
    return tokens(number), torch.empty(batch), cond


def trace_transformer(
    transformer: Flux2Transformer2DModel,
    dtype: torch.dtype,
    batch: int,
    window: int,
    target: tuple[int, int],
    references: Sequence[tuple[int, int]] = (),
) -> Trace:
    """The flow-matching loss of a micro-batch: `window` text tokens, grids (rows, columns) of target and references."""

    def step(tracer: Tracer) -> None:
        x0, t, cond = fake_inputs(transformer.config, dtype, batch, window, target, references)
        velocity = predict_velocity(partial(tracer.call, transformer), torch.empty_like(x0), t, cond)
        flow_matching_loss(velocity, x0, torch.empty_like(x0))

    return Tracer(blocks_of(transformer), dtype).run(step)


def trace_vlm(
    model: Qwen3VLForConditionalGeneration,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    images: int = 0,
    image_px: tuple[int, int] = (512, 512),
    train_vision: bool = True,
) -> Trace:
    """The forward of a micro-batch of conversations of `tokens` tokens, those of their images included.

    The head is counted over all tokens. Logits are not kept, as TRL makes them in pieces.

    Raises:
        ValueError: the images alone have more tokens.
    """
    vision = model.config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    patches = math.prod(max(1, round(px / side)) for px in image_px) * vision.spatial_merge_size**2
    visual = images * patches // vision.spatial_merge_size**2
    if visual > tokens:
        raise ValueError(f"tokens={tokens}: {images} images of {image_px[0]} x {image_px[1]} px alone have {visual}")

    def see(tracer: Tracer) -> torch.Tensor:
        total = batch * images * patches
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return tracer.call(
            model.model.visual,
            torch.empty(total, pixels, dtype=dtype),
            trained=train_vision,
            grid_thw=None,
            position_ids=torch.empty(total, 2, dtype=torch.long),
            interp_indices=torch.empty(total, 4, dtype=torch.long),
            interp_weights=torch.empty(total, 4),
            # numpy: the attention asks for the lengths of its pieces as numbers, which fake tensors do not have
            cu_seqlens=np.arange(batch * images + 1) * patches,
        ).pooler_output

    def step(tracer: Tracer) -> None:
        language = model.model.language_model
        embedded = tracer.call(language.embed_tokens, torch.empty(batch, tokens, dtype=torch.long))
        if images:
            where = torch.empty(batch, tokens, 1, dtype=torch.bool)
            embedded = embedded.masked_scatter(where, see(tracer))
        hidden = tracer.call(language, inputs_embeds=embedded, use_cache=False).last_hidden_state
        with torch.no_grad():
            tracer.call(model.lm_head, hidden)

    blocks = (*model.model.visual.blocks, *model.model.language_model.layers)
    return Tracer(blocks, dtype).run(step)


def encoder_flops(parts: dict[str, torch.nn.Module], window: int, sizes_px: Iterable[tuple[int, int]]) -> list[int]:
    """FLOPs of a text in the used layers of the text encoder, then of encoding an image of each size."""

    def text(tracer: Tracer) -> None:
        ids = torch.empty(1, window, dtype=torch.long)
        tracer.call(parts["text_encoder"], input_ids=ids, use_cache=False, trained=False)

    def image(size_px: tuple[int, int], tracer: Tracer) -> None:
        moments = tracer.call(parts["vae"].encoder, torch.empty(1, 3, *size_px), trained=False)
        if parts["vae"].quant_conv is not None:
            tracer.call(parts["vae"].quant_conv, moments, trained=False)

    steps = [text, *(partial(image, size_px) for size_px in sizes_px)]
    return [Tracer((), torch.float32).run(step).flops for step in steps]
