"""FLUX.2 Klein through diffusers: load, check the kind, latents, position ids, velocity, save.

Layout follows `Flux2KleinPipeline` (diffusers 0.42.1, pipelines/flux2/pipeline_flux2_klein.py): text tokens first, then
the target (T = 0), then reference i (T = 10 + 10 i); the prediction is cropped to the target's tokens. A test holds
parity with that pipeline.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import Qwen3Config
from transformers.utils import logging as transformers_logging

from clvr_train.models.text_encoder import check_text_config, load_text_encoder
from clvr_train.runtime.files import publish_folder

KINDS = ("base", "distilled")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A part of the key of everything that is cached: raise it when `encode_text` or `encode_images` come out differently.
ENCODING_VERSION = 1
REFERENCE_TIME = 10  # T offset of the first reference and step between references


@dataclass
class Klein:
    """The parts of a Klein pipeline and the two choices that upstream passes at every call.

    `window` is the number of text tokens (512 upstream), `layers` the hidden states that are stacked (9, 18, 27).
    """

    folder: Path
    transformer: Flux2Transformer2DModel
    vae: torch.nn.Module
    text_encoder: torch.nn.Module
    tokenizer: object
    distilled: bool
    window: int
    layers: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def token_px(self) -> int:
        """Side of the square of pixels that one token covers: VAE stages, then 2 x 2 patches."""
        return 2 ** len(self.vae.config.block_out_channels)

    def grid(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Tokens (rows, columns) of an image of (height, width) px."""
        return size_px[0] // self.token_px, size_px[1] // self.token_px


def check_kind(folder: Path, expect: str | None) -> bool:
    """Reads `model_index.json` and returns whether the pipeline is distilled.

    Raises:
        FileNotFoundError: no such folder, or no `model_index.json` in it.
        ValueError: another pipeline class, or not of the kind `expect` (`base`, `distilled`, or None for either).
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index}: not found; expected a diffusers folder of a FLUX.2 Klein pipeline")
    try:
        config = json.loads(index.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{index}: not JSON ({error})") from error
    if config.get("_class_name") != "Flux2KleinPipeline":
        raise ValueError(f"{index}: _class_name is {config.get('_class_name')!r}, expected 'Flux2KleinPipeline'")
    distilled = bool(config.get("is_distilled", False))
    if expect is not None and distilled != (expect == "distilled"):
        kind = KINDS[distilled]
        reason = "; train the base and merge the distillation delta afterwards" if distilled else ""
        raise ValueError(f"{folder}: is_distilled is {distilled}: a {kind} model, but a {expect} one is needed{reason}")
    return distilled


def load_klein(
    folder: str | Path,
    *,
    expect: str | None,
    window: int,
    layers: Sequence[int],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Klein:
    """Loads a Klein folder from disk (never from a hub), of its text encoder what `layers` needs; encoder and VAE are
    frozen.

    Raises:
        FileNotFoundError, ValueError: as `check_kind` and `models.text_encoder.check_text_config`, or a part is not
            whole.
    """
    folder = Path(folder)
    distilled = check_kind(folder, expect)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    states = _part_config(folder, "transformer").get("joint_attention_dim")
    text_config = Qwen3Config.from_dict(_part_config(folder, "text_encoder"))
    check_text_config(text_config, folder / "text_encoder", layers, window, states)
    try:
        text_encoder = load_text_encoder(folder / "text_encoder", layers, dtype)
        pipe = Flux2KleinPipeline.from_pretrained(folder, text_encoder=None, dtype=dtype, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(f"{folder}: incomplete model folder ({str(error).splitlines()[0]})") from error
    for part in (pipe.vae, text_encoder, pipe.transformer):
        part.to(device=device)
        part.requires_grad_(False).eval()
    parts = pipe.transformer, pipe.vae, text_encoder, pipe.tokenizer
    return Klein(folder, *parts, distilled, window, tuple(layers))


def _part_config(folder: Path, part: str) -> dict:
    file = folder / part / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: incomplete model folder (no {part}/config.json)")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def fingerprint(folder: Path, parts: Sequence[str]) -> str:
    """SHA-256 over the names and contents of all files of a pipeline's parts, say of ("text_encoder", "tokenizer").

    Streamed, at one to two GB/s on one core: seconds for the 8 GB of a 4B text encoder, which loading has just read.

    Raises:
        FileNotFoundError: a part has no files.
    """
    digest = hashlib.sha256()
    for part in parts:
        files = sorted(path for path in (folder / part).rglob("*") if path.is_file())
        if not files:
            raise FileNotFoundError(f"{folder / part}: no files of the model")
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{content} {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def pipeline_of(klein: Klein, scheduler: object) -> Flux2KleinPipeline:
    """The same parts as a pipeline of diffusers, whose calls want the model's `window` and `layers`."""
    parts = {"vae": klein.vae, "text_encoder": klein.text_encoder, "transformer": klein.transformer}
    options = {"tokenizer": klein.tokenizer, "scheduler": scheduler, "is_distilled": klein.distilled}
    pipe = Flux2KleinPipeline(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer_from(config: dict, state: dict[str, Tensor]) -> Flux2Transformer2DModel:
    """A transformer of a configuration that takes over the tensors given, dtype and device included."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(config)
    transformer.load_state_dict(state, assign=True)
    return transformer


def save_klein(
    source: Path,
    transformer: Flux2Transformer2DModel,
    target: Path,
    *,
    distilled: bool = False,
    precision: str = "fp32",
) -> None:
    """Writes a whole Klein folder with the transformer given, as `publish_klein` does."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    state = {name: tensor.to(PRECISIONS[precision]) for name, tensor in transformer.state_dict().items()}
    whole = transformer_from(transformer.config, state)
    publish_klein(source, target, whole.save_pretrained, distilled=distilled)


def publish_klein(
    source: Path, target: Path, write_transformer: Callable[[Path], None], *, distilled: bool, card: str = ""
) -> None:
    """Writes a whole Klein folder: every part but the transformer copied from `source`; nothing half-written.

    Args:
        write_transformer: writes the folder whose path it is given. card: of the model, its README.md.
    """
    staging = target.with_name(target.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, ignore=shutil.ignore_patterns("transformer", "README.md"))
    write_transformer(staging / "transformer")
    index = json.loads((staging / "model_index.json").read_text())
    index["is_distilled"] = distilled
    (staging / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if card:
        (staging / "README.md").write_text(card, encoding="utf-8")
    publish_folder(staging, target)


def patchify(z: Tensor) -> Tensor:
    """2 x 2 patches: (B, C, H, W) -> (B, 4 C, H/2, W/2), channel order as upstream."""
    b, c, h, w = z.shape
    return z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unpatchify(z: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    b, c, h, w = z.shape
    return z.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, h * 2, w * 2)


def _latent_scale(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    return mean, torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)


@torch.no_grad()
def encode_images(klein: Klein, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> normalised tokens (B, H/px * W/px, channels), the mode of the VAE."""
    z = klein.vae.encode(pixels.to(klein.device, klein.vae.dtype)).latent_dist.mode()
    mean, std = _latent_scale(klein.vae)
    return ((patchify(z) - mean) / std).flatten(2).transpose(1, 2)


@torch.no_grad()
def decode_tokens(klein: Klein, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Normalised tokens (B, rows * columns, channels) -> pixels (B, 3, H, W), about [-1, 1]."""
    z = tokens.to(klein.vae.dtype).transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
    mean, std = _latent_scale(klein.vae)
    return klein.vae.decode(unpatchify(z * std + mean), return_dict=False)[0]


@torch.no_grad()
def encode_text(klein: Klein, texts: Sequence[str]) -> Tensor:
    """Stacked hidden states of the chat-formatted texts, (B, window, len(layers) * width), padded to the window."""
    return Flux2KleinPipeline._get_qwen3_prompt_embeds(
        klein.text_encoder,
        klein.tokenizer,
        list(texts),
        device=klein.device,
        dtype=klein.transformer.dtype,
        max_sequence_length=klein.window,
        hidden_states_layers=list(klein.layers),
    )


def count_tokens(klein: Klein, text: str) -> int:
    """Tokens of a text as the encoder sees it, chat template included."""
    chat = [{"role": "user", "content": text}]
    formatted = klein.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return len(klein.tokenizer(formatted)["input_ids"])


def image_ids(target: tuple[int, int], references: Sequence[tuple[int, int]]) -> Tensor:
    """Position ids (N, 4) over the axes T, H, W, L of the target's tokens, then of each reference's."""
    grids = [(0, target), *((REFERENCE_TIME * (1 + i), grid) for i, grid in enumerate(references))]
    axes = [(torch.tensor([t]), torch.arange(h), torch.arange(w), torch.arange(1)) for t, (h, w) in grids]
    return torch.cat([torch.cartesian_prod(*a) for a in axes])


def text_ids(window: int) -> Tensor:
    """Position ids (window, 4) of text tokens: only L counts up."""
    zero = torch.zeros(1, dtype=torch.long)
    return torch.cartesian_prod(zero, zero, zero, torch.arange(window))
