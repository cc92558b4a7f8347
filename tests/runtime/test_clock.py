"""Seconds by phase and memory: what a clock has counted, and that it begins anew."""

import time

import pytest
import torch

from clvr_train.runtime.clock import MEASURED, Clock, memory


def test_phases_add_up_and_begin_anew() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.phase("data"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="x"), clock.phase("update"):
        raise ValueError("x")
    first = clock.take()
    assert set(first) == {"seconds_data", "seconds_update", "seconds_total"}
    assert 0.04 <= first["seconds_data"] <= first["seconds_total"] and first["seconds_update"] >= 0
    second = clock.take()
    assert set(second) == {"seconds_total"} and second["seconds_total"] < first["seconds_total"]


def test_memory_is_that_of_the_process() -> None:
    found = memory(torch.device("cpu"))
    assert set(found) == {"memory_host_gib"} and 0.01 < found["memory_host_gib"] < 1000
    held = torch.zeros(2**25).fill_(1)  # 128 MiB
    assert memory(torch.device("cpu"))["memory_host_gib"] >= found["memory_host_gib"] and held.sum() == 2**25
    assert all(name.startswith(MEASURED) for name in (*found, *Clock().take()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_a_gpu() -> None:
    held = torch.zeros(2**28, device="cuda")
    assert memory(held.device)["memory_gpu_gib"] >= 1.0
