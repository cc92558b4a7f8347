"""Of the text encoder only what is used is read and run, and its states are those of the whole one."""

import shutil

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from clvr_train.models.klein import encode_text, fingerprint, load_klein
from clvr_train.models.trace import count_parameters, klein_shapes

WINDOW = 48
TEXTS = ["", "a red circle left of a blue square", "draw it . " * 12]


def load(folder, layers=(1, 2, 3), window=WINDOW, dtype=torch.float32):
    return load_klein(folder, expect="base", window=window, layers=layers, dtype=dtype)


def whole_encoder(folder, dtype):
    return Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [(1, 2, 3), (3, 1, 2), (1, 2, 2), (2, 3, 4)])
def test_states_are_those_of_the_whole_encoder_bit_for_bit(tiny_folder, layers, dtype):
    """(2, 3, 4) ends on the last layer, behind which the whole encoder has its norm."""
    klein, whole = load(tiny_folder, layers, dtype=dtype), whole_encoder(tiny_folder, dtype)
    assert len(klein.text_encoder.layers) == max(layers)
    with torch.no_grad():
        upstream = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            whole, klein.tokenizer, TEXTS, max_sequence_length=WINDOW, hidden_states_layers=layers
        )
    ours = encode_text(klein, TEXTS)
    assert ours.dtype == upstream.dtype == dtype and ours.equal(upstream)
    assert not ours[0].equal(ours[1])


def test_what_is_not_used_is_neither_held_nor_run(tiny_folder):
    klein, whole = load(tiny_folder, (1, 2, 2)), whole_encoder(tiny_folder, torch.float32)
    layer = sum(p.numel() for p in whole.model.layers[0].parameters())
    unused = 2 * layer + whole.lm_head.weight.numel() + whole.model.norm.weight.numel()
    assert whole.lm_head.weight is not whole.model.embed_tokens.weight
    assert count_parameters(klein.text_encoder) == count_parameters(whole) - unused
    run = []
    for name, module in klein.text_encoder.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: run.append(name))
    encode_text(klein, ["a"])
    assert run and not [name for name in run if name.startswith(("layers.2.", "layers.3.", "lm_head"))]


def test_the_cache_key_is_of_the_whole_files_still(tiny_folder):
    """States cached before are hits: the key is of files, layers and window, and the bits are the same."""
    parts = "text_encoder", "tokenizer"
    assert fingerprint(load(tiny_folder).folder, parts) == fingerprint(tiny_folder, parts)


def test_9b_holds_three_quarters_of_the_layers_and_no_head():
    encoder = klein_shapes("klein_9b")["text_encoder"]
    whole = Qwen3Config.from_dict(encoder.config.to_dict() | {"num_hidden_layers": 36, "layer_types": None})
    with torch.device("meta"):
        model = Qwen3ForCausalLM(whole)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert count_parameters(model) - count_parameters(encoder) == 9 * layer + 151936 * 4096 + 4096


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1025}, r"model.window=1025: .*text_encoder takes at most 1024 tokens \(max_position_embeddings\)"),
        ({"layers": (1, 2, 9)}, r"model.layers=\[1, 2, 9\]: .*text_encoder has 4 layers"),
        ({"layers": (1, 2)}, r"gives 2 states of 32 numbers, the transformer takes 96"),
        ({"layers": (0, 0, 0)}, r"model.layers=\[0, 0, 0\]: expected numbers"),
        ({"layers": (-1, 2, 3)}, r"model.layers=\[-1, 2, 3\]: expected numbers"),
    ],
)
def test_choices_that_the_encoder_does_not_have(tiny_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load(tiny_folder, **options)
    with pytest.raises(ValueError, match=message):
        klein_shapes(str(tiny_folder), **{"layers": (1, 2, 3), "window": WINDOW} | options)


def test_the_whole_window_of_the_encoder_can_be_used(tiny_folder):
    assert encode_text(load(tiny_folder, window=1024), ["a red circle"]).shape == (1, 1024, 96)


def test_a_folder_that_lacks_a_used_tensor_is_refused_and_one_that_lacks_an_unused_one_is_not(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    file = tmp_path / "model/text_encoder/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    load(tmp_path / "model")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder: has no tensor layers.2.mlp.up_proj.weight"):
        load(tmp_path / "model")


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_a_folder_without_a_part_is_refused(tiny_folder, tmp_path, part):
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(FileNotFoundError, match=f"incomplete model folder .no {part}/config.json"):
        load(tmp_path / "model")
