"""Closed loop from Python: a drawing model and a controller, loaded once, and goals drawn one by one or together."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from clvr_train.data.records import check_goal, check_text
from clvr_train.inference.chat_controller import ChatController
from clvr_train.inference.closed_loop import Budget, Replies, Result, Run, advance, check_budget, run_closed_loop
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.klein import PRECISIONS, Klein, load_klein
from clvr_train.models.qwen_vl import load_controller
from clvr_train.models.sampler import Sampler
from clvr_train.services.chat import ChatClient
from clvr_train.services.options import ChatOptions

MAX_GOAL = 20_000  # characters; more than any controller's window holds
SAMPLING = {"base": (28, 4.0), "distilled": (4, 1.0)}  # Euler steps and guidance (CLVR 4)


def checked_goal(text: str) -> str:
    """The goal without white space around it.

    Raises:
        ValueError: it is empty or too long, or holds a marker of the protocol, which no trajectory could keep.
    """
    goal = text.strip()
    if not goal:
        raise ValueError("the goal is empty")
    if len(goal) > MAX_GOAL:
        raise ValueError(f"a goal of {len(goal):,} characters; at most {MAX_GOAL:,} are read")
    check_text(goal, "goal")
    check_goal(goal, "goal")
    return goal


def open_controller(
    where: str | Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    max_pixels: int | None = 512 * 512,
    max_new_tokens: int = 256,
    batch: int = 64,
    **chat: Any,
) -> Replies:
    """The controller of a transformers folder, or of a chat server if `where` is its URL (up to and with `/v1`).

    Args:
        name: under which the server knows it. chat: further fields of `services.options.ChatOptions`, say
            `key_env`, the environment variable that holds a key.
        device, precision, batch: of a folder's model.

    Raises:
        ValueError: for a URL without a name, a folder with what is a server's, an unknown precision, and as
            `load_controller` and `ChatClient`.
        FileNotFoundError: as `load_controller`.
    """
    if str(where).startswith(("http://", "https://")):
        if not name:
            raise ValueError(f"controller {where}: the name under which the server knows the model is needed")
        options = ChatOptions(str(where), name, max_tokens=max_new_tokens, **chat)
        return ChatController(ChatClient(options), max_pixels)
    if name or chat:
        given = ", ".join((["name"] if name else []) + list(chat))
        raise ValueError(f"controller {where}: is a folder, and {given} is of a chat server, http://host:port/v1")
    options = {"max_pixels": max_pixels, "max_new_tokens": max_new_tokens, "batch": batch}
    return load_controller(Path(where), device=device, dtype=dtype_of(precision), **options)


def dtype_of(precision: str) -> torch.dtype:
    """Raises ValueError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def sampling_of(klein: Klein, steps: int | None, cfg: float | None) -> dict[str, Any]:
    """`steps` and `cfg` for a `Sampler`; what is None becomes that of the paper for the kind of the model."""
    usual = SAMPLING["distilled" if klein.distilled else "base"]
    return {"steps": usual[0] if steps is None else steps, "cfg": usual[1] if cfg is None else cfg}


class ClosedLoop:
    """A controller and a drawing model at work together; `budget` keywords everywhere are the fields of `Budget`.

    Args:
        retries, seed: see `closed_loop.advance`.
    """

    def __init__(self, controller: Replies, sampler: Sampler, *, retries: int = 2, seed: int = 0) -> None:
        self.controller, self.sampler = controller, sampler
        workers = controller.client.options.limit if isinstance(controller, ChatController) else 1
        self.options = {
            "retries": retries,
            "seed": seed,
            "nfe_per_image": sampler.nfe_per_image,
            "workers": workers,
        }

    @classmethod
    def load(
        cls,
        model: str | Path,
        controller: str | Path,
        *,
        size_px: tuple[int, int] = (512, 512),
        window: int = 512,
        layers: Sequence[int] = (9, 18, 27),
        steps: int | None = None,
        cfg: float | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        retries: int = 2,
        seed: int = 0,
        **of_controller: Any,
    ) -> "ClosedLoop":
        """Loads both from disk; nothing is fetched.

        Args:
            model: a diffusers folder of a FLUX.2 Klein, base or distilled (a merged one is distilled).
            controller, of_controller: see `open_controller`.
            size_px: (height, width) of what is drawn. window, layers: see `models.klein.Klein`; the defaults are
                upstream's.
            steps, cfg: None for 28 steps with guidance 4 of a base model, 4 steps without guidance of a distilled one.

        Raises:
            ValueError, FileNotFoundError: as `open_controller` and `models.klein.load_klein`.
        """
        asked = open_controller(controller, device=device, precision=precision, **of_controller)
        options = {"window": window, "layers": layers, "device": device, "dtype": dtype_of(precision)}
        klein = load_klein(model, expect=None, **options)
        sampler = Sampler(Conditioner(klein, size_px), share=True, **sampling_of(klein, steps, cfg))
        return cls(asked, sampler, retries=retries, seed=seed)

    def __call__(self, goal: str, **budget: Any) -> Result:
        """Draws a goal to its end. Raises ValueError as `start`."""
        return self.many([goal], **budget)[0]

    def many(self, goals: Sequence[str], **budget: Any) -> list[Result]:
        """Draws goals together. Raises ValueError as `start`."""
        named = [(f"goal-{number:04d}", checked_goal(goal)) for number, goal in enumerate(goals, start=1)]
        return run_closed_loop(self.controller, self.sampler.draw, named, budget=Budget(**budget), **self.options)

    def rounds(self, goal: str, **budget: Any) -> Iterator[Run]:
        """The goal as it is after every round, to its end. Raises ValueError as `start`."""
        run = self.start("goal-0001", goal, **budget)
        while not run.stop_reason:
            self.advance([run])
            yield run

    def start(self, name: str, goal: str, **budget: Any) -> Run:
        """A goal that `advance` takes further; the noise of its images depends on the seed and on `name`.

        Raises:
            ValueError: as `checked_goal`, `Budget` and `check_budget`.
        """
        allowed = Budget(**budget)
        check_budget(allowed, self.sampler.nfe_per_image)
        return Run(name, checked_goal(goal), allowed)

    def advance(self, runs: Sequence[Run]) -> None:
        """One round of every run that has not ended (`closed_loop.advance`)."""
        advance(self.controller, self.sampler.draw, runs, **self.options)

    def result(self, run: Run) -> Result:
        """What there is of a run so far."""
        return run.result(self.sampler.nfe_per_image)
