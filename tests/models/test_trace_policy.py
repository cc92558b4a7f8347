"""The plan of PPRL against real small models: what LoRA reaches, FLOPs as torch counts them, what is kept and held."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clvr_train.method.flow import squared_error
from clvr_train.models.adapters import OLD, POLICY, adapter_weights, add_policies, use
from clvr_train.models.conditioning import Conditioning, predict_velocity
from clvr_train.models.klein import decode_tokens, image_ids, text_ids
from clvr_train.models.trace import klein_shapes
from clvr_train.models.trace_policy import (
    _Held,
    add_policies_to_shapes,
    decoding_of,
    forward_of,
    trace_update,
)
from tests.models.test_plan import LAYERS, REFERENCES, TARGET, WINDOW, counted, kept_bytes

RANK, ALPHA = 4, 8
SIZES = {"window": WINDOW, "target": TARGET, "references": REFERENCES}


@pytest.mark.parametrize(("name", "reached", "linear"), [("klein_4b", 100, 109), ("klein_9b", 144, 153)])
def test_lora_reaches_every_block_of_the_published_models(name, reached, linear):
    transformer = klein_shapes(name)["transformer"]
    assert sum(isinstance(module, nn.Linear) for module in transformer.modules()) == linear
    plain = {path: module for path, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    add_policies_to_shapes(transformer, rank=32, alpha=64)
    weights = adapter_weights(transformer, POLICY)
    layers = {path.removesuffix(".lora_A.weight") for path in weights if path.endswith(".lora_A.weight")}
    assert len(layers) == reached
    assert {path for path in plain if "transformer_blocks." in path} == layers
    sizes = sum(32 * (plain[path].in_features + plain[path].out_features) for path in layers)
    assert sum(p.numel() for p in weights.values()) == sizes
    trained = [name for name, p in transformer.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * reached and all(f".{POLICY}." in name for name in trained)


@pytest.fixture
def policies(tiny_klein):
    klein = tiny_klein()
    klein.transformer.train()
    add_policies(klein.transformer, rank=RANK, alpha=ALPHA, seed=0)
    return klein


@pytest.fixture
def shapes(tiny_folder):
    parts = klein_shapes(str(tiny_folder), LAYERS, WINDOW)
    add_policies_to_shapes(parts["transformer"], rank=RANK, alpha=ALPHA)
    return parts


def inputs(klein, batch):
    config = klein.transformer.config
    references = torch.randn(batch, sum(map(math.prod, REFERENCES)), config.in_channels)
    text = torch.randn(batch, WINDOW, config.joint_attention_dim)
    cond = Conditioning(text, references, image_ids(TARGET, REFERENCES), text_ids(WINDOW), math.prod(TARGET))
    return torch.randn(batch, cond.num_target, config.in_channels), torch.rand(batch), cond


def loss_of(klein, batch, branches=1):
    x_t, t, cond = inputs(klein, batch)
    losses = []
    for _ in range(branches):
        v = predict_velocity(klein.transformer, torch.randn_like(x_t), t, cond)
        losses += [squared_error(v, torch.randn_like(x_t)) for _ in range(3)]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("branches", [1, 2])
def test_flops_are_those_that_torch_counts(policies, shapes, branches):
    """Of the policy forward and backward, of old and of the reference, exactly."""
    update = trace_update(shapes["transformer"], torch.float32, torch.float32, 2, branches=branches, **SIZES)
    assert update.trace.flops == counted(lambda: loss_of(policies, 2, branches))
    whole = counted(lambda: loss_of(policies, 2, branches).backward())
    assert update.trace.flops + update.backward == whole
    x_t, t, cond = inputs(policies, 2)
    for adapter, expected in ((OLD, update.trace.flops // branches), (None, update.reference)):
        with use(policies.transformer, adapter), torch.no_grad():
            assert counted(lambda: predict_velocity(policies.transformer, x_t, t, cond)) == expected
    forward = forward_of(shapes["transformer"], torch.float32, torch.float32, 2, **SIZES)
    assert forward.flops == update.trace.flops // branches > update.reference


@pytest.mark.parametrize("branches", [1, 2])
def test_activations_are_those_that_autograd_keeps(policies, shapes, branches):
    """To the byte; frozen layers keep no inputs, LoRA keeps its own."""
    update = trace_update(shapes["transformer"], torch.float32, torch.float32, 3, branches=branches, **SIZES)
    kept = kept_bytes(policies.transformer, lambda: loss_of(policies, 3, branches))
    assert update.trace.activations("none") == (kept, 0)


def test_float32_lora_on_bf16_weights_keeps_more_than_bf16_would(shapes):
    def kept(lora_dtype):
        update = trace_update(shapes["transformer"], torch.bfloat16, lora_dtype, 2, **SIZES)
        return sum(update.trace.activations("none"))

    assert kept(torch.float32) > kept(torch.bfloat16)


def test_what_decoding_takes_is_what_torch_counts(policies, shapes):
    found = decoding_of(shapes["vae"], torch.float32, 2, TARGET)
    tokens = torch.randn(2, math.prod(TARGET), policies.transformer.config.in_channels)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        pixels = decode_tokens(policies, tokens, TARGET)
    assert found.flops == counter.get_total_flops() and found.peak_bytes >= pixels.nbytes


def test_held_bytes_are_those_of_tensors_that_are_still_there():
    weight = torch.ones(100)
    with _Held() as held:
        a = weight * 2
        b = a.view(10, 10)
        assert (held.now, held.peak) == (400, 400)
        c = weight.view(10, 10)
        assert held.now == 400, "a view of what was there before"
        d = b + c
        del a
        assert held.now == 800, "b still holds it"
        del b, d
        assert (held.now, held.peak) == (0, 800)
        c.add_(1)
        assert held.now == 0


def test_a_forward_holds_less_than_it_would_keep(shapes):
    forward = forward_of(shapes["transformer"], torch.float32, torch.float32, 2, **SIZES)
    update = trace_update(shapes["transformer"], torch.float32, torch.float32, 2, **SIZES)
    assert 0 < forward.peak_bytes < sum(update.trace.activations("none"))
