"""The controller: Qwen3-VL through transformers, its processor with or without torchvision, and a tiny one of the
real class for the shapes world."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.utils import is_torchvision_available

from clvr_train.data.images import open_image
from clvr_train.models.blocks import CHECKPOINTING
from clvr_train.models.tiny import train_tokenizer
from clvr_train.runtime.files import publish_folder

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Qwen3-VL's template without tools and video. What stands between the generation marks is the assistant's own text:
# the loss is on it, <|im_end|> included, or the controller would never learn to end a turn.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if message.content is string %}{{- message.content }}
            {%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endif %}
            {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {%- if message.content is string %}{{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
                {%- else %}{{- part.text }}{%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


class ImageOnlyProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video half, the only part that needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict:
        # On disk it is the stock class, whose folders have the same files but for the video half.
        return super().to_dict() | {"processor_class": "Qwen3VLProcessor"}


class Controller:
    """A VLM that answers chats. It keeps nothing between calls.

    Args:
        max_new_tokens: longest reply.
        batch: most conversations in one forward.
    """

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        processor: Qwen3VLProcessor,
        *,
        max_new_tokens: int = 128,
        batch: int = 64,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.batch = batch

    def encode(self, conversations: Sequence[list[dict]]) -> dict[str, Tensor]:
        """Model inputs of conversations that wait for the assistant, padded on the left; on the model's device."""
        inputs = self.processor.apply_chat_template(
            [_with_images(messages) for messages in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return dict(inputs.to(self.model.device))

    def reply(self, conversations: Sequence[list[dict]], seed: int | None = None) -> list[str]:
        """One reply a conversation (`method.protocol.chat_messages`): greedy, or drawn with `seed` if it is given.

        A greedy reply does not depend on what else is in the batch. One that ran into `max_new_tokens` comes back cut.
        """
        # Neighbours in length share a forward: little padding.
        order = sorted(range(len(conversations)), key=lambda i: len(conversations[i]))
        replies: dict[int, str] = {}
        for start in range(0, len(order), self.batch):
            indices = order[start : start + self.batch]
            texts = self._generate([conversations[i] for i in indices], seed)
            replies.update(zip(indices, texts, strict=True))
        return [replies[i] for i in range(len(conversations))]

    @torch.no_grad()
    def _generate(self, conversations: list[list[dict]], seed: int | None) -> list[str]:
        inputs = self.encode(conversations)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed or 0)
            # None of a folder's own sampling defaults count: real Qwen3-VL folders ask for top-p sampling.
            chosen = {"do_sample": True, "temperature": 1.0, "top_p": 0.9} if seed is not None else {"do_sample": False}
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **chosen)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _with_images(messages: list[dict]) -> list[dict]:
    return [
        {**message, "content": [
            {"type": "image", "image": open_image(part["image"])} if part["type"] == "image" else part
            for part in message["content"]
        ]}
        for message in messages
    ]  # fmt: skip


# ---------------------------------------------------------------------------- loading


def load_vlm(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, max_pixels: int | None = None
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """Model and processor of a transformers folder of a Qwen3-VL.

    Args:
        max_pixels: an image with more is made smaller before the vision tower sees it (32 x 32 px are one token).

    Raises:
        FileNotFoundError: if the folder or a part of it is missing.
        ValueError: if it holds another kind of model, or not all of its weights.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file; a controller is a transformers folder of a Qwen3-VL")
    kind = json.loads(config.read_text()).get("model_type")
    if kind != "qwen3_vl":
        raise ValueError(f"{config}: model_type: {kind!r} is no Qwen3-VL; the controller must be 'qwen3_vl'")
    # Each part by the names under which the versions of transformers have saved it.
    for names in (
        ("tokenizer.json",),
        ("processor_config.json", "preprocessor_config.json"),
        ("model.safetensors", "model.safetensors.index.json"),
    ):
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(f"{folder / names[0]}: no such file; the folder lacks a part of the controller")
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{folder}: weights: {sorted(info['missing_keys'])[0]!r} and perhaps others are missing")
    return model.to(device), load_processor(folder, max_pixels)


def load_processor(folder: Path, max_pixels: int | None = None) -> Qwen3VLProcessor:
    """The stock processor where torchvision is installed and the folder has a video half, else the image-only one."""
    if is_torchvision_available() and (folder / "video_preprocessor_config.json").is_file():
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    else:
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        file = folder / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.chat_template
        processor = ImageOnlyProcessor(image_processor, tokenizer, chat_template=template)
    if max_pixels is not None:
        size = processor.image_processor.size
        size["longest_edge"] = min(size["longest_edge"], max_pixels)
        size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    return processor


def load_controller(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_pixels: int | None = None,
    max_new_tokens: int = 128,
    batch: int = 64,
) -> Controller:
    """The controller of a folder; arguments and errors as `load_vlm` and `Controller`."""
    model, processor = load_vlm(folder, device=device, dtype=dtype, max_pixels=max_pixels)
    return Controller(model, processor, max_new_tokens=max_new_tokens, batch=batch)


def add_image_tokens(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, number: int) -> None:
    """Makes `<IMG_GEN_1>` .. `<IMG_GEN_number>` one token each, where they are not; as text they are several.

    A new token starts as the mean of the tokens it was made of, in the embedding and in the head. They are no special
    tokens: decoding keeps them.
    """
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    names = [name for name in (f"<IMG_GEN_{n}>" for n in range(1, number + 1)) if name not in known]
    pieces = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # Qwen3-VL has rows to spare
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in {id(w): w for w in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
            for name, ids in zip(names, pieces, strict=True):
                weight[tokenizer.convert_tokens_to_ids(name)] = weight[ids].float().mean(0).to(weight.dtype)


def save_vlm(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a transformers folder; an older one is replaced only when the new one is whole.

    Args:
        weights: by the names of the model's own state, if the model does not hold them whole (ZeRO-3).
    """
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging, safe_serialization=True, state_dict=None if weights is None else dict(weights))
    processor.save_pretrained(staging)
    publish_folder(staging, folder)


def set_checkpointing(model: Qwen3VLForConditionalGeneration, kind: str) -> None:
    """Activation checkpointing of no block, of every second one, or of all, those of the vision tower first.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in CHECKPOINTING:
        raise ValueError(f"checkpointing={kind!r} is not one of {', '.join(CHECKPOINTING)}")
    if kind == "none":
        model.activation_checkpointing_disable()
    else:
        model.activation_checkpointing_enable(every_n_layers=1 if kind == "full" else 2)


# ---------------------------------------------------------------------------- the tiny one


def make_tiny_controller(
    folder: Path, texts: Iterable[str], seed: int, *, width: int = 128, layers: int = 4, vocab_size: int = 1024
) -> None:
    """Writes an untrained Qwen3-VL of about 1.5 M parameters whose tokenizer is trained on `texts`.

    A visual token covers 32 x 32 px, as upstream: a 96 x 96 px image is 3 x 3 tokens.
    """
    tokenizer = train_tokenizer(texts, vocab_size, VISION_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 512 * 512},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(_tiny_config(tokenizer, width, layers))
    # The default scale (0.02) is made for large models that train long. Here the patches' colours would drown where
    # they are: the language model then sees what is in the picture long before it can tell a cell from another.
    torch.nn.init.normal_(model.model.visual.pos_embed.weight)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    save_vlm(model, ImageOnlyProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE), folder)


def _tiny_config(tokenizer, width: int, layers: int) -> Qwen3VLConfig:
    text = Qwen3VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=width**-0.5,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },  # fmt: skip
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = Qwen3VLVisionConfig(
        depth=2,
        hidden_size=96,
        intermediate_size=192,
        num_heads=3,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=width,
        num_position_embeddings=36,  # 6 x 6 patches of a 96 x 96 px canvas, interpolated for others
        deepstack_visual_indexes=[0],
        initializer_range=0.05,
    )
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
