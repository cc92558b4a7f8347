"""validate_data: status, report, one line at the end; and what a training does with the same bad records."""

import json
import shutil

import pytest

from tests.data.corpora import fine_t2i_record, flux_reason_rows, picture, write_flux_reason, write_tar

IN_A_FILE = "runs/data/trajectories.jsonl/a.json"


@pytest.fixture
def damaged(world, tmp_path):
    """Twenty-four records of the shapes world, of which the third and the fifth are bad."""
    shutil.copytree(world / "runs" / "data", tmp_path / "data")
    file = tmp_path / "data" / "trajectories.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace('"from": "gpt"', '"from": "oracle"', 1)
    lines[4] = lines[4][:-30]
    file.write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def test_the_shapes_world_passes(world, run_recipe, tmp_path):
    report = tmp_path / "new" / "report.json"
    result = run_recipe(world, "validate_data", "data=runs/data", f"report={report}")
    assert json.loads(report.read_text()) == {"records": 24, "refused": 0, "by_rule": {}, "offenders": []}
    assert result.stdout == "24 records, 0 refused\n" and "validate_data: 100%" in result.stderr


def test_bad_records_are_counted_named_and_end_in_status_1(world, run_recipe, damaged):
    report = damaged.parent / "report.json"
    result = run_recipe(world, "validate_data", f"data={damaged}", f"report={report}", "workers=0", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    assert result.stderr.splitlines()[-1] == f"error: {damaged}: 2 of 24 records refused; all in {report}"
    assert [line.split()[:2] for line in lines if line.startswith(("unknown_role ", "truncated_json "))] == [
        ["unknown_role", "1"], ["truncated_json", "1"]]  # fmt: skip
    named = [line.strip() for line in lines if line.startswith(f"  {damaged}")]
    file = damaged / "trajectories.jsonl"
    assert named[0].startswith(f"{file}:3: conversations[2].from: ") and named[1].startswith(f"{file}:5: record: ")
    found = json.loads(report.read_text())
    assert set(found) == {"records", "refused", "by_rule", "offenders"}
    assert (found["records"], found["refused"], found["by_rule"]) == (24, 2, {"unknown_role": 1, "truncated_json": 1})
    assert [set(offender) for offender in found["offenders"]] == [{"file", "record", "field", "rule", "message"}] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=nowhere"], "nowhere/trajectories.jsonl: no such file"),
        (["data=runs/data", "workers=-1"], "workers=-1: "),
        (["data=runs/data", "report=runs"], "report=runs: is a folder"),
        (["data=runs/data", "report=/proc/a.json"], "report=/proc/a.json: cannot be written (No such file"),
        (["data=runs/data", f"report={IN_A_FILE}"], f"report={IN_A_FILE}: cannot be written ("),
        (["data=runs/data", "format=tar"], "format='tar' is not one of trajectories, flux_reason, fine_t2i"),
        (["data=runs/data", "format=fine_t2i"], "runs/data: no file *.tar there"),
    ],
)
def test_what_cannot_be_validated(world, run_recipe, overrides, message):
    result = run_recipe(world, "validate_data", *overrides, check=False)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "validate_data:" not in result.stderr  # found before the walk


def test_a_share_of_bad_records_may_be_left_out(world, run_recipe, damaged):
    (damaged / "proxy_prompts.jsonl").unlink()
    command = ["make_proxy_prompts", f"data.folder={damaged}"]
    result = run_recipe(world, *command, check=False)
    assert result.returncode == 1 and f"error: {damaged}/trajectories.jsonl:3: conversations[2].from: " in result.stderr
    result = run_recipe(world, *command, "data.max_refused=0.05", check=False)
    assert "2 of 24 records refused, more than max_refused=0.05 allows" in result.stderr.splitlines()[-1]
    assert result.returncode == 1 and not (damaged / "proxy_prompts.jsonl").exists()
    result = run_recipe(world, *command, "data.max_refused=0.1")
    assert f"refused: {damaged}/trajectories.jsonl:3: conversations[2].from: " in result.stderr
    assert f"{damaged}: 2 of 24 records refused" in result.stderr and (damaged / "proxy_prompts.jsonl").exists()


def test_a_corpus_of_captions(world, run_recipe, tmp_path):
    rows = flux_reason_rows(range(9), lambda row: b"no image" if row == 4 else picture(row))
    file = write_flux_reason(tmp_path / "flux" / "a.parquet", rows)
    (tmp_path / "flux" / "b.parquet").write_bytes(b"cut short")
    report = tmp_path / "report.json"
    command = ["validate_data", f"data={tmp_path / 'flux'}", "format=flux_reason", "caption=text", f"report={report}"]
    result = run_recipe(world, *command, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "validate_data: 100%" in result.stderr
    lines = result.stdout.splitlines()
    assert "7 records, 2 refused; 3 more have no such caption and are left out" in lines
    assert result.stderr.splitlines()[-1] == f"error: {tmp_path / 'flux'}: 2 of 7 records refused; all in {report}"
    assert any(line.startswith(f"  {file}:5: image: {file}:5:image: not an image in JPEG, PNG, ") for line in lines)
    found = json.loads(report.read_text())
    assert set(found) == {"records", "refused", "by_rule", "offenders"}
    assert found["by_rule"] == {"not_an_image": 1, "bad_container": 1}
    tar = write_tar(tmp_path / "a.tar", fine_t2i_record("a", picture(0)) + fine_t2i_record("b", picture(1)))
    result = run_recipe(world, "validate_data", f"data={tar}", "format=fine_t2i", "workers=0")
    assert result.stdout == "2 records, 0 refused\n"
