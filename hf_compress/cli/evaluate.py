"""`hf-compress evaluate`: one saved model measured from the command line, alone or beside its teacher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hf_compress.report.tables import megabytes, print_json, show_facts, show_table
from hf_compress.report.words import is_share

# 0.09 / 0.1 is a little less than 0.9.
_ROUNDING = 1e-9

# Less was kept than --min-retention asks for.
NOT_KEPT = 3

Report = dict[str, Any]


class SeveralValues(TyperCommand):
    """A command whose lists take several words, as in `--batch-sizes 8 32`, like the other commands' do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses a command line.

        Args:
            ctx (`typer.Context`): The context.
            args (`list[str]`): Words.

        Returns:
            `list[str]`: What is left over.
        """
        lists = {name for one in self.params if getattr(one, "multiple", False) for name in one.opts}
        return super().parse_args(ctx, spread(args, lists))


def spread(words: Sequence[str], lists: set[str]) -> list[str]:
    """Repeats an option before each of its values: `--sizes 8 32` becomes `--sizes 8 --sizes 32`.

    Args:
        words (sequence of `str`): A command line.
        lists (`set[str]`): Options that take several values.

    Returns:
        `list[str]`: The same command line for a parser that takes one value at a time.
    """
    spread_words: list[str] = []
    current, has_value = None, False
    for word in words:
        if word.startswith("--"):
            current, has_value = (word if word in lists else None), False
        elif current is not None:
            spread_words += [current] if has_value else []
            has_value = True
        spread_words.append(word)
    return spread_words


def evaluate(
    model: Annotated[str, typer.Argument(help="The model: a folder, or a name on the Hub.")],
    dataset: Annotated[
        str,
        typer.Option(help="Labelled rows: a name on the Hub, a folder with test.csv (or parquet, json), or a file."),
    ],
    teacher: Annotated[str | None, typer.Option(help="The model before it was compressed, to compare with.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    text_columns: Annotated[
        list[str] | None, typer.Option(help="Column of the texts (by default text), two for pairs, or of the words.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    metric: Annotated[
        str | None,
        typer.Option(help="What quality is. By default accuracy; pearsonr for numbers, seqeval for labelled words."),
    ] = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Split to measure on. By default validation, dev or test, the first there is.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per row at most; longer rows are cut.")] = 128,
    batch_sizes: Annotated[
        list[int] | None, typer.Option(help="Rows per batch when timed. By default 8 and 32.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per row when timed.")] = 64,
    runs: Annotated[int, typer.Option(help="Timed runs of each model and batch size.")] = 20,
    eval_batch_size: Annotated[int, typer.Option(help="Rows per batch when quality is measured.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the resamples that give the intervals.")] = 0,
    use_cpu: Annotated[bool, typer.Option("--use-cpu", help="Leave an accelerator alone.")] = False,
    min_retention: Annotated[
        float | None,
        typer.Option(help="Share of the teacher's metric that must be kept, such as 0.98; else the exit code is 3."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for other programs.")] = False,
) -> None:
    """Measure a saved model: quality with its interval, size, MACs, and time; with --teacher, what it kept.

    \b
    Nothing is trained. Quality is measured on all rows of one split. Times are
    those of random texts of one length; model and teacher take turns.

    \b
    Examples:
      hf-compress evaluate ./out/05-quantize --dataset ./reviews
      hf-compress evaluate ./small --teacher ./large --dataset ./reviews \\
          --text-columns review --label-column sentiment --min-retention 0.98
      hf-compress evaluate ./small --dataset test.csv --batch-sizes 1 8 --json
    """
    _check(teacher, min_retention)
    from hf_compress.jobs.evaluate import evaluate_model
    from hf_compress.recipe.steps import DataConfig, MeasureConfig

    data = DataConfig(
        dataset, dataset_name, text_columns or ["text"], label_column, eval_split, max_length, None, metric
    )
    measure = MeasureConfig(batch_sizes or [8, 32], length, eval_batch_size, runs)
    report = evaluate_model(model, data, measure, teacher=teacher, seed=seed, use_cpu=use_cpu)
    report |= {"min_retention": min_retention, "passed": _is_kept(report, min_retention)}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(report)
    else:
        show_evaluation(report)
    if report["passed"] is False:
        raise typer.Exit(NOT_KEPT)


def _check(teacher: str | None, min_retention: float | None) -> None:
    if min_retention is None:
        return
    if teacher is None:
        raise ValueError(f"--min-retention {min_retention} compares with a teacher, but none is given: add --teacher.")
    if not 0 < min_retention:
        raise ValueError(f"--min-retention {min_retention} is no share that could be kept: give one such as 0.98.")


def _is_kept(report: Report, least: float | None) -> bool | None:
    if least is None:
        return None
    retention = report["retention"]["retention"]
    # One that is not defined is not known to have been kept.
    return retention is not None and retention >= least - _ROUNDING


def show_evaluation(report: Report) -> None:
    """Shows what was measured.

    Args:
        report (`dict`): As `hf_compress.jobs.evaluate.evaluate_model` returns it.
    """
    show_facts([(name, value) for name, value in _facts(report) if value])
    show_table(("batch", "ms", "95th %", *(("teacher ms", "faster") if report["teacher"] else ())), _times(report))


def _facts(report: Report) -> list[tuple[str, str | None]]:
    quality, cost, before = report["quality"], report["cost"], report["teacher_cost"]
    metric, kept = report["metric"], report["retention"]
    sizes = cost["conditions"]
    times = report["latency_conditions"]

    def beside(value: float, of_teacher: float | None, words: str) -> str:
        return words if not of_teacher else f"{words} (the teacher's: {of_teacher / max(1, value):.2f}x)"

    facts = [
        ("model", report["model"]),
        ("teacher", report["teacher"]),
        ("data", f"{report['rows_measured_on']} rows of {report['split']} of {report['dataset']}"),
        (metric, _with_interval(quality["value"], quality["interval"], is_share(metric))),
    ]
    if kept is not None:
        share = _with_interval(kept["retention"], kept["retention_interval"], True)
        least = report["min_retention"]
        verdict = "" if least is None else f", at least {100 * least:g} %: {'yes' if report['passed'] else 'no'}"
        facts += [
            ("teacher's", _with_interval(kept["teacher"], None, is_share(metric))),
            ("kept", f"{share}{verdict}"),
            ("agreement", None if kept["agreement"] is None else f"{100 * kept['agreement']:.1f} % of the decisions"),
        ]
    total, n_bytes = cost["parameters"]["total"], cost["bytes_on_disk"]
    macs = cost["macs"] / sizes["batch_size"]
    of_teacher = before or {"parameters": {"total": None}, "bytes_on_disk": None, "macs": None}
    return [
        *facts,
        ("parameters", beside(total, of_teacher["parameters"]["total"], f"{total / 1e6:.2f} M")),
        ("size", beside(n_bytes, of_teacher["bytes_on_disk"], f"{megabytes(n_bytes)} MB")),
        (
            "MACs",
            beside(cost["macs"], of_teacher["macs"], f"{macs / 1e6:.2f} M for {sizes['sequence_length']} tokens"),
        ),
        ("loads", "after `import hf_compress`" if report["needs_hf_compress"] else "without hf_compress"),
        ("machine", f"{times['device']} ({times['processor']}), {times['threads']} threads"),
        ("versions", f"torch {times['torch_version']}, transformers {times['transformers_version']}"),
        ("timed", f"{times['sequence_length']} tokens, {times['n_runs']} runs, median"),
    ]


def _with_interval(value: float | None, interval: Sequence[float | None] | None, is_percent: bool) -> str:
    if value is None:
        return "not defined on these rows"
    scale, digits, unit = (100, 1, " %") if is_percent else (1, 3, "")
    words = f"{scale * value:.{digits}f}{unit}"
    if interval is None or None in interval:
        return words
    low, high = (f"{scale * end:.{digits}f}" for end in interval)
    return f"{words} (95 % interval {low} to {high})"


def _times(report: Report) -> list[tuple[str, ...]]:
    rows = []
    for size, one in report["latency"].items():
        row = (size, f"{1000 * one['median_s']:.1f}", f"{1000 * one['p95_s']:.1f}")
        if report["teacher"]:
            row += (f"{1000 * one['teacher']['median_s']:.1f}", f"{1 / one['ratio']:.2f}x")
        rows.append(row)
    return rows
