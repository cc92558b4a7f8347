"""The plan against real models: parameters, bytes tensor by tensor, FLOPs as torch counts them, what autograd keeps."""

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from clvr_train.method.flow import flow_matching_loss
from clvr_train.models.blocks import CHECKPOINTING, set_checkpointing
from clvr_train.models.conditioning import Conditioning, predict_velocity
from clvr_train.models.klein import image_ids, load_klein, text_ids
from clvr_train.models.plan import (
    ENGINES,
    GPUS,
    OFFLOADS,
    OPTIMIZERS,
    PRECISIONS,
    Settings,
    bytes_per_gpu,
    cheapest_fit,
    micro_batches,
    model_bytes,
    state_bytes,
)
from clvr_train.models.trace import (
    Trace,
    count_parameters,
    encoder_flops,
    klein_shapes,
    trace_transformer,
    trace_vlm,
    vlm_shapes,
)
from clvr_train.runtime.engine import Engine

CONTROLLER = Path(__file__).resolve().parents[2] / "models/shapes/controller"
LAYERS, WINDOW, TARGET, REFERENCES = (1, 2, 3), 48, (3, 3), [(2, 4), (3, 3)]
TOKENS, IMAGES, IMAGE_PX = 40, 2, (64, 96)


def conditions(klein, batch):
    """Random conditions of the shapes above, with the noisy target and the times."""
    config = klein.transformer.config
    references = torch.randn(batch, sum(map(math.prod, REFERENCES)), config.in_channels)
    text = torch.randn(batch, WINDOW, config.joint_attention_dim)
    ids = image_ids(TARGET, REFERENCES), text_ids(WINDOW)
    cond = Conditioning(text, references, *ids, math.prod(TARGET))
    return torch.randn(batch, cond.num_target, config.in_channels), torch.rand(batch), cond


def loss_of(klein, batch):
    x_t, t, cond = conditions(klein, batch)
    v = predict_velocity(klein.transformer, x_t, t, cond)
    return flow_matching_loss(v, x_t, x_t.flip(0)).sum()


@pytest.fixture
def trained(tiny_klein):
    klein = tiny_klein()
    klein.transformer.requires_grad_(True).train()
    return klein


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    config = Qwen3VLConfig.from_dict(json.loads((CONTROLLER / "config.json").read_text()))
    return Qwen3VLForConditionalGeneration(config).train()


def vlm_inputs(model, batch):
    """Conversations whose images come first."""
    grid = [1, IMAGE_PX[0] // 16, IMAGE_PX[1] // 16]
    patches, visual = math.prod(grid), math.prod(grid) // 4
    ids = torch.randint(0, 500, (batch, TOKENS))
    kinds = torch.zeros_like(ids)
    for start in range(1, IMAGES * (visual + 1), visual + 1):  # a token of text before each
        ids[:, start : start + visual], kinds[:, start : start + visual] = model.config.image_token_id, 1
    return {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(batch * IMAGES * patches, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([grid] * (batch * IMAGES)),
        "use_cache": False,
    }


def kept_bytes(module, forward):
    """Bytes of the distinct storages that autograd keeps, but for the module's own."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(storage)  # else its address could come again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(number for key, number in kept.items() if key not in own)


# ---------------------------------------------------------------------------- parameters and bytes


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoder"),
    [("klein_4b", 3.876e9, 3.114e9), ("klein_9b", 9.079e9, 5.832e9)],
)
def test_published_klein_have_their_published_sizes(name, transformer, text_encoder):
    parts = klein_shapes(name)
    assert all(p.device.type == "meta" for part in parts.values() for p in part.parameters())
    assert count_parameters(parts["transformer"]) == pytest.approx(transformer, rel=2e-4)
    assert count_parameters(parts["text_encoder"]) == pytest.approx(text_encoder, rel=2e-4)
    assert count_parameters(parts["vae"]) == pytest.approx(84.05e6, rel=2e-4)


def test_the_published_vlm_has_its_published_size():
    assert count_parameters(vlm_shapes("qwen3vl_8b")) == pytest.approx(8.767e9, rel=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_a_loaded_folder(tiny_folder, dtype):
    klein = load_klein(tiny_folder, expect="base", window=WINDOW, layers=LAYERS, dtype=dtype)
    for name, shapes in klein_shapes(str(tiny_folder), LAYERS, WINDOW).items():
        real = getattr(klein, name)
        tensors = {id(tensor): tensor for tensor in (*real.parameters(), *real.buffers())}
        assert count_parameters(shapes) == count_parameters(real)
        assert model_bytes(shapes, dtype) == sum(tensor.nbytes for tensor in tensors.values()), name


def test_a_vlm_folder_has_the_parameters_of_the_model(vlm):
    shapes = vlm_shapes(str(CONTROLLER))
    assert count_parameters(shapes) == count_parameters(vlm) == sum(p.numel() for p in vlm.parameters())
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in vlm.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_states"])
def test_states_are_those_of_a_real_adamw(trained, precision):
    """Tensor by tensor: weights, gradients, moments, step counts, master weights."""
    dtype = Settings(precision=precision).dtype
    model = copy.deepcopy(trained.transformer).to(dtype)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    stepped, master = parameters, []
    if precision == "bf16":
        stepped = master = [p.detach().float() for p in parameters]
        for p in stepped:
            p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(stepped)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()] + master
    found = state_bytes(parameters, 0, Settings(precision=precision))
    assert found == {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters),
        "optimizer": sum(value.nbytes for value in held),
        "host": 0,
    }


# GB of klein 4B, klein 9B and Qwen3-VL 8B, from 16, 12, 10 and 8 bytes a parameter, and 8 GPUs.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (62.0, 145.3, 140.3)),
        ({"optimizer": "adamw_bf16"}, (46.5, 108.9, 105.2)),
        ({"optimizer": "adamw8bit"}, (38.8, 90.8, 87.7)),
        ({"precision": "bf16_states"}, (31.0, 72.6, 70.1)),
        ({"engine": "ddp", "gpus": 8}, (62.0, 145.3, 140.3)),
        ({"engine": "zero1", "gpus": 8}, (21.3, 49.9, 48.2)),
        ({"engine": "zero2", "gpus": 8}, (14.5, 34.0, 32.9)),
        ({"engine": "zero3", "gpus": 8}, (7.8, 18.2, 17.5)),
    ],
)
def test_states_of_the_published_models(published, settings, expected):
    for parameters, gigabytes in zip(published, expected, strict=True):
        held = state_bytes(parameters, 0, Settings(**{"precision": "bf16", **settings}))
        # 8 bits: the scales of blocks take 1/64 byte more a value and moment
        assert sum(held.values()) / 1e9 == pytest.approx(gigabytes, abs=0.4 if "optimizer" in settings else 0.06)


@pytest.fixture(scope="module")
def published():
    models = klein_shapes("klein_4b")["transformer"], klein_shapes("klein_9b")["transformer"], vlm_shapes("qwen3vl_8b")
    return [list(model.parameters()) for model in models]


def test_shards_together_are_the_whole_and_what_is_frozen_is_not_split(trained):
    parameters = list(trained.transformer.parameters())
    whole = state_bytes(parameters, 1000, Settings(precision="bf16"))
    for stage, kinds in enumerate([(), ("optimizer",), ("optimizer", "gradients"), tuple(whole)]):
        engine = ENGINES[stage + 1]
        part = state_bytes(parameters, 1000, Settings(engine=engine, gpus=3, precision="bf16"))
        for kind in ("weights", "gradients", "optimizer"):
            frozen = 1000 if kind == "weights" else 0
            shards = 3 if kind in kinds else 1
            assert part[kind] - frozen == math.ceil((whole[kind] - frozen) / shards), (engine, kind)


@pytest.mark.parametrize(("engine", "more"), [("zero1", 4 + 4), ("zero2", 4 + 8), ("zero3", 4)])
def test_offload_moves_the_optimizer_to_the_host(trained, engine, more):
    """With what DeepSpeed's step needs there."""
    parameters = list(trained.transformer.parameters())
    at_home = state_bytes(parameters, 0, Settings(engine=engine, gpus=2))
    away = state_bytes(parameters, 0, Settings(engine=engine, gpus=2, offload="optimizer"))
    extra = math.ceil(more * sum(p.numel() for p in parameters) / 2)
    assert away == at_home | {"optimizer": 0, "host": at_home["optimizer"] + extra}
    layer = [torch.empty(512, 512)]
    host = state_bytes(layer, 0, Settings(engine=engine, precision="bf16", offload="optimizer"))["host"]
    counted = {"zero1": 18, "zero2": 20, "zero3": 16}  # bytes a parameter of DeepSpeed 0.19.8
    assert host == counted[engine] * 512**2 + 4


def test_8_bit_moments_have_a_scale_for_256_values_and_small_tensors_stay_whole():
    settings = Settings(precision="bf16_states", optimizer="adamw8bit")
    assert state_bytes([torch.empty(4095)], 0, settings)["optimizer"] == 8 * 4095
    assert state_bytes([torch.empty(4097)], 0, settings)["optimizer"] == 2 * (4097 + 4 * 17)


# ---------------------------------------------------------------------------- FLOPs


def counted(run):
    """FLOPs by torch's own counter; with the kernel of attention that is made of plain products, which it counts."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_of_the_transformer_are_those_that_torch_counts(trained, tiny_folder, batch):
    """Forward exactly; forward and backward exactly three times that, less the gradients of the inputs, which none
    needs: of images, texts and times.
    """
    shapes = klein_shapes(str(tiny_folder), LAYERS, WINDOW)["transformer"]
    trace = trace_transformer(shapes, torch.float32, batch, WINDOW, TARGET, REFERENCES)
    assert trace.flops == counted(lambda: loss_of(trained, batch))
    images = sum(map(math.prod, (TARGET, *REFERENCES)))
    rows = {"x_embedder": images, "context_embedder": WINDOW, "time_guidance_embed.timestep_embedder.linear_1": 1}
    unused = sum(2 * batch * n * trained.transformer.get_submodule(name).weight.numel() for name, n in rows.items())
    assert 3 * trace.flops - unused == counted(lambda: loss_of(trained, batch).backward())
    blocks = sum(trace.block_flops)
    assert [trace.recomputed_flops(kind) for kind in ("none", "full")] == [0, blocks]
    assert 0.3 * blocks < trace.recomputed_flops("selective") < 0.8 * blocks < 0.8 * trace.flops


def test_flops_of_the_vlm_are_those_that_torch_counts(vlm):
    """Forward exactly; forward and backward exactly three times that, less the gradient of the pixels."""
    trace = trace_vlm(vlm_shapes(str(CONTROLLER)), torch.float32, 2, TOKENS, IMAGES, IMAGE_PX)
    inputs = vlm_inputs(vlm, 2)
    assert trace.flops == counted(lambda: vlm(**inputs))
    unused = 2 * len(inputs["pixel_values"]) * vlm.model.visual.patch_embed.proj.weight.numel()
    assert 3 * trace.flops - unused == counted(lambda: vlm(**inputs).logits.sum().backward())
    assert trace.frozen_flops == 0


def test_a_frozen_tower_keeps_nothing_and_counts_once():
    shapes = vlm_shapes(str(CONTROLLER))
    sizes = torch.float32, 1, TOKENS, IMAGES, IMAGE_PX
    trained, frozen = trace_vlm(shapes, *sizes), trace_vlm(shapes, *sizes, train_vision=False)
    without = trace_vlm(shapes, torch.float32, 1, TOKENS)
    assert frozen.flops == trained.flops and frozen.frozen_flops == trained.flops - without.flops > 0
    tower = len(shapes.model.visual.blocks)
    assert not any(frozen.block_saved[:tower]) and all(trained.block_saved[:tower])


def test_flops_of_the_encoders_are_those_that_torch_counts(tiny_klein, tiny_folder):
    klein = tiny_klein()
    text, image = encoder_flops(klein_shapes(str(tiny_folder), LAYERS, WINDOW), WINDOW, [(96, 64)])
    ids = torch.zeros(1, WINDOW, dtype=torch.long)
    with torch.no_grad():
        assert text == counted(lambda: klein.text_encoder(input_ids=ids, use_cache=False))
        assert image == counted(lambda: klein.vae.encode(torch.randn(1, 3, 96, 64)))


def test_flops_and_activations_of_klein_4b_are_the_known_ones():
    """512 px, no reference: 26 h^2 n + 4 h n^2 in each of 25 blocks; 64 h and 62 h bytes a token in bf16."""
    n, h = 1024 + 512, 3072
    trace = trace_transformer(klein_shapes("klein_4b")["transformer"], torch.bfloat16, 1, 512, (32, 32))
    assert sum(trace.block_flops) == 25 * (26 * n * h**2 + 4 * n**2 * h)
    assert trace.flops / 1e12 == pytest.approx(10.17, abs=0.01)
    kept, again = trace.activations("none")
    assert kept == pytest.approx(n * h * (5 * 64 + 20 * 62), rel=0.01) and again == 0


# ---------------------------------------------------------------------------- activations


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_activations_of_the_transformer_are_those_that_autograd_keeps(trained, tiny_folder, kind):
    """To the byte. Where all blocks are checkpointed they hold the rotary tables, which autograd is not shown."""
    shapes = klein_shapes(str(tiny_folder), LAYERS, WINDOW)["transformer"]
    trace = trace_transformer(shapes, torch.float32, 4, WINDOW, TARGET, REFERENCES)
    tables = 0
    set_checkpointing(trained.transformer, kind)
    if kind == "full":
        length = WINDOW + sum(map(math.prod, (TARGET, *REFERENCES)))
        tables = 2 * 4 * length * trained.transformer.config.attention_head_dim
    kept = kept_bytes(trained.transformer, lambda: loss_of(trained, 4))
    assert trace.activations(kind)[0] - tables == kept


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name is young
@pytest.mark.parametrize("kind", ["none", "full"])
def test_activations_of_the_vlm_are_those_that_autograd_keeps(vlm, kind):
    """To the byte. Checkpointed blocks also hold rotary tables and positions, which autograd is not shown."""
    batch, trace = 2, trace_vlm(vlm_shapes(str(CONTROLLER)), torch.float32, 2, TOKENS, IMAGES, IMAGE_PX)
    model, tables = copy.deepcopy(vlm), 0
    if kind == "full":
        model.gradient_checkpointing_enable()
        patches = batch * IMAGES * math.prod(IMAGE_PX) // 16**2
        tables = 2 * 4 * 32 * (batch * TOKENS + patches) + 8 * TOKENS
    kept = kept_bytes(model, lambda: model.model(**vlm_inputs(model, batch)))
    assert trace.activations(kind)[0] - tables == kept


def test_a_recomputed_block_adds_what_it_keeps_but_for_its_inputs(trained, tiny_folder):
    """The largest block alone, run for itself; the double block is larger than the single ones."""
    klein, batch = trained, 4
    shapes = klein_shapes(str(tiny_folder), LAYERS, WINDOW)["transformer"]
    trace = trace_transformer(shapes, torch.float32, batch, WINDOW, TARGET)
    config, h = klein.transformer.config, klein.transformer.inner_dim
    text, image = (torch.randn(batch, n, h, requires_grad=True) for n in (WINDOW, 9))
    modulation = torch.randn(batch, 6 * h, requires_grad=True)
    tables = tuple(torch.randn(WINDOW + 9, config.attention_head_dim) for _ in range(2))
    block = klein.transformer.transformer_blocks[0]
    kept = kept_bytes(block, lambda: block(image, text, modulation, modulation, tables))
    held = sum(tensor.nbytes for tensor in (text, image, modulation, *tables))
    assert trace.activations("full")[1] == kept - held


def test_checkpointing_lies_between_none_and_full(tiny_folder):
    shapes = klein_shapes(str(tiny_folder), LAYERS, WINDOW)["transformer"]
    trace = trace_transformer(shapes, torch.float32, 2, WINDOW, TARGET)
    none, selective, full = (sum(trace.activations(kind)) for kind in ("none", "selective", "full"))
    assert full < selective < none


# ---------------------------------------------------------------------------- what fits


def sized(bytes_a_sample, micro_batch):
    """A trace of four blocks that keep all, their inputs a tenth of it."""
    block = bytes_a_sample * micro_batch // 4
    return Trace(0, 0, {}, [0] * 4, [{i: block} for i in range(4)], [{-i - 1: block // 10} for i in range(4)])


def change(limit, settings, number=10**6, activations=8 * 10**6):
    parameters = [torch.empty(number, device="meta")]

    def fits(chosen):
        held, _ = bytes_per_gpu(parameters, 0, sized(activations, chosen.micro_batch), chosen)
        return held["total"] <= limit

    return cheapest_fit(settings, fits)


@pytest.mark.parametrize(
    ("limit", "settings", "expected"),
    [
        (24.1e6, {}, {}),
        (22.5e6, {}, {"checkpointing": "selective"}),
        (19e6, {}, {"checkpointing": "full"}),
        (18.1e6, {}, {"optimizer": "adamw8bit"}),
        (12.9e6, {}, {"checkpointing": "full", "optimizer": "adamw8bit"}),  # the host alone would do, and is slow
        (12.5e6, {"engine": "ddp", "gpus": 8}, {"engine": "zero2"}),
        (11e6, {"engine": "zero2", "gpus": 8}, {"checkpointing": "selective"}),
        (6e6, {"engine": "ddp", "gpus": 8}, {"checkpointing": "full", "engine": "zero3"}),
        (22e6, {"checkpointing": "full", "optimizer": "adamw8bit", "micro_batch": 8}, {"micro_batch": 4}),
        (9e6, {"checkpointing": "full"}, {"engine": "zero1", "offload": "optimizer"}),  # one GPU
        (9e6, {"checkpointing": "full", "engine": "zero1"}, {"offload": "optimizer"}),
        (4e6, {"checkpointing": "full", "engine": "zero3", "gpus": 8}, {"offload": "optimizer"}),
        (5e6, {"checkpointing": "full", "optimizer": "adamw8bit"}, None),  # 8-bit moments cannot be on the host
    ],
)
def test_the_cheapest_change_comes_first(limit, settings, expected):
    """16 MB of states and 8 MB of activations a sample: none 8, selective 6.4, full 2.8."""
    assert change(limit, Settings(**{"precision": "bf16", **settings})) == expected


def test_combinations_are_those_of_the_engine():
    """What it refuses is refused here, and no other; it is built where that takes no DeepSpeed."""
    for name, precision, optimizer, offload in itertools.product(ENGINES, PRECISIONS, OPTIMIZERS, OFFLOADS):
        chosen = {"precision": precision, "optimizer": optimizer, "offload": offload}

        def build(name=name, chosen=chosen):
            Engine(torch.nn.Linear(2, 2), name=name, lr=0.1, total_steps=1, **chosen)

        try:
            Settings(engine=name, **chosen)
        except ValueError:
            with pytest.raises(ValueError, match="engine"):
                build()
        else:
            if not name.startswith("zero"):
                build()


def test_an_average_of_the_weights_is_shared(trained):
    parameters = list(trained.transformer.parameters())
    number = sum(p.numel() for p in parameters)
    for settings in (Settings(engine="ddp", gpus=3), Settings(engine="zero2", gpus=3, offload="optimizer")):
        without = state_bytes(parameters, 0, settings)
        assert state_bytes(parameters, 0, dataclasses.replace(settings, ema=True)) == without | {
            "optimizer": without["optimizer"] + math.ceil(4 * number / 3)
        }


def test_a_plan_says_what_is_wrong():
    with pytest.raises(ValueError, match="engine='zero4' is not one of single"):
        Settings(engine="zero4")
    with pytest.raises(ValueError, match="gpus=2: engine=single has one"):
        Settings(gpus=2)
    with pytest.raises(ValueError, match="optimizer=adamw8bit, engine=zero2: 8-bit moments need engine=single or ddp"):
        Settings(engine="zero2", optimizer="adamw8bit")
    with pytest.raises(ValueError, match="offload=optimizer, engine=ddp: only zero1, zero2, zero3 can"):
        Settings(engine="ddp", offload="optimizer")
    with pytest.raises(ValueError, match=r"train.batch=9: must be a multiple of gpus=2"):
        micro_batches(9, Settings(engine="ddp", gpus=2))
    with pytest.raises(FileNotFoundError, match="give a model's folder or one of klein_4b"):
        vlm_shapes("nowhere")
    with pytest.raises(ValueError, match="tokens=4: 2 images of 64 x 96 px alone have 12"):
        trace_vlm(vlm_shapes(str(CONTROLLER)), torch.float32, 1, 4, IMAGES, IMAGE_PX)
    assert all(gpu.memory_bytes > 70 * 2**30 for gpu in GPUS.values())
