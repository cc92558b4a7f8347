"""Merged evaluation: parity with merge_weights, nothing of the training touched, counted, the same for any batch."""

import pytest
import torch
from PIL import Image

from clvr_train.method.score import ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import AVERAGE, POLICY, add_policies, fold, parameters, plain_copy, policy_weights
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.klein import load_klein, save_klein
from clvr_train.models.merge import Weights, merge_transformers, open_sources
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.merged import MergedEvaluation, hold_back, merged_transformer
from clvr_train.pprl.tasks import Task
from clvr_train.runtime.distributed import World

RED = Image.new("RGB", (96, 96), "red")


def moved(folder, target, seed, distilled=False, precision="fp32"):
    """A Klein folder whose transformer's weights are moved at random."""
    klein = load_klein(folder, expect=None, window=48, layers=(1, 2, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in klein.transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_klein(folder, klein.transformer, target, distilled=distilled, precision=precision)
    return target


@pytest.fixture
def setting(tiny_folder, tmp_path):
    """Base and distilled models in bfloat16, and a policy that has moved over an SFT model."""
    base = moved(tiny_folder, tmp_path / "base", 1, precision="bf16")
    distilled = moved(tiny_folder, tmp_path / "distilled", 2, distilled=True, precision="bf16")
    klein = load_klein(moved(tiny_folder, tmp_path / "sft", 3), expect="base", window=48, layers=(1, 2, 3))
    add_policies(klein.transformer, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for number, adapter in enumerate((POLICY, AVERAGE)):
            for i, parameter in enumerate(parameters(klein.transformer, adapter)):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * number + i))
                parameter.add_(0.1 * noise)
    return klein, base, distilled


def tasks(number=5):
    alone = [Task(Sample(f"a{i}", 1, f"goal {i}", ("r",)), ProxyPrompt("p")) for i in range(number - 2)]
    edits = [Task(Sample(f"b{i}", 2, "goal", ("r", "s"), (RED,)), ProxyPrompt("p", "e", (1,))) for i in range(2)]
    return alone[:1] + edits + alone[1:]


def brightness(generation, task):
    if task.sample.trajectory_id == "a1":
        return Score(None, "the judge failed")
    return Score(sum(generation.image.convert("L").tobytes()) / 255 / 96 / 96)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_merge_is_that_of_the_recipe_on_the_saved_model_to_the_last_bit(setting, tmp_path, dtype):
    klein, base, distilled = setting
    folded = fold(klein.transformer, AVERAGE)
    streamed = dict(policy_weights(klein.transformer, AVERAGE))
    assert streamed.keys() == folded.keys() and all(streamed[name].equal(folded[name]) for name in folded)
    save_klein(klein.folder, plain_copy(klein.transformer, folded), tmp_path / "model")
    sources = open_sources(base, distilled, tmp_path / "model")
    merge_transformers(sources, 0.9, 1.1, tmp_path / "merged", dtype)
    expected = Weights(tmp_path / "merged")
    found = merged_transformer(
        klein.transformer, Weights(base / "transformer"), Weights(distilled / "transformer"),
        alpha_distill=0.9, alpha_align=1.1, dtype=dtype,
    ).state_dict()  # fmt: skip
    assert found.keys() == expected.shapes.keys()
    assert expected.read(next(iter(found))).dtype == (dtype or torch.bfloat16)
    for name, tensor in found.items():
        assert tensor.equal(expected.read(name).float()), name
    assert not all(found[name].equal(folded[name]) for name in found)


def test_images_are_those_of_the_merged_folder_and_the_training_is_left_alone(setting, tmp_path):
    klein, base, distilled = setting
    conditioner = Conditioner(klein, (96, 96))
    evaluation = MergedEvaluation(conditioner, base, distilled, tasks(), World(), steps=4, seed=7, batch=2)
    transformer = klein.transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    asks = [(name, p.requires_grad) for name, p in transformer.named_parameters()]
    calls = []
    hook = transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    random_state = torch.get_rng_state()
    merged = evaluation(brightness)
    hook.remove()
    assert not calls and torch.get_rng_state().equal(random_state)
    assert all(tensor.equal(before[name]) for name, tensor in transformer.state_dict().items())
    assert [(name, p.requires_grad) for name, p in transformer.named_parameters()] == asks
    assert not transformer.training and all(p.grad is None for p in transformer.parameters())
    assert transformer.active_adapters() == [POLICY]

    save_klein(klein.folder, plain_copy(transformer, fold(transformer, AVERAGE)), tmp_path / "model")
    sources = open_sources(base, distilled, tmp_path / "model")
    save_klein(klein.folder, load_klein(distilled, expect=None, window=48, layers=(1, 2, 3)).transformer,
               tmp_path / "written", distilled=True)  # fmt: skip
    for file in (tmp_path / "written" / "transformer").iterdir():
        file.unlink()
    (tmp_path / "written" / "transformer").rmdir()
    merge_transformers(sources, 1.0, 1.0, tmp_path / "written" / "transformer")
    written = load_klein(tmp_path / "written", expect="distilled", window=48, layers=(1, 2, 3))
    sampler = Sampler(Conditioner(written, (96, 96)), steps=4, cfg=1.0, batch=2)
    samples = [task.sample for task in tasks()]
    images = sampler.draw(samples, [("merged", 7, *sample.key) for sample in samples])
    assert [merged.images[i].tobytes() for i in range(5)] == [image.tobytes() for image in images]
    values = [merged.scores[i].value for i in range(5)]
    assert values[3] is None and merged.metrics["merged_missing"] == pytest.approx(1 / 5)
    assert merged.metrics["merged_score"] == pytest.approx(sum(v for v in values if v is not None) / 4)
    assert merged.metrics["merged_nfe"] == evaluation.nfe == 5 * 4 == sampler.nfe


def test_ranks_share_the_images_and_scores_do_not_depend_on_their_number(setting):
    klein, base, distilled = setting
    conditioner = Conditioner(klein, (96, 96))
    alone = MergedEvaluation(conditioner, base, distilled, tasks(), World(), batch=2)(brightness)
    parts = [
        MergedEvaluation(conditioner, base, distilled, tasks(), World(rank, 2), batch=2)(brightness)
        for rank in range(2)  # without a group: each gathers from itself alone
    ]
    assert all(part.images for part in parts)
    assert {i for part in parts for i in part.images} == set(range(5))
    for part in parts:
        assert all(part.scores[i] == alone.scores[i] for i in part.scores)


def test_what_cannot_be_merged_is_refused_at_the_start(setting, tiny_folder):
    klein, base, distilled = setting
    conditioner = Conditioner(klein, (96, 96))
    with pytest.raises(ValueError, match="is_distilled is False: a base model, but a distilled one is needed"):
        MergedEvaluation(conditioner, base, base, tasks(), World())
    with pytest.raises(FileNotFoundError, match=r"model_index\.json: not found"):
        MergedEvaluation(conditioner, base, base / "none", tasks(), World())
    with pytest.raises(ValueError, match="no validation tasks"):
        MergedEvaluation(conditioner, base, distilled, [], World())


def test_validation_tasks_are_of_trajectories_that_are_not_trained_on():
    image = Image.new("RGB", (96, 96))
    every = [
        Task(Sample(f"t{i}", k, "g", ("r",) * k, (image,) * (k - 1)), ProxyPrompt("p"))
        for i in range(9)
        for k in (1, 2)
    ]
    training, validation = hold_back(every, 5, seed=0)
    assert len(validation) == 6 and len(training) == 12
    assert not {t.sample.trajectory_id for t in training} & {t.sample.trajectory_id for t in validation}
    assert hold_back(every[::-1], 5, seed=0)[1] == validation[::-1]
    assert hold_back(every, 5, seed=1)[1] != validation
    assert hold_back(every, 0, seed=0) == (every, [])
    with pytest.raises(ValueError, match="18 tasks for validation: none of the 18 would be left"):
        hold_back(every, 18, seed=0)
