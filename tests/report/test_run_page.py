"""A run's page holds the report's numbers, needs nothing from elsewhere, and says in words what it draws."""

import copy
import json
import re
from xml.etree import ElementTree

import pytest

from hf_compress.cli.main import main
from hf_compress.report.run_figures import models_of, run_figures
from hf_compress.report.run_page import run_markdown, run_page, run_table_rows, summary, title_of, write_run_report
from tests.run_reports import entry, example_report


def test_every_number_of_the_table_is_the_reports():
    report = example_report()
    headings, *rows = run_table_rows(report)
    assert headings[:3] == ("step", "accuracy", "retention % [95 %]")
    assert len(rows) == len(models_of(report)) == 6
    for row, one in zip(rows, models_of(report), strict=True):
        quality, cost = one["quality"], one["cost"]
        assert row[0] == one["name"]
        assert float(row[1].split()[0]) == pytest.approx(100 * quality["compressed"], abs=0.05)
        if one["name"] != report["reference"]:
            low, high = (100 * x for x in quality["retention_interval"])
            found = [float(x) for x in re.findall(r"[\d.]+", row[2])]
            assert found == pytest.approx([100 * quality["retention"], low, high], abs=0.051)
        assert float(row[4]) == pytest.approx(cost["bytes_on_disk"] / 1e6, abs=0.005)
        assert [float(x.rstrip("x")) for x in row[6:8]] == pytest.approx(
            [1 / one["latency"]["8"]["ratio"]] * 2, abs=0.005
        )


def test_the_same_rows_are_on_the_page_and_in_the_text():
    report = example_report()
    page, text = run_page({"run": report}), run_markdown(report)
    for row in run_table_rows(report):
        for cell in row:
            assert f">{cell}</t" in page
            assert f" {cell} |" in text
    assert summary(report) in text
    assert "17.1x smaller on disk" in summary(report)


def test_figures_are_well_formed_and_said_in_words():
    figures = run_figures({"run": example_report()})
    titles = " ".join(figure.title for figure in figures)
    for word in ("size", "time", "heads", "neurons", "0 after", "Signal-to-noise", "Losses", "Bytes", "time goes"):
        assert word in titles
    for figure in figures:
        root = ElementTree.fromstring(figure.svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == figure.meaning
        assert re.search(r"\d", figure.meaning)
        assert not re.search(r"#0[0-3a]0[0-3a]", figure.svg), "a colour that does not follow the page"
    ids = [identifier for figure in figures for identifier in re.findall(r'id="([^"]+)"', figure.svg)]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_from_elsewhere():
    page = run_page({"run": example_report()})
    # Names of XML's dialects are no addresses that anything is loaded from.
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for element in ("<script", "<link", "<img", "@import", "<iframe"):
        assert element not in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert page == run_page({"run": example_report()})


def test_names_cannot_write_html():
    evil = "<script>alert('x')</script>"
    report = json.loads(json.dumps(example_report()).replace("03-prune", evil).replace("bert.encoder", evil))
    report["stopped_by"] = {"step": evil, "reason": evil}
    page = run_page({evil: report, "other": example_report()})
    assert "<script" not in page
    assert "&lt;script" in page


def test_what_is_missing_is_left_out():
    report = example_report()
    for one in report["steps"]:
        one.pop("details", None)
        one.pop("parts", None)
    figures = run_figures({"run": report})
    assert [figure.title.split(",")[0] for figure in figures] == ["Quality and size", *["Quality and time"] * 2]
    undefined = copy.deepcopy(example_report())
    quality = undefined["steps"][2]["quality"]
    quality |= {"retention": None, "retention_interval": [None, None], "difference_interval": [None, None]}
    assert run_table_rows(undefined)[3][2] == "-"
    assert "03-prune" in run_page({"run": undefined})


def test_a_stopped_run_says_so():
    stopped = {"step": "07-evaluate", "reason": "06-quantize kept 0.9 of accuracy, and min_retention is 0.95"}
    report = example_report(stopped_by=stopped, result="04-recover")
    assert "Stopped at 07-evaluate: 06-quantize kept 0.9" in run_markdown(report)
    assert "04-recover kept" in summary(report)
    assert summary(example_report(result=None)) == "No model passed the gates of the recipe."


def test_several_runs_on_one_page(tmp_path, capsys):
    reports = {
        "first": example_report(),
        "second": example_report(steps=[*example_report()["steps"][:3]], result="03-prune"),
    }
    page = run_page(reports)
    assert "2 runs compared" in page
    assert "second: 03-prune" in page
    other = example_report(metric="f1")
    with pytest.raises(ValueError, match="measured accuracy, f1, which cannot be compared"):
        run_page({"first": example_report(), "second": other})
    for name, report in reports.items():
        (tmp_path / name).mkdir()
        write_run_report(report, tmp_path / name)
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path / "first"), str(tmp_path / "second"), "--output", str(tmp_path / "both.html")])
    assert exit_.value.code == 0
    assert (tmp_path / "both.html").read_text() == page
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "first"), str(tmp_path / "second"), "--output", str(tmp_path / "both.html")])
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "holds no report.json" in capsys.readouterr().err


def test_report_json_is_written_last(tmp_path, monkeypatch):
    report = example_report()
    monkeypatch.setattr("hf_compress.report.run_page.json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_run_report(report, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "report.json").exists()
    write_run_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_model_alone_has_a_title():
    report = example_report()
    report["steps"] = [entry("00-model", 0.92, 90.0, 1.0), *report["steps"][2:3]]
    assert title_of(report) == "my-model on my-data: prune"
