"""The judge's server: the command for a GPU, and on a CPU the real server, with a small model that sees."""

import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from clvr_train.method.score import TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.models.tiny import train_tokenizer
from clvr_train.proxy.chat_teacher import ChatTeacher
from clvr_train.rewards.unified_reward import UnifiedReward
from clvr_train.services.chat import ChatClient, user_turn
from clvr_train.services.options import ChatOptions

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "serve_judge.sh"
BIN = Path(sys.executable).parent
SERVING = all(find_spec(name) for name in ("fastapi", "uvicorn", "openai"))
# Images are asked for as the tokenizer's own <image>; a processor with a video part needs torchvision and drops them.
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def dry(script="serve_judge.sh", **variables):
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "DRY_RUN": "1"} | variables
    command = ["bash", str(SCRIPT.with_name(script))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_command_for_a_gpu():
    words = dry(DEVICE="cuda", MODEL="my/model", NAME="UnifiedReward-Edit", PORT="8081")
    assert words[:3] == ["vllm", "serve", "my/model"]
    assert words[words.index("--served-model-name") + 1] == "UnifiedReward-Edit"
    assert words[words.index("--port") + 1] == "8081" and words[words.index("--host") + 1] == "127.0.0.1"


def test_servers_share_or_split_gpus():
    alone, two = dry(DEVICE="cuda"), dry(DEVICE="cuda", GPUS="6,7", SHARE="2")
    assert alone[alone.index("--gpu-memory-utilization") + 1] == "0.90" and "--tensor-parallel-size" not in alone
    assert two[:4] == ["env", "CUDA_VISIBLE_DEVICES=6\\,7", "vllm", "serve"]
    assert two[two.index("--gpu-memory-utilization") + 1] == "0.45"
    assert two[two.index("--tensor-parallel-size") + 1] == "2"


def test_the_teacher_is_served_in_the_same_way():
    words = dry("serve_teacher.sh", DEVICE="cuda", GPUS="3")
    assert words[words.index("--served-model-name") + 1] == "teacher" and words[words.index("--port") + 1] == "8082"
    assert words[:4] == ["env", "CUDA_VISIBLE_DEVICES=3", "vllm", "serve"]
    assert dry("serve_teacher.sh", DEVICE="cpu", MODEL="my/model", PORT="1")[2] == "my/model"


def test_the_command_for_a_cpu():
    assert dry(DEVICE="cpu", MODEL="folder") == (
        ["transformers", "serve", "folder", "--device", "cpu", "--host", "127.0.0.1", "--port", "8080"]
    )
    assert shutil.which("nvidia-smi") or dry()[0] == "transformers"


def make_model(folder):
    """A LLaVA with random weights, large enough that its answers depend on all that it sees."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red circle left of a blue square"] * 20, 400, special_tokens=("<image>",))
    size = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(hidden_size=16, image_size=32, patch_size=8, **size)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=4096, **size, **tokens)
    options = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE, image_token="<image>",
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL and the model of the script's server."""
    folder = tmp_path_factory.mktemp("judge")
    make_model(folder / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DEVICE": "cpu", "PORT": str(port)}
    environment |= {"MODEL": str(folder / "model"), "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log, subprocess.Popen(["bash", str(SCRIPT)], env=environment, stdout=log,
                                                             stderr=log) as process:  # fmt: skip
        options = ChatOptions(f"http://127.0.0.1:{port}/v1", str(folder / "model"), max_tokens=8, attempt_s=30)
        try:
            with ChatClient(options) as client:
                until = time.monotonic() + 120
                while not client.healthy():
                    assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
                    time.sleep(0.5)
            yield options
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.skipif(not SERVING, reason="pip install -e '.[serve]'")
def test_a_real_server_answers_sees_the_image_and_cannot_fake_a_score(server):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    pictures = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"), noise]
    with ChatClient(server) as client:
        said, tokens = [], []
        for picture in (*pictures, pictures[0]):
            before = client.counts["tokens_in"]
            said.append(client.ask([user_turn(picture, "what is it?")], str).text)
            tokens.append(client.counts["tokens_in"] - before)
        assert said[3] == said[0] and len(set(said)) == 3, "the image makes the answer"
        before = client.counts["tokens_in"]
        client.ask([user_turn("what is it?")], str)
        assert set(tokens) == {client.counts["tokens_in"] - before + 16}, "16 patches of the image are tokens"
        score = UnifiedReward(client, dict.fromkeys(("alignment", "coherence", "style"), 1.0)).global_score(noise, "x")
        assert score.missing and score.reason.startswith("reply: ")
        sample = Sample("a", 2, "a red circle", ("draw it", "again"), (pictures[0],))
        with pytest.raises(TeacherRefusal, match=r"reply: .* \(after 2 replies\)"):
            ChatTeacher(client, retries=1).proxy_prompt(sample)
        assert client.counts["failed"] == 0
