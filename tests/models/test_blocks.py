"""Checkpointed and compiled blocks compute what plain ones do, and checkpointing keeps what it says."""

import math

import pytest
import torch

from clvr_train.method.flow import flow_matching_loss
from clvr_train.models.blocks import CHECKPOINTING, blocks_of, checkpointed, compile_blocks, set_checkpointing
from clvr_train.models.conditioning import Conditioning, predict_velocity
from clvr_train.models.klein import image_ids, text_ids

WINDOW, TARGET = 48, (3, 3)


@pytest.fixture
def transformer(tiny_klein):
    return tiny_klein().transformer.requires_grad_(True).train()


def step(transformer, batch=2, references=()):
    """The loss of fixed inputs and the gradients."""
    source = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=source)

    config, tokens = transformer.config, sum(map(math.prod, references))
    given = randn(batch, tokens, config.in_channels) if references else None
    text = randn(batch, WINDOW, config.joint_attention_dim)
    cond = Conditioning(text, given, image_ids(TARGET, references), text_ids(WINDOW), math.prod(TARGET))
    x_t, x0, e = (randn(batch, cond.num_target, config.in_channels) for _ in range(3))
    v = predict_velocity(transformer, x_t, torch.linspace(0.2, 0.8, batch), cond)
    loss = flow_matching_loss(v, x0, e).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in transformer.parameters()]
    transformer.zero_grad()
    return loss.item(), gradients


def forwards(transformer):
    """How often every block runs in a step, forward and backward."""
    counts = [0] * len(blocks_of(transformer))

    def count(index):
        counts[index] += 1

    handles = [
        block.register_forward_pre_hook(lambda *_, index=index: count(index))
        for index, block in enumerate(blocks_of(transformer))
    ]
    step(transformer)
    for handle in handles:
        handle.remove()
    return counts


def test_checkpointing_runs_the_chosen_blocks_twice_and_changes_no_bit(transformer):
    loss, gradients = step(transformer)
    counts = {"none": [1, 1, 1], "selective": [2, 1, 2], "full": [2, 2, 2]}
    for kind in (*CHECKPOINTING, "none"):
        set_checkpointing(transformer, kind)
        assert forwards(transformer) == counts[kind]
        again, others = step(transformer)
        assert again == loss and all(a.equal(b) for a, b in zip(gradients, others, strict=True)), kind


def test_every_second_block_of_the_published_ones():
    assert [len(checkpointed(25, kind)) for kind in CHECKPOINTING] == [0, 13, 25]
    with pytest.raises(ValueError, match="checkpointing='some' is not one of none, selective, full"):
        checkpointed(25, "some")


def test_an_unknown_kind_is_refused(transformer):
    with pytest.raises(ValueError, match="checkpointing='some' is not one of"):
        set_checkpointing(transformer, "some")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, where it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_agree_with_plain_ones(transformer):
    """Other kernels sum in another order: measured 2e-7 of the largest gradient, the loss the same. Every second block
    is checkpointed too: as compiled as the others.
    """
    loss, gradients = step(transformer, references=[(2, 4)])
    set_checkpointing(transformer, "selective")
    compile_blocks(blocks_of(transformer))
    again, others = step(transformer, references=[(2, 4)])
    assert all(block._compiled_call_impl for block in blocks_of(transformer))
    assert again == pytest.approx(loss, rel=1e-5)
    largest = max(g.abs().max() for g in gradients)
    assert all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(gradients, others, strict=True))
