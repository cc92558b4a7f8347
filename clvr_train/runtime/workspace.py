"""A saved view of a Weights & Biases project: sections of plots, and the pictures and tables of its runs."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clvr_train.runtime.redaction import redact

with warnings.catch_warnings():  # it still writes validators in the form of pydantic 1
    warnings.filterwarnings("ignore", category=DeprecationWarning, message="(?s).*`@(root_)?validator`")
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

Sections = Mapping[str, Mapping[str, Sequence[str]]]  # section -> title of a plot -> the metrics in it


def workspace(project: str, entity: str, name: str, sections: Sections, media: Sequence[str]) -> workspaces.Workspace:
    """A view with a line plot over the step for every title, and what is logged as `media` in a section of its own.

    Only the first section is open.
    """
    made: list = [
        workspaces.Section(
            name=section,
            is_open=number == 0,
            panels=[panels.LinePlot(title=title, x="Step", y=list(metrics)) for title, metrics in plots.items()],
        )
        for number, (section, plots) in enumerate(sections.items())
    ]
    if media:
        shown: list = [panels.MediaBrowser(title=key, media_keys=[key], num_columns=1) for key in media]
        made.append(workspaces.Section(name="Pictures and tables", is_open=True, panels=shown))
    return workspaces.Workspace(project=project, entity=entity, name=name, sections=made)


def specification(view: workspaces.Workspace) -> dict[str, Any]:
    """What is sent to the server: names and the specification of the view, without anything of this machine."""
    model = view._to_model()  # of the pinned version; it has no public name
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": model.entity, "project": model.project, "displayName": model.display_name, "spec": spec}


def save(view: workspaces.Workspace) -> str:
    """Saves the view as a new one on the server; returns its address.

    Raises:
        ValueError: no key is set; the server refuses.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise ValueError("no key for wandb: set WANDB_API_KEY in the environment (wandb.ai/authorize gives one)")
    with ThreadPoolExecutor(1) as thread:
        saved = thread.submit(view.save_as_new_view)
        error = saved.exception()  # wandb raises many kinds
    if error is not None:
        reason = redact(" ".join(str(error).split())) or type(error).__name__
        raise ValueError(f"{view.entity}/{view.project}: the view was not saved ({reason})")
    return saved.result().url
