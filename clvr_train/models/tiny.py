"""Small models of the real classes, from random weights: what the shapes world trains on a laptop.

Each builder gives the upstream class with a small configuration; nothing is subclassed or simplified. A token of the
tiny transformer covers 32 x 32 px (five VAE stages, then the 2 x 2 patches of FLUX.2), one cell of the shapes world.
"""

import json
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from clvr_train.models.klein import patchify
from clvr_train.runtime.files import publish_folder

TEXT_LAYERS = (1, 2, 3)  # hidden states that condition the tiny transformer, as 9, 18, 27 do for Klein
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 1024, special_tokens: tuple[str, ...] = ()
) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen's class trained on `texts`; any text can be encoded, frequent words are one
    token.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special_tokens]
    prototype = Qwen2Tokenizer(vocab={"a": 0}, merges=[])
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = prototype.backend_tokenizer.normalizer
    bpe.pre_tokenizer = prototype.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(chain(texts, ["system", "user", "assistant"] * 100), trainer)  # the template's words too
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    return tokenizer


def tiny_vae(latent_channels: int = 8) -> AutoencoderKLFlux2:
    """96 x 96 px <-> 3 x 3 tokens of `4 * latent_channels` numbers; about 0.25 M parameters."""
    stages = (4, 8, 16, 32, 32)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * len(stages),
        up_block_types=("UpDecoderBlock2D",) * len(stages),
        block_out_channels=stages,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=96,
    )


def tiny_text_encoder(tokenizer: Qwen2Tokenizer, width: int = 128) -> Qwen3ForCausalLM:
    """A four-layer Qwen3 language model over the tokenizer's vocabulary.

    Embeddings are untied and start far apart: colours stand in the same contexts, and from a small start a language
    model leaves their states almost equal (measured: 3 % of a state's norm), which the transformer then cannot read.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


def tiny_transformer(
    in_channels: int, text_width: int, double: int = 2, single: int = 4, heads: int = 4, head_dim: int = 32
) -> Flux2Transformer2DModel:
    """A Klein-shaped transformer (no guidance embedding); `text_width` is that of the stacked hidden states."""
    if head_dim % 8:
        raise ValueError(f"head_dim={head_dim}: must be a multiple of 8, four rotary axes share it")
    return Flux2Transformer2DModel(
        in_channels=in_channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        timestep_guidance_channels=64,
        axes_dims_rope=(head_dim // 4,) * 4,
        guidance_embeds=False,
    )


def klein_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with the values of FLUX.2 Klein's `scheduler_config.json`."""
    return FlowMatchEulerDiscreteScheduler(
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=3.0,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLFlux2, images: torch.Tensor) -> None:
    """Sets the VAE's batch-norm statistics, by which latents are normalised, from images (B, 3, H, W) in [-1, 1]."""
    z = patchify(vae.encode(images).latent_dist.mode())
    vae.bn.running_mean.copy_(z.mean((0, 2, 3)))
    vae.bn.running_var.copy_(z.var((0, 2, 3), unbiased=False))


def save_tiny_klein(
    folder: Path,
    *,
    vae: AutoencoderKLFlux2,
    text_encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    transformer: Flux2Transformer2DModel,
    distilled: bool = False,
) -> None:
    """Writes the parts as a diffusers folder that `Flux2KleinPipeline.from_pretrained` loads; nothing half-written."""
    pipe = Flux2KleinPipeline(
        scheduler=klein_scheduler(),
        vae=vae.cpu(),
        text_encoder=text_encoder.cpu(),
        tokenizer=tokenizer,
        transformer=transformer.cpu(),
        is_distilled=distilled,
    )
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    pipe.save_pretrained(staging, safe_serialization=True)
    publish_folder(staging, folder)
