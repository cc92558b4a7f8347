"""Logs of runs as tests compare them."""

from collections.abc import Iterable

from clvr_train.runtime.clock import MEASURED


def unmeasured(rows: Iterable[dict]) -> list[dict]:
    """Lines of a metrics.jsonl without what no two runs share: seconds, memory, use of the GPU."""
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]
