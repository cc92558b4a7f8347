"""What recipes/doctor.py looks at. A check gives its findings; each that is not well has a remedy."""

import fcntl
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from clvr_train.runtime.files import write_atomic
from clvr_train.services.chat import ChatClient, ChatError
from clvr_train.services.options import ChatOptions

OK, WARNING, FAILED = "ok", "warning", "failed"
OLDEST_PYTHON = (3, 11)
FREE_SHARE = 0.9  # of a GPU's memory, below which others are on it
TOLERANCE = 1e-2  # of the loss of the tiny model in bfloat16, of some 1, against the CPU's in float32; measured: 1e-3


@dataclass(frozen=True)
class Finding:
    """What was found of one thing: `status` is ok, warning (training can do without) or failed."""

    name: str
    status: str
    found: str
    remedy: str = ""


def python(running: Sequence[Any] = sys.version_info) -> Iterator[Finding]:
    text = ".".join(map(str, running[:3]))
    remedy = f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer and make .venv with it"
    good = tuple(running[:2]) >= OLDEST_PYTHON
    yield Finding("python", OK, text) if good else Finding("python", FAILED, text, remedy)


def packages() -> Iterator[Finding]:
    """Installed versions against those that the tests hold for (setup.cfg)."""
    pins = [re.match(r"([\w.-]+)==([\w.]+)(.*)", line) for line in requires("clvr-train") or ()]
    right = 0
    for pin in filter(None, pins):
        name, tested, extra = pin.groups()
        try:
            found = version(name)
        except PackageNotFoundError:
            if "extra" not in extra:
                yield Finding(name, FAILED, "not installed", f"pip install {name}=={tested}")
            continue
        if found.partition("+")[0] == tested:
            right += 1
        else:
            yield Finding(name, WARNING, f"{found}; tested with {tested}", f"pip install {name}=={tested}")
    yield Finding("packages", OK, f"{right} of the tested versions")


def gpus(device: str) -> Iterator[Finding]:
    """Torch, its CUDA, the driver, NCCL, and the memory of every GPU."""
    built, driver = torch.version.cuda, shutil.which("nvidia-smi") is not None
    yield Finding("torch", OK, f"{torch.__version__}, {f'CUDA {built}' if built else 'built without CUDA'}")
    if not torch.cuda.is_available():
        found, remedy = "no GPU can be used", "install NVIDIA's driver, or say device=cpu"
        if driver and not built:
            remedy = "install a torch with CUDA: pip install torch==" + torch.__version__.partition("+")[0]
        elif driver:
            remedy = f"nvidia-smi has to list the GPUs, and its driver to be new enough for CUDA {built}"
            remedy += "; look at CUDA_VISIBLE_DEVICES too"
        needed = device == "cuda" or (driver and device == "auto")
        yield Finding("cuda", FAILED, found, remedy) if needed else Finding("cuda", OK, f"{found}; CPU only")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    yield Finding("cuda", OK, f"{torch.cuda.device_count()} GPUs, driver {_driver() or 'unknown'}")
    remedy = "install a torch with NCCL; several GPUs cannot train together without it"
    yield Finding("nccl", OK, nccl) if nccl else Finding("nccl", WARNING, "none in this torch", remedy)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = f"memory of GPU {number}"
        found = f"{torch.cuda.get_device_name(number)}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        taken = "another process is on this GPU: see nvidia-smi, end it or choose others by CUDA_VISIBLE_DEVICES"
        yield Finding(name, OK, found) if free >= FREE_SHARE * total else Finding(name, WARNING, found, taken)


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s([\d.]+)\s", file.read_text()) if file.exists() else None
    return found[1] if found else ""


def disk(folder: Path, least_gb: float) -> Iterator[Finding]:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.1f} GB free for {folder}"
    remedy = f"free space, or make runs/ a link to a larger disk; checkpoints need it (disk_gb={least_gb:g})"
    yield Finding("disk", OK, found) if free >= least_gb else Finding("disk", WARNING, found, remedy)


def writes(folder: Path) -> Iterator[Finding]:
    """Does to a run's folder what a run does: write, fsync, rename, read, lock; and takes it all away again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    trial = folder / f".doctor-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.mkdir()
        for content in ("first", "second"):
            write_atomic(trial / "file", content)
            if (trial / "file").read_text() != content:
                raise OSError(f"{trial / 'file'}: does not hold what was written")
        remedy = "choose a file system with POSIX locks: without, two runs in one folder are not noticed"
        yield Finding("run folder", OK, f"{folder}: written, synced and renamed")
        with (trial / "lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                yield Finding("locks", WARNING, f"{folder}: {error.strerror}", remedy)
    except OSError as error:
        remedy = "make it writable for you, or make runs/ a link to a folder that is"
        yield Finding("run folder", FAILED, f"{folder}: {error.strerror or error}", remedy)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def tiny_step(device: torch.device, dtype: torch.dtype) -> float:
    """Forward and backward of a tiny transformer of the real class; returns its loss, the same on every device.

    Raises:
        FloatingPointError: the loss or a gradient is not finite.
        RuntimeError: the device cannot do it.
    """
    from clvr_train.models.tiny import tiny_transformer  # diffusers takes seconds to be imported

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = tiny_transformer(32, 48, double=1, single=1, heads=2, head_dim=16)
        tokens, text = torch.randn(2, 9, 32), torch.randn(2, 5, 48)
    torch.nn.Module.to(model, device, dtype)  # diffusers' own warns of float32 modules, of which this model has none
    ids = torch.zeros(2, 14, 4, device=device)
    ids[:, :, 1] = torch.arange(14, device=device)
    time = torch.full((2,), 0.5, device=device, dtype=dtype)
    inputs = {"hidden_states": tokens.to(device, dtype), "encoder_hidden_states": text.to(device, dtype)}
    predicted = model(**inputs, timestep=time, img_ids=ids[:, 5:], txt_ids=ids[:, :5], return_dict=False)[0]
    loss = (predicted.float() - tokens.to(device)).square().mean()
    loss.backward()
    gradients = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    if not (gradients and torch.stack([loss, *gradients]).isfinite().all()):
        raise FloatingPointError("the loss or a gradient is not finite")
    return loss.item()


def devices(device: str) -> Iterator[Finding]:
    """A tiny forward and backward on the CPU and on every GPU, whose losses must agree."""
    places = [torch.device("cpu")]
    if device != "cpu" and torch.cuda.is_available():
        places += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    expected = None
    for place in places:
        try:
            loss = tiny_step(place, torch.float32 if place.type == "cpu" else torch.bfloat16)
            expected = loss if expected is None else expected
            if abs(loss - expected) > TOLERANCE:
                raise FloatingPointError(f"loss {loss:.4f}, on the CPU {expected:.4f}")
        except (RuntimeError, FloatingPointError) as error:
            remedy = "look for its errors in dmesg and nvidia-smi -q; leave it out by CUDA_VISIBLE_DEVICES"
            remedy = "reinstall torch" if place.type == "cpu" else remedy
            yield Finding(f"step on {place}", FAILED, " ".join(str(error).split())[:300], remedy)
        else:
            yield Finding(f"step on {place}", OK, f"loss {loss:.4f}")


def chat_servers(reward: DictConfig, teacher: DictConfig, timeout_s: float) -> dict[str, tuple[str, ChatOptions]]:
    """The servers that the groups `reward` and `teacher` ask: name -> (their keys, options)."""
    found = {}
    for judge in ("unified_reward", "unified_reward_edit"):
        if judge in reward and (reward.of_images.get(judge) or reward.of_edits.get(judge)):
            section = reward[judge]
            options = ChatOptions(section.url, section.model, reward.chat.key_env, attempt_s=timeout_s)
            found[f"judge {judge}"] = (f"reward.{judge}.url", options)
    if teacher.name == "openai":
        options = ChatOptions(teacher.chat.url, teacher.chat.model, teacher.chat.key_env, attempt_s=timeout_s)
        found["teacher"] = ("teacher.chat.url", options)
    return found


def server(name: str, key: str, options: ChatOptions) -> Iterator[Finding]:
    """Whether a server lists its models, and ours among them."""
    script = "launch/serve_teacher.sh" if name == "teacher" else "launch/serve_judge.sh"
    try:
        with ChatClient(options) as client:
            models = client.models()
    except (ValueError, ChatError) as error:
        remedy = f"start it ({script}), or correct {key} and the key that key_env names"
        yield Finding(name, FAILED, f"{options.url}: {error}", remedy)
        return
    if models and options.model not in models:
        remedy = f"serve it under this name (NAME={options.model} {script}), or correct the key of its model"
        yield Finding(name, WARNING, f"{options.url} lists {', '.join(models)}, not {options.model}", remedy)
    else:
        yield Finding(name, OK, f"{options.url} lists its models")


def bounded(name: str, check: Callable[[], Iterable[Finding]], limit_s: float) -> list[Finding]:
    """What a check finds within its time: a driver or a network file system that hangs must not hang this."""
    found: list[Finding] = []
    over = threading.Event()

    def run() -> None:
        try:
            found.extend(check())
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            found.append(Finding(name, FAILED, text, "this should not happen: CLVR_TRACEBACK=1 may show more"))
        over.set()

    threading.Thread(target=run, daemon=True).start()
    if not over.wait(limit_s):
        remedy = "it hangs, or is slow: try again, give it more time (timeout_s, devices_s), or look at it by hand"
        return [*found, Finding(name, FAILED, f"no result within {limit_s:g} s", remedy)]
    return found
