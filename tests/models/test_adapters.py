"""Two policies on one set of weights: reach, equality at the start, switching, folding, files."""

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import (
    AVERAGE,
    OLD,
    POLICY,
    adapter_weights,
    add_policies,
    expected_lora_layers,
    fold,
    parameters,
    plain_copy,
    save_lora,
    use,
)
from clvr_train.models.conditioning import Conditioner, predict_velocity
from clvr_train.models.klein import check_kind, load_klein, save_klein


@pytest.mark.parametrize(("double", "single", "layers"), [(5, 20, 100), (8, 24, 144)])
def test_lora_reaches_every_block_layer_of_klein_4b_and_9b(double, single, layers):
    transformer = Flux2Transformer2DModel(
        num_layers=double, num_single_layers=single, attention_head_dim=8, num_attention_heads=2,
        in_channels=8, joint_attention_dim=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    add_policies(transformer, rank=2, alpha=4, seed=0)
    assert expected_lora_layers(transformer) == layers == len(adapter_weights(transformer, POLICY)) // 2


@pytest.fixture
def policies(tiny_klein):
    klein = tiny_klein()
    add_policies(klein.transformer, rank=4, alpha=8, seed=3)
    conditioner = Conditioner(klein, (96, 96))
    cond = conditioner.batch([Sample("a", 2, "goal", ("edit",), (Image.new("RGB", (96, 96), "red"),))] * 2)
    x, t = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    return klein, lambda: predict_velocity(klein.transformer, x, t, cond)


@torch.no_grad()
def test_policies_start_as_the_reference_and_then_part(policies):
    klein, velocity = policies
    start = velocity()
    for adapter in (OLD, AVERAGE, None):
        with use(klein.transformer, adapter):
            assert torch.equal(velocity(), start)
    for parameter in parameters(klein.transformer, POLICY):
        parameter.add_(0.1)
    moved = velocity()
    assert not torch.allclose(moved, start)
    for adapter in (OLD, AVERAGE, None):
        with use(klein.transformer, adapter):
            assert torch.equal(velocity(), start)
    assert torch.equal(velocity(), moved)


def test_switching_leaves_gradients_where_they_belong(policies):
    klein, velocity = policies
    with use(klein.transformer, OLD), torch.no_grad():
        velocity()
    with use(klein.transformer, None), torch.no_grad():
        velocity()
    velocity().sum().backward()
    trainable = [name for name, p in klein.transformer.named_parameters() if p.requires_grad]
    assert trainable and all(f".{POLICY}." in name for name in trainable)
    assert all(p.grad is None for p in parameters(klein.transformer, OLD))
    assert any(p.grad is not None for p in parameters(klein.transformer, POLICY))


@torch.no_grad()
def test_folded_weights_and_saved_lora_give_the_policys_velocity(policies, tmp_path):
    klein, velocity = policies
    for i, parameter in enumerate(parameters(klein.transformer, POLICY)):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    expected = velocity()
    save_klein(klein.folder, plain_copy(klein.transformer, fold(klein.transformer, POLICY)), tmp_path / "model")
    save_lora(klein.transformer, POLICY, tmp_path / "lora")
    conditioner = Conditioner(load_klein(tmp_path / "model", expect="base", window=48, layers=(1, 2, 3)), (96, 96))
    cond = conditioner.batch([Sample("a", 2, "goal", ("edit",), (Image.new("RGB", (96, 96), "red"),))] * 2)
    x, t = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    # Folding adds the product to the weight instead of to the output: rounding only, 3e-6 measured.
    assert torch.allclose(predict_velocity(conditioner.klein.transformer, x, t, cond), expected, atol=1e-4)
    for folder in (tmp_path / "lora", tmp_path / "lora" / "original"):  # under diffusers' names and the original ones
        pipe = Flux2KleinPipeline.from_pretrained(klein.folder)
        pipe.load_lora_weights(folder)
        assert torch.allclose(predict_velocity(pipe.transformer, x, t, cond), expected, atol=1e-4)
    original = load_file(tmp_path / "lora" / "original" / "lora.safetensors")
    assert {name.split(".")[1] for name in original} == {"double_blocks", "single_blocks"}


def test_kind_of_a_folder(tiny_folder, distilled_folder, tmp_path):
    assert check_kind(tiny_folder, "base") is False and check_kind(distilled_folder, None) is True
    with pytest.raises(ValueError, match="is_distilled is True: a distilled model, but a base one is needed"):
        check_kind(distilled_folder, "base")
    with pytest.raises(FileNotFoundError, match="model_index.json: not found"):
        check_kind(tmp_path, "base")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="'StableDiffusionPipeline', expected 'Flux2KleinPipeline'"):
        check_kind(tmp_path, "base")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        check_kind(tmp_path, "base")


def test_saved_precision_is_that_asked_for_and_loads_as_float32(tiny_klein, tmp_path):
    klein = tiny_klein()
    save_klein(klein.folder, klein.transformer, tmp_path / "model", precision="bf16")
    stored = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    loaded = load_klein(tmp_path / "model", expect="base", window=48, layers=(1, 2, 3)).transformer
    for name, tensor in klein.transformer.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor.bfloat16().float())
    with pytest.raises(ValueError, match="precision='fp8' is not one of fp32, bf16"):
        save_klein(klein.folder, klein.transformer, tmp_path / "other", precision="fp8")
    assert not (tmp_path / "other").exists()
