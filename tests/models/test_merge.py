"""The streamed merge: the equation on whole tensors, shards, LoRA, refusals, memory."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from clvr_train.method.merge import merge_tensor
from clvr_train.models import merge
from clvr_train.models.adapters import POLICY, add_policies, fold, parameters, plain_copy, save_lora
from clvr_train.models.klein import load_klein, publish_klein, save_klein
from clvr_train.models.merge import Weights, merge_transformers, open_sources

ONE_FILE = "diffusion_pytorch_model.safetensors"


def moved(folder, target, seed, scale=0.05):
    """A copy of a Klein folder whose transformer's weights are moved at random."""
    klein = load_klein(folder, expect=None, window=48, layers=(1, 2, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in klein.transformer.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    save_klein(folder, klein.transformer, target)
    return target


def in_shards(folder, target, number):
    """A copy of a Klein folder whose transformer is in several files."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "transformer" / ONE_FILE)
    (target / "transformer" / ONE_FILE).unlink()
    weight_map = {}
    for part in range(number):
        name = f"diffusion_pytorch_model-{part + 1:05d}-of-{number:05d}.safetensors"
        own = {key: tensors[key] for key in list(tensors)[part::number]}
        save_file(own, target / "transformer" / name)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return target


@pytest.fixture
def folders(tiny_folder, tmp_path):
    return tiny_folder, moved(tiny_folder, tmp_path / "distilled", 1), moved(tiny_folder, tmp_path / "aligned", 2)


def transformer_of(folder):
    return {name: weights.read(name) for weights in [Weights(folder)] for name in weights.shapes}


@pytest.mark.parametrize("chunk", [7, 2**21])
def test_streamed_merge_is_the_equation_and_loads(folders, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(merge, "CHUNK", chunk)
    base, distilled, aligned = folders
    sharded = in_shards(base, tmp_path / "sharded", 3)
    sources = open_sources(sharded, distilled, in_shards(aligned, tmp_path / "a", 2))
    reports = []

    def write(folder):
        reports.append(merge_transformers(sources, 0.7, 1.2, folder))

    publish_klein(sharded, tmp_path / "merged", write, distilled=True)
    w, d, a = (transformer_of(folder / "transformer") for folder in folders)
    merged = load_klein(tmp_path / "merged", expect="distilled", window=48, layers=(1, 2, 3)).transformer.state_dict()
    assert merged.keys() == w.keys()
    for name in w:
        assert torch.equal(merged[name], merge_tensor(w[name], d[name], a[name], 0.7, 1.2)), name
    assert sorted(path.name for path in (tmp_path / "merged" / "transformer").iterdir()) == sorted(
        path.name for path in (sharded / "transformer").iterdir()
    )
    norms = [sum(x.double().square().sum() for x in xs) ** 0.5 for xs in (w.values(), [d[n] - w[n] for n in w])]
    assert reports[0]["total"]["shift_distill"] == pytest.approx(float(norms[1] / norms[0]), rel=1e-6)
    assert set(reports[0]["kinds"]) == {"double", "single", "outside"}
    assert set(reports[0]["blocks"]) == {f"single_transformer_blocks.{i}" for i in range(2)} | {"transformer_blocks.0"}


def test_zero_deltas_give_the_base_bit_for_bit_and_dtype_is_by_choice(tiny_folder, tmp_path):
    sources = open_sources(tiny_folder, tiny_folder, tiny_folder)
    report = merge_transformers(sources, 1.0, 1.0, tmp_path / "same")
    assert (tmp_path / "same" / ONE_FILE).read_bytes() == (tiny_folder / "transformer" / ONE_FILE).read_bytes()
    assert report["total"] == {"shift_distill": 0.0, "shift_align": 0.0, "cosine": 0.0}
    merge_transformers(sources, 1.0, 1.0, tmp_path / "bf16", torch.bfloat16)
    assert {t.dtype for t in transformer_of(tmp_path / "bf16").values()} == {torch.bfloat16}


def test_a_lora_is_folded_unrounded(folders, tmp_path):
    base, distilled, aligned = folders
    klein = load_klein(aligned, expect="base", window=48, layers=(1, 2, 3))
    add_policies(klein.transformer, rank=4, alpha=8, seed=3)
    with torch.no_grad():
        for i, parameter in enumerate(parameters(klein.transformer, POLICY)):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    save_lora(klein.transformer, POLICY, tmp_path / "lora")
    save_klein(aligned, plain_copy(klein.transformer, fold(klein.transformer, POLICY)), tmp_path / "folded")
    merge_transformers(open_sources(base, distilled, aligned, tmp_path / "lora"), 1.0, 1.0, tmp_path / "by_lora")
    merge_transformers(open_sources(base, distilled, tmp_path / "folded"), 1.0, 1.0, tmp_path / "by_fold")
    ours, theirs = transformer_of(tmp_path / "by_lora"), transformer_of(tmp_path / "by_fold")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert any(not torch.equal(ours[name], transformer_of(aligned / "transformer")[name]) for name in ours)


def test_what_cannot_be_merged_is_named(folders, tiny_folder, tmp_path):
    base, distilled, aligned = folders
    other_vae = tmp_path / "other_vae"
    shutil.copytree(aligned, other_vae)
    tensors = load_file(other_vae / "vae" / ONE_FILE)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 1)
    tensors[name] += 1
    save_file(tensors, other_vae / "vae" / ONE_FILE)
    with pytest.raises(ValueError, match=rf"other_vae/vae: {name} differs from that of .*only transformers are merged"):
        open_sources(base, distilled, other_vae)
    fewer = tmp_path / "fewer"
    shutil.copytree(aligned, fewer)
    tensors = load_file(fewer / "transformer" / ONE_FILE)
    lost = tensors.popitem()[0]
    save_file(tensors, fewer / "transformer" / ONE_FILE)
    with pytest.raises(ValueError, match=rf"fewer/transformer \(aligned\): 1 tensors missing, e.g. \['{lost}'\]"):
        open_sources(base, distilled, fewer)
    file = fewer / "transformer" / ONE_FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_sources(base, distilled, fewer)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        open_sources(base, distilled, fewer)


def test_memory_does_not_hold_the_models(tmp_path):
    """Three transformers of 600 MB in shards of 100 MB: at most a shard and 200 MB more than before."""
    script = textwrap.dedent("""
        import resource, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from clvr_train.models.merge import Sources, Weights, merge_transformers
        root = Path(sys.argv[1])
        for name in ("base", "distilled", "aligned"):
            (root / name).mkdir()
            (root / name / "config.json").write_text("{}")
            for part in range(6):
                save_file({f"x{part}": torch.full((5000, 10000), part + len(name), dtype=torch.bfloat16)},
                          root / name / f"model-{part}.safetensors")
        sources = Sources(*(Weights(root / name) for name in ("base", "distilled", "aligned")))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        merge_transformers(sources, 1.0, 1.0, root / "merged")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 100 + 200
