"""The table of a report: shares in percent, other metrics as they are, and nothing where nothing is defined."""

import copy
import json

import pytest

from hf_compress.report.report import gain, markdown, show_report, table_rows, write_report


def model(name, compressed, retention=1.0, interval=(0.9, 1.05), metric="accuracy"):
    return {
        "name": name,
        "quality": {
            "metric": metric,
            "compressed": compressed,
            "retention": retention,
            "retention_interval": list(interval),
        },
        "cost": {
            "parameters": {"total": 22_360_000},
            "bytes_on_disk": 90_012_345,
            "macs": 32 * 70_000_000,
            "conditions": {"batch_size": 32},
        },
        "needs_hf_compress": False,
    }


@pytest.fixture
def report():
    conditions = {
        "device": "cpu",
        "processor": "x86_64 AVX512",
        "threads": 2,
        "batch_size": 32,
        "sequence_length": 64,
        "torch_version": "2.13.0",
        "transformers_version": "5.23.0",
    }
    return {
        "job": {"model": "/models/bert", "dataset": "news[world]", "student_layers": 3},
        "training": {"alpha": 0.9, "seed": 0},
        "rows_trained_on": 1000,
        "rows_measured_on": 500,
        "metric": "accuracy",
        "gain": None,
        "latency": {
            "latency": {
                "teacher": {"median_s": 0.2, "dtype": "float32"},
                "student": {"median_s": 0.1, "dtype": "float32"},
            },
            "ratio": {"teacher": 1.0, "student": 0.5},
            "conditions": conditions,
        },
        "models": [model("teacher", 0.98, interval=(1.0, 1.0)), model("student", 0.9706, retention=0.9904)],
    }


def cells(report):
    headings, *rows = table_rows(report)
    return [dict(zip(headings, row, strict=True)) for row in rows]


def test_cells(report):
    teacher, student = cells(report)
    assert teacher["faster"] == "1.00x"
    assert student == {
        "model": "student",
        "accuracy": "97.1 %",
        "retention % [95 %]": "99.0 [90.0, 105.0]",
        "params": "22.4 M",
        "MB": "90.0",
        "MACs": "70 M",
        "faster": "2.00x",
    }


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("accuracy", 0.971, "97.1 %"),
        ("f1_macro", 0.5, "50.0 %"),
        ("pearsonr", 0.87, "0.870"),
        ("spearmanr", -0.1234, "-0.123"),
        ("matthews_correlation", 0.6, "0.600"),
        ("pearsonr", None, "-"),
    ],
)
def test_only_shares_are_in_percent(report, metric, value, shown):
    report["metric"] = metric
    report["models"][1] = model("student", value, metric=metric)
    assert cells(report)[1][metric] == shown


@pytest.mark.parametrize(
    ("retention", "interval", "shown"),
    [(None, (None, None), "-"), (0.5, (None, None), "50.0 [-]"), (0.5, (0.25, 1.0), "50.0 [25.0, 100.0]")],
)
def test_undefined_retention(report, retention, interval, shown):
    report["models"][1] = model("student", 0.5, retention=retention, interval=interval)
    assert cells(report)[1]["retention % [95 %]"] == shown


@pytest.mark.parametrize(
    ("metric", "difference", "interval", "shown"),
    [
        (
            "accuracy",
            0.0123,
            (-0.004, 0.02),
            "that the teacher made: +1.2 points, 95 % interval [-0.4, +2.0]",
        ),
        ("pearsonr", -0.05, (-0.1, 0.0), "that the teacher made: -0.050, 95 % interval [-0.100, +0.000]"),
        ("pearsonr", None, (None, None), "that the teacher made is not defined"),
    ],
)
def test_what_the_teacher_was_worth(report, metric, difference, interval, shown):
    assert gain(report) == ""
    report["metric"] = metric
    report["gain"] = {"difference": difference, "difference_interval": list(interval)}
    assert shown in gain(report)
    assert shown in markdown(report)


def test_page_holds_every_cell(report):
    page = markdown(report)
    lines = page.splitlines()
    assert lines[0] == "# A 3-layer student, trained on news[world]"
    assert "Of `/models/bert`." in lines
    assert "(the first took 200 ms)" in page
    for row in table_rows(report):
        assert "| " + " | ".join(row) + " |" in lines
    assert "500 rows, trained on 1000" in page
    assert "cpu (x86_64 AVX512), 2 threads, torch 2.13.0" in page
    assert "alpha 0.9, seed 0" in page


def test_written_report_is_the_report(report, tmp_path):
    before = copy.deepcopy(report)
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert json.loads((tmp_path / "report.json").read_text()) == report == before
    assert (tmp_path / "report.md").read_text() == markdown(report)


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_terminal_shows_cells_paths_and_what_is_next(report, tmp_path, capsys, monkeypatch, as_type):
    monkeypatch.setenv("COLUMNS", "60")
    show_report(report, as_type(tmp_path / "run[a]"))
    shown = capsys.readouterr().out
    for row in table_rows(report):
        for cell in row:
            assert cell in shown
    assert str(tmp_path / "run[a]" / "report.json") in shown
    assert f"pipeline('text-classification', '{tmp_path / 'run[a]' / 'student'}')" in shown
