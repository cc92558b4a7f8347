"""Checks a data set before a training: every record against every rule, every image decoded, in parallel.

Prints counts by rule and the first offenders, writes all of it to report=PATH as JSON, and ends with exit status 1 if
any record is refused.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.report import RULES, Report
from clvr_train.data.validate import data_files, validate
from clvr_train.runtime.files import write_atomic
from recipes._recipe import recipe


def table(report: Report, show: int) -> str:
    """Counts by rule, and the first `show` offenders."""
    lines = [f"{report.records} records, {report.refused} refused"]
    if report.left_out:
        lines[0] += f"; {report.left_out} more have no such caption and are left out"
    if report.refused:
        width = max(map(len, report.by_rule))
        lines += ["", f"{'rule':{width}}  records  what the rule asks for"]
        lines += [f"{rule:{width}}  {n:7}  {RULES.get(rule, '')}" for rule, n in report.by_rule.most_common()]
        lines += ["", "first offenders", *(f"  {error}" for error in report.offenders[:show])]
    return "\n".join(lines)


def _check_writable(file: Path) -> None:
    """Make the folder of a report, and try there what writing it will do. Raises `OSError`."""
    if file.is_dir():
        raise IsADirectoryError(f"report={file}: is a folder; name a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, suffix=".tmp"):
            pass
    except OSError as error:
        raise OSError(f"report={file}: cannot be written ({error.strerror})") from error


@recipe("validate_data")
def main(cfg: DictConfig) -> None:
    data, file = Path(cfg.data), cfg.report and Path(cfg.report)
    workers = len(os.sched_getaffinity(0)) if cfg.workers is None else cfg.workers
    if workers < 0:
        raise ValueError(f"workers={workers}: a number of processes, or 0 for this one")
    if file:  # found out now, not after hours
        _check_writable(file)
    total = sum(path.stat().st_size for path in data_files(data, cfg.format))
    with tqdm(total=total, unit="B", unit_scale=True, desc="validate_data") as bar:

        def advance(weight: int, report: Report) -> None:
            bar.update(weight)
            bar.set_postfix(records=report.records, refused=report.refused)

        report = validate(data, workers, advance, cfg.format, cfg.caption)
    if file:
        write_atomic(file, json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")
    sys.stdout.write(table(report, cfg.show) + "\n")
    if report.refused:
        where = f"all in {file}" if file else "report=PATH writes all of them to a file"
        raise ValueError(f"{data}: {report.refused} of {report.records} records refused; {where}")


if __name__ == "__main__":
    main()
