"""MFU: FLOPs of samples by the plan's count over a GPU's peak."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.trace import trace_transformer
from clvr_train.models.utilisation import Utilisation, peak_flops

PX = (96, 96)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H20", torch.bfloat16, 148e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, None),
    ],
)
def test_peaks_by_the_driver_s_name(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak


def samples() -> list[Sample]:
    image = Image.new("RGB", PX, "red")
    return [Sample("a", 1, "goal", ("draw",), (), image), Sample("a", 2, "goal", ("draw", "edit"), (image,), image)]


def test_by_hand_and_it_begins_anew(tiny_klein) -> None:
    conditioner = Conditioner(tiny_klein(), PX)
    use = Utilisation(conditioner, "fp32")
    assert use.peak is None and use.take(1.0) == {}, "a CPU has no peak"
    use.peak = 1e9
    transformer, window = conditioner.klein.transformer.to("meta"), conditioner.klein.window
    grid = conditioner.grid(samples()[0])  # of the reference too
    first, second = (trace_transformer(transformer, torch.float32, 1, window, grid, [grid] * n).flops for n in (0, 1))
    use.add(samples())
    use.add(samples()[:1])
    assert second > first > 0 and use.take(2.0) == {"mfu": 3 * (2 * first + second) / 2.0 / 1e9}
    assert use.take(2.0) == {"mfu": 0.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tiny_folder: Path) -> None:
    from clvr_train.models.klein import load_klein

    klein = load_klein(tiny_folder, expect="base", window=48, layers=(1, 2, 3), device="cuda")
    use = Utilisation(Conditioner(klein, PX), "bf16")
    use.add(samples())
    assert use.peak is None or 0 < use.take(1.0)["mfu"] < 1
