"""Makes the parts of the tiny Klein that the shapes world starts from: VAE, text encoder, untrained transformer.

The VAE is trained to reconstruct rendered scenes, the text encoder as a language model on the world's texts; the
transformer keeps its random weights: `train_dit experiment=shapes_base` trains it. Writes runs/<run>/model/, a
diffusers folder. launch/rebuild_models.sh is the whole story.
"""

import logging
import random

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.images import to_image, to_tensor
from clvr_train.models import tiny
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.seeding import generator
from clvr_train.shapes.base import documents
from clvr_train.shapes.goals import random_scene
from clvr_train.shapes.render import confident_scene, render
from recipes._build import is_finished
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)


def train_vae(cfg: DictConfig, device: str, seed: int) -> torch.nn.Module:
    """Absolute and squared error of the reconstruction and a small KL term; then the statistics that normalise latents.

    Scenes of 1 to 9 things: fuller than goals ask for, so that a picture teaches more. Without the squared error the
    colours come thousands of steps after the shapes.
    """
    rng = random.Random(seed)
    scenes = (random_scene(rng, rng.randint(1, 9)) for _ in range(cfg.images))
    images = torch.stack([to_tensor(render(scene)) for scene in scenes]).to(device)
    torch.manual_seed(seed)
    vae = tiny.tiny_vae(cfg.latent_channels).to(device).train()
    engine = Engine(vae, lr=cfg.lr, total_steps=cfg.steps, warmup_steps=20)
    source = generator("vae", seed)
    for _ in tqdm(range(cfg.steps), desc="vae"):
        x = images[torch.randint(len(images), (cfg.batch,), generator=source)]
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=source).to(device)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = reconstruction - x
        loss = error.abs().mean() + 4 * error.square().mean() + cfg.kl_weight * kl
        loss.backward()
        engine.step()
    logger.info("VAE after %d steps: loss %.4f", cfg.steps, loss.item())
    vae.eval()
    tiny.set_latent_statistics(vae, images[:1024])
    with torch.no_grad():
        shown = [to_image(y) for y in vae.decode(vae.encode(images[:512]).latent_dist.mode()).sample]
    exact = sum(confident_scene(to_image(x)) == confident_scene(y) for x, y in zip(images[:512], shown, strict=True))
    logger.info("scenes read from the reconstruction as from the picture: %d of %d", exact, len(shown))
    return vae


def train_text_encoder(cfg: DictConfig, tokenizer, texts: list[str], device: str, seed: int) -> torch.nn.Module:
    """Next-token prediction on the world's texts, in the chat format in which the transformer's encoder sees them."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    encoded = tokenizer(chats, padding=True, truncation=True, max_length=cfg.max_tokens, return_tensors="pt")
    torch.manual_seed(seed)
    model = tiny.tiny_text_encoder(tokenizer, cfg.width).to(device).train()
    engine = Engine(model, lr=cfg.lr, total_steps=cfg.steps, warmup_steps=50)
    source = generator("text", seed)
    for _ in tqdm(range(cfg.steps), desc="text encoder"):
        rows = torch.randint(len(chats), (cfg.batch,), generator=source)
        ids, mask = encoded["input_ids"][rows].to(device), encoded["attention_mask"][rows].to(device)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        engine.step()
    logger.info("text encoder after %d steps: loss %.3f nats a token", cfg.steps, loss.item())
    return model.eval()


@recipe("make_shapes_models")
def main(cfg: DictConfig) -> None:
    run = run_folder(cfg)
    if is_finished(run):
        return
    texts = documents(cfg.text_encoder.texts, cfg.seed)
    tokenizer = tiny.train_tokenizer(texts, cfg.text_encoder.vocab_size)
    vae = train_vae(cfg.vae, cfg.device, cfg.seed)
    text_encoder = train_text_encoder(cfg.text_encoder, tokenizer, texts, cfg.device, cfg.seed)
    torch.manual_seed(cfg.seed)
    transformer = tiny.tiny_transformer(
        4 * cfg.vae.latent_channels,
        len(tiny.TEXT_LAYERS) * cfg.text_encoder.width,
        double=cfg.transformer.double,
        single=cfg.transformer.single,
        heads=cfg.transformer.heads,
    )
    tiny.save_tiny_klein(
        run / "model", vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


if __name__ == "__main__":
    main()
