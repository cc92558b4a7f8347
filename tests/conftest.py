"""Tiny models of the real classes, made once a session."""

import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# What DeepSpeed compiles belongs to this environment, so that a lock left anywhere else does not stop the tests.
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")


def pytest_configure(config):
    from clvr_train.runtime.zero import compiler_locks

    if not hasattr(config, "workerinput"):  # before the workers start: left by tests that were killed
        for lock in compiler_locks():
            lock.unlink()


TEXTS = [
    "a red circle left of a blue square",
    "draw it . i see a green triangle in the top-left , make it blue",
    "generate <IMG_GEN_1> edit verify stop",
]


def build_klein_folder(folder, distilled=False):
    """A Klein folder with random weights of the tiny configuration."""
    from clvr_train.models import tiny

    torch.manual_seed(0)
    tokenizer = tiny.train_tokenizer(TEXTS * 20, vocab_size=400)
    vae = tiny.tiny_vae()
    tiny.set_latent_statistics(vae, torch.rand(8, 3, 96, 96) * 2 - 1)
    text_encoder = tiny.tiny_text_encoder(tokenizer, width=32)
    transformer = tiny.tiny_transformer(32, 3 * 32, double=1, single=2, heads=2, head_dim=16)
    tiny.save_tiny_klein(
        folder, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, distilled=distilled
    )
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return build_klein_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def distilled_folder(tmp_path_factory):
    return build_klein_folder(tmp_path_factory.mktemp("models") / "distilled", distilled=True)


@pytest.fixture
def tiny_klein(tiny_folder):
    from clvr_train.models.klein import load_klein

    return lambda: load_klein(tiny_folder, expect="base", window=48, layers=(1, 2, 3))
