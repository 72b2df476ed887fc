"""A run's page holds the report's numbers, needs nothing from elsewhere, and says in words what it draws."""

import copy
import json
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from hf_compress.cli.main import main
from hf_compress.report.run_figures import draw_run
from hf_compress.report.run_page import (
    compared_rows,
    run_markdown,
    run_page,
    run_table_rows,
    summary,
    title_of,
    write_run_report,
)
from hf_compress.report.tradeoff import Point, draw_tradeoffs, mark_best, models_of
from tests.run_reports import entry, example_report


def figures_of(reports):
    return [*draw_tradeoffs(reports), *(figure for report in reports.values() for figure in draw_run(report))]


def short(report):
    """The same run without what happened between its first and last model, and inside of them."""
    steps = [
        {name: value for name, value in one.items() if name not in ("details", "parts")} for one in models_of(report)
    ]
    return report | {"steps": [steps[0], steps[-1]]}


def texts_of(figure):
    """What can be read in a figure, apart from its title and description."""
    root = ElementTree.fromstring(figure.svg("f"))
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


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
    figures = figures_of({"run": example_report()})
    titles = " ".join(figure.title for figure in figures)
    for word in ("size", "time", "heads", "neurons", "0 after", "Signal-to-noise", "Losses", "Bytes", "time goes"):
        assert word in titles
    for figure in figures:
        svg = figure.svg("f1")
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        texts = {element.get("id"): element.text for element in root if element.tag.endswith(("title", "desc"))}
        assert [texts[name] for name in root.get("aria-labelledby").split()] == [figure.title, figure.meaning]
        assert re.search(r"\d", figure.meaning)
        assert not re.search(r"(?<=: )#", svg), "a colour that does not follow the page"
        # A telephone is a little wider than this, so a text is no smaller there than it is here.
        assert float(root.get("viewBox").split()[2]) == pytest.approx(288)
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert sizes
        assert min(sizes) >= 8.5


def test_the_figures_say_every_models_numbers():
    report = example_report()
    size = draw_tradeoffs({"run": report})[0].meaning
    for one in models_of(report):
        quality = one["quality"]
        assert f"{one['name']} {100 * quality['compressed']:.4g}" in size
        if one["name"] != report["reference"]:
            low, high = (100 * (quality["teacher"] + x) for x in quality["difference_interval"])
            assert f"[{low:.4g}, {high:.4g}] at {one['cost']['bytes_on_disk'] / 1e6:.3g}" in size
    by_title = {figure.title: figure for figure in draw_run(report)}
    heads = by_title["Self-attention heads that 03-prune kept"]
    assert heads.meaning.endswith("21 of 72. By layer: 6, 5, 4, 3, 2, 1.")
    noise = by_title["Signal-to-noise ratio of outputs after 06-quantize, dB"]
    assert "from 33.0 (bert.encoder.layer.5.output.dense) to 38.0" in noise.meaning
    assert {"output.dense", "38", "37", "36", "35", "34", "33"} <= set(texts_of(noise))
    assert "54.7 (embeddings 10.9, attention 10.9" in by_title["Bytes by part of the model"].meaning
    assert {"loss", "kd_loss"} <= set(texts_of(by_title["Losses while 04-recover was trained, by step"]))


def test_the_front_is_of_models_that_none_beats():
    def point(run, cost, quality):
        return Point(run, f"{cost}", cost, quality, None)

    points = [point(0, 1, 90), point(0, 2, 95), point(0, 2, 94), point(0, 3, 95), point(0, 4, 96), point(1, 5, 80)]
    assert [one.is_best for one in mark_best(points, ["a", "b"])] == [True, True, False, False, True, True]
    assert [one.is_best for one in mark_best(points, ["a", "a"])] == [True, True, False, False, True, False]
    # None of two equal models beats the other.
    assert all(one.is_best for one in mark_best([point(0, 1, 90), point(0, 1, 90)], ["a"]))


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
    report = example_report(steps=example_report()["steps"][:3], result="03-prune")
    both = run_page({"run": report, "same": report})
    ids = re.findall(r' id="([^"]+)"', both)
    assert ids
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', both)
    assert targets
    assert set(targets) <= set(ids)


def test_names_cannot_write_html():
    evil = "<script>alert('x')</script>"
    report = json.loads(json.dumps(example_report()).replace("03-prune", evil).replace("bert.encoder", evil))
    report["stopped_by"] = {"step": evil, "reason": evil}
    page = run_page({evil: report, "other": short(example_report())})
    assert "<script" not in page
    assert "&lt;script" in page


@pytest.mark.parametrize("name", ["_$\\frac{1$ a$b$", "a<b & 'c' \"d\" --> <!-- #010101", "x" * 300])
def test_names_are_shown_as_they_are(name):
    report = json.loads(json.dumps(example_report()).replace("bert.encoder", json.dumps(name)[1:-1]))
    reports = {name: short(report), "other": short(report)}
    headings = re.findall(r"<h2>([^<]*)</h2>", run_page(reports))
    assert [unescape(heading) for heading in headings] == [name, "other"]
    for figure in draw_run(report):
        ElementTree.fromstring(figure.svg("f"))
    shown = [text.strip() for text in texts_of(draw_tradeoffs(reports)[0])]
    assert (name if len(name) < 45 else "x" * 20 + "..." + "x" * 22) in shown


def test_what_is_missing_is_left_out():
    report = example_report()
    for one in report["steps"]:
        one.pop("details", None)
        one.pop("parts", None)
    figures = figures_of({"run": report})
    assert [figure.title.split(",")[0] for figure in figures] == ["Quality and size", *["Quality and time"] * 2]
    undefined = copy.deepcopy(example_report())
    quality = undefined["steps"][2]["quality"]
    quality |= {"retention": None, "retention_interval": [None, None], "difference_interval": [None, None]}
    assert run_table_rows(undefined)[3][2] == "-"
    assert "03-prune" in run_page({"run": undefined})
    # Without an interval none is drawn, instead of one that reaches to the teacher.
    assert "03-prune 89 at 20.6;" in draw_tradeoffs({"run": undefined})[0].meaning
    for one in models_of(undefined):
        one["quality"] |= {"compressed": None, "retention": None, "retention_interval": [None, None]}
    assert "accuracy, % is undefined for every model" in run_page({"run": undefined})


def test_what_json_does_not_know_is_null(tmp_path):
    losses = [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": float("nan")}, {"step": 3.0, "loss": 1.0}]
    report = example_report(steps=[entry("01-finetune", 0.92, 90.87, 1.0, details={"losses": losses})])
    report["result"] = "01-finetune"
    write_run_report(report, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [one["loss"] for one in read["steps"][0]["details"]["losses"]] == [2.0, None, 1.0]
    page = (tmp_path / "report.html").read_text()
    assert "loss from 2 to 1" in page
    assert run_page({title_of(read): read}) == page


def test_a_stopped_run_says_so():
    stopped = {"step": "07-evaluate", "reason": "06-quantize kept 0.9 of accuracy, and min_retention is 0.95"}
    report = example_report(stopped_by=stopped, result="04-recover")
    assert "Stopped at 07-evaluate: 06-quantize kept 0.9" in run_markdown(report)
    assert "<p>Stopped at 07-evaluate: 06-quantize kept 0.9" in run_page({"run": short(report) | {"result": None}})
    assert "04-recover kept" in summary(report)
    assert summary(example_report(result=None)) == "No model passed the gates of the recipe."


def test_several_runs_on_one_page(tmp_path, capsys):
    reports = {
        "first": short(example_report()),
        "second": example_report(steps=[*example_report()["steps"][:3]], result="03-prune"),
    }
    page = run_page(reports)
    assert "2 runs compared" in page
    assert page.count("<h2>") == 2
    headings, first, second = compared_rows(reports)
    assert headings[:4] == ("run", "result", "quality", "retention % [95 %]")
    assert first[:3] == ("first", "06-quantize", "91.4 % accuracy")
    assert second[:3] == ("second", "03-prune", "89.0 % accuracy")
    assert [row[-1] for row in (first, second)] == ["240", "360"]
    assert compared_rows({"none": example_report(result=None)})[1] == ("none", "720")
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


def test_runs_of_other_rows_are_compared_by_what_they_kept():
    first = short(example_report())
    same = first | {"recipe": first["recipe"] | {"seed": 1}}
    size = draw_tradeoffs({"first": first, "same": same})[0]
    assert "accuracy, %" in texts_of(size)
    assert "first 06-quantize 91.4 [90.4, 92.4] at 5.3" in size.meaning
    for difference in ({"metric": "f1"}, {"rows_measured_on": 100}, {"split": "test"}):
        size = draw_tradeoffs({"first": first, "other": first | difference})[0]
        assert "kept of the first model's quality, %" in texts_of(size)
        assert "other 06-quantize 99.35 [98.35, 100.3] at 5.3" in size.meaning


def test_a_worse_model_is_called_worse():
    report = example_report(steps=[entry("01-finetune", 0.92, 50.0, 1.0), entry("02-prune", 0.9, 100.0, 2.0)])
    report["result"] = "02-prune"
    worse = "is 2.0x larger on disk, has 2.0x more multiply-accumulates, and is 2.0x slower at 8 rows"
    assert worse in summary(report)


def test_report_json_is_written_last(tmp_path):
    report = short(example_report())
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match="report.html"):
        write_run_report(report, tmp_path)
    (tmp_path / "report.html").rmdir()
    assert not (tmp_path / "report.json").exists()
    write_run_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_model_alone_has_a_title():
    report = example_report()
    report["steps"] = [entry("00-model", 0.92, 90.0, 1.0), *report["steps"][2:3]]
    assert title_of(report) == "my-model on my-data: prune"
