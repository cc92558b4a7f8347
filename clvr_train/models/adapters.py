"""LoRA policies on one set of base weights: `policy` is trained, `old` draws the rollouts, `average` is what is kept,
none is the reference (SFT).
"""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from clvr_train.models.klein import transformer_from
from clvr_train.runtime.files import publish_folder

ADAPTERS = POLICY, OLD, AVERAGE = "policy", "old", "average"

# Every linear layer of both block types. `to_out` is a ModuleList in double blocks and a plain Linear in single
# ones, so
# a list of suffixes would miss the latter: a full match over the path is needed.
LORA_TARGETS = (
    r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))"
)


def expected_lora_layers(transformer: Flux2Transformer2DModel) -> int:
    """12 linear layers a double block and 2 a single block: 100 on Klein 4B, 144 on 9B."""
    return 12 * len(transformer.transformer_blocks) + 2 * len(transformer.single_transformer_blocks)


def add_policies(transformer: Flux2Transformer2DModel, *, rank: int, alpha: int, seed: int) -> None:
    """Adds the adapters, in float32 whatever the base has, and equal at the start (B = 0: all are the SFT model).

    Raises:
        RuntimeError: if LoRA did not reach every linear layer of every block.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=POLICY)
    with warnings.catch_warnings():
        # peft warns of a second adapter, which is the point here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        transformer.add_adapter(config, adapter_name=OLD)
        transformer.add_adapter(config, adapter_name=AVERAGE)
    reached = len(adapter_weights(transformer, POLICY)) // 2
    if reached != expected_lora_layers(transformer):
        raise RuntimeError(f"LoRA reached {reached} layers, expected {expected_lora_layers(transformer)}")
    in_float32(transformer, ADAPTERS)
    policy = parameters(transformer, POLICY)
    for adapter in (OLD, AVERAGE):
        for slow, fast in zip(parameters(transformer, adapter), policy, strict=True):
            slow.data.copy_(fast.data)
            slow.requires_grad_(False)
    for parameter in policy:
        parameter.requires_grad_(True)
    transformer.set_adapter(POLICY)


def in_float32(transformer: torch.nn.Module, adapters: Sequence[str]) -> None:
    """Gives adapters float32 weights: a policy that follows another slowly would stand still in bfloat16."""
    for adapter in adapters:
        for parameter in parameters(transformer, adapter):
            parameter.data = parameter.data.float()


def adapter_weights(transformer: torch.nn.Module, adapter: str) -> dict[str, Tensor]:
    """The LoRA parameters of one adapter by name, the adapter's name left out."""
    return {
        name.replace(f".{adapter}.weight", ".weight"): parameter
        for name, parameter in transformer.named_parameters()
        if f".{adapter}.weight" in name
    }


def parameters(transformer: torch.nn.Module, adapter: str) -> list[torch.nn.Parameter]:
    """The LoRA parameters of one adapter, in a fixed order."""
    return list(adapter_weights(transformer, adapter).values())


@contextmanager
def use(transformer: Flux2Transformer2DModel, adapter: str | None) -> Iterator[None]:
    """Within the block the transformer is that policy (None: adapters off, the reference); afterwards `policy`
    again.
    """
    requires_grad = [(p, p.requires_grad) for name in ADAPTERS for p in parameters(transformer, name)]
    if adapter is None:
        transformer.disable_adapters()
    else:
        transformer.set_adapter(adapter)
    try:
        yield
    finally:
        transformer.enable_adapters()
        transformer.set_adapter(POLICY)
        for parameter, value in requires_grad:  # peft switches requires_grad along with the active adapter
            parameter.requires_grad_(value)


def fold(transformer: Flux2Transformer2DModel, adapter: str) -> dict[str, Tensor]:
    """The state dict of the plain transformer with one adapter folded in, see `policy_weights`."""
    return {name: tensor.clone() for name, tensor in policy_weights(transformer, adapter)}


def policy_weights(transformer: torch.nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """The weights with one adapter folded in, `W + scale B A` in float32, one by one under the plain transformer's
    names.
    """
    layers = {name: module for name, module in transformer.named_modules() if adapter in getattr(module, "lora_A", {})}
    for name, tensor in transformer.state_dict().items():
        if "lora_" in name:
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None and name.endswith(".base_layer.weight"):
            a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            tensor = (tensor.float() + layer.scaling[adapter] * (b @ a)).to(tensor.dtype)
        yield name.replace(".base_layer.", "."), tensor.detach()


def plain_copy(transformer: Flux2Transformer2DModel, state: dict[str, Tensor]) -> Flux2Transformer2DModel:
    """A transformer of the same configuration without adapters, with the weights of `fold`."""
    return transformer_from(transformer.config, state)


def save_lora(transformer: Flux2Transformer2DModel, adapter: str, folder: Path) -> None:
    """Writes one adapter in the `diffusers` LoRA format, which `Flux2KleinPipeline.load_lora_weights` reads, and below
    `original/` with the names of the original FLUX.2 code, for programs that follow that.
    """
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    layers = get_peft_model_state_dict(transformer, adapter_name=adapter)
    config = transformer.peft_config[adapter]
    Flux2KleinPipeline.save_lora_weights(
        staging, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    (staging / "original").mkdir()
    save_file(original_names(layers, config.lora_alpha / config.r), staging / "original" / "lora.safetensors")
    publish_folder(staging, folder)


# Layers of a block in diffusers and in the original code (github.com/black-forest-labs/flux2, src/flux2/model.py).
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def original_names(layers: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The A and B of a LoRA under the names of the original FLUX.2 code, the scale multiplied into B.

    There q, k and v are one layer: its A holds the three of theirs one above the other, its B is block-diagonal.
    """
    blocks: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name in layers:
        if name.endswith(".lora_A.weight"):
            kind, number, layer = name.removesuffix(".lora_A.weight").split(".", 2)
            b = scale * layers[name.replace(".lora_A.", ".lora_B.")]
            original = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}[kind]
            blocks.setdefault(f"diffusion_model.{original}.{number}", {})[layer] = layers[name], b
    result = {}
    for block, pairs in blocks.items():
        named = {original: pairs.pop(layer) for layer, original in (_DOUBLE | _SINGLE).items() if layer in pairs}
        for original, parts in _FUSED.items():
            if parts[0] in pairs:
                several = [pairs.pop(part) for part in parts]
                named[original] = torch.cat([a for a, _ in several]), torch.block_diag(*(b for _, b in several))
        if pairs:
            raise ValueError(f"{block}: {sorted(pairs)[0]} has no name in the original code")
        for original, (a, b) in named.items():
            result[f"{block}.{original}.lora_A.weight"] = a.contiguous()
            result[f"{block}.{original}.lora_B.weight"] = b.contiguous()
    return result
