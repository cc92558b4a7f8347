"""The benchmark runs whole on few files; its numbers are not judged here, only that they are what they say."""

import json

import pytest

from recipes._bench import Row, table
from recipes.benchmark import main

SMALL = ["data.files=4", "data.side_px=96", "data.size_px=64", "data.pairs=1", "data.memory_mib=2"]
SMALL += ["data.samples=4", "data.batch=2"]


def test_a_goal_is_met_or_missed_or_not_there():
    rows = [Row("a", 0.95, "", at_least=0.9), Row("b", 2.0, "s", at_most=1.5), Row("c", 3.0, "us")]
    assert [row.met for row in rows] == [True, False, None]
    assert table(rows).splitlines()[2:] == [
        "| a | 0.95  | >= 0.9 | yes |",
        "| b | 2 s | <= 1.5 | no |",
        "| c | 3 us |  |  |",
    ]


def test_the_data_benchmark_writes_its_report(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    main(["experiment=bench_data", "run=bench", *SMALL])
    report = json.loads((tmp_path / "runs/bench/benchmark.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert report["bench"] == "data" and report["machine"]["cores"] >= 1
    assert {name for name, row in rows.items() if row["met"] is not None} == {
        "loader over bare Pillow per core, 0 workers",
        "loader over bare Pillow per core, 1 workers",
        "resume at ten million samples over resume at ten",
    }
    assert all(row["value"] >= 0 for row in rows.values())
    assert sum("peak memory" in name for name in rows) == 3
    assert "| loader over bare Pillow per core, 0 workers |" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"), [("bench=speed", "is not one of data"), ("data.samples=1", "one batch")]
)
def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch, capsys, override, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([override])
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text
