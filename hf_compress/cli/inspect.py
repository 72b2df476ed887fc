"""`hf-compress inspect`: what a saved model or a run holds, on the command line."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_compress.report.tables import in_words, megabytes, print_json, show_facts, show_table, show_text
from hf_compress.report.words import is_share

_LABELS_SHOWN = 8
# Fields of bitsandbytes that the name of its format says.
_IMPLIED = ("quant_method", "bnb_4bit_quant_type")

Content = dict[str, Any]


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a saved model, or of a run of hf-compress.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for other programs.")] = False,
) -> None:
    """Show what a saved model or a run holds. Nothing is run, and no weights are read.

    \b
    Of a model: task and labels, heads and neurons that each layer kept,
    number formats, what is stored without zeros, bytes of each part, and
    the recipe that it comes from, if a file in its folder or beside it tells.
    Of a run: a line for each step, then its result as a model.

    \b
    Examples:
      hf-compress inspect ./out/03-prune
      hf-compress inspect ./out
      hf-compress inspect ./model --json | jq .bytes.parts
    """
    from hf_compress.report.inspect_checkpoint import inspect as read

    content = read(path)
    if as_json:
        print_json(content)
    elif content["kind"] == "run":
        show_run(content)
    else:
        show_checkpoint(content)


def show_run(run: Content) -> None:
    """Shows what a run did, and its result.

    Args:
        run (`dict`): As `hf_compress.report.inspect_checkpoint.inspect` returns it.
    """
    stopped = run["stopped_by"]
    state = "finished" if run["is_finished"] else "not finished: the same command continues it"
    facts = [
        ("run", run["path"]),
        ("state", f"stopped by {stopped['step']}: {stopped['reason']}" if stopped else state),
        ("command", f"hf-compress {run['command']}" if run["command"] else None),
        ("model", run["model"]),
        ("data", run["dataset"]),
        ("result", run["result"] or "none"),
    ]
    show_facts([(name, value) for name, value in facts if value])
    metric = run["metric"] or "metric"
    show_table(("step", metric, "kept %", "MB", "faster", "state"), [_step_row(step, run) for step in run["steps"]])
    if run["checkpoint"] is not None:
        show_text()
        show_checkpoint(run["checkpoint"])


def _step_row(step: Content, run: Content) -> tuple[str, ...]:
    value, retention, ratio = step["value"], step["retention"], step["latency_ratio"]
    is_percent = run["metric"] is not None and is_share(run["metric"])
    if step["passed"] is not None:
        state = "passed" if step["passed"] else f"not passed: {step['reason']}"
    elif not step["is_done"]:
        state = "to do"
    elif step["name"] == run["reference"]:
        state = "what the others are compared with"
    else:
        state = "result" if step["folder"] == run["result"] else "done"
    return (
        step["name"],
        "-" if value is None else f"{100 * value:.1f} %" if is_percent else f"{value:.3f}",
        "-" if retention is None else f"{100 * retention:.1f}",
        "-" if step["bytes"] is None else megabytes(step["bytes"]),
        f"{1 / ratio:.2f}x" if ratio else "-",
        state,
    )


def show_checkpoint(content: Content) -> None:
    """Shows what a saved model holds.

    Args:
        content (`dict`): As `hf_compress.report.inspect_checkpoint.inspect_checkpoint` returns it.
    """
    show_facts([(name, value) for name, value in _facts(content) if value])
    if content["blocks"]:
        show_table(("layers", "heads", "neurons"), list(_layer_rows(content["blocks"])))
    formats = [
        (one["format"], in_words(_chosen(one["fields"])), str(len(one["modules"])), megabytes(one["bytes"]))
        for one in content["formats"]
    ]
    show_table(("format", "settings", "matrices", "MB"), formats)
    parts, total = content["bytes"]["parts"], content["bytes"]["tensors"]
    if parts is not None:
        rows = [(name, megabytes(n), f"{100 * n / max(1, total):.1f}") for name, n in parts.items()]
        show_table(("part", "MB", "%"), rows)
    if content["recipe"] is not None:
        show_text(f"\nMade from {content['recipe']['model']} ({content['recipe']['file']}):")
        for number, step in enumerate(content["recipe"]["steps"], 1):
            name, settings = next(iter(step.items()))
            words = in_words(settings or {})
            show_text(f"{number}. {name}{f': {words}' if words else ''}")


def _facts(content: Content) -> Iterator[tuple[str, str | None]]:
    yield "folder", content["path"]
    yield "model", f"{content['class']} ({content['model_type']})"
    labels = content["labels"] or []
    shown = ", ".join(map(str, labels[:_LABELS_SHOWN])) + (", ..." if len(labels) > _LABELS_SHOWN else "")
    what = f"{len(labels)} labels: {shown}" if labels else content["problem_type"]
    yield "task", content["task"] and f"{content['task']}{f' ({what})' if what else ''}"
    other = f", with {content['other_library']} installed" if content["other_library"] else ""
    needs = content["needs_hf_compress"]
    yield "loads", f"{'after `import hf_compress`' if needs else 'as any stock checkpoint'}{other}"
    yield "dtype", content["dtype"]
    yield "vocabulary", content["vocabulary"] and f"{content['vocabulary']} tokens"
    stacks = content["stacks"] or {}
    yield "layers", ", ".join(f"{n} ({name})" for name, n in stacks.items())
    yield "hidden size", content["hidden_size"] and str(content["hidden_size"])
    total = content["parameters"]["total"]
    yield "parameters", f"{total / 1e6:.1f} M" if total >= 1e6 else str(total)
    yield "size", f"{megabytes(content['bytes']['files'])} MB"
    sparse = content["sparse"]
    if sparse is not None:
        yield "sparse", f"{len(sparse['weights'])} weights without their zeros, {100 * sparse['share']:.1f} % of them"
    missing = content["missing"]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        yield "not stored", f"{', '.join(missing[:3])}{more}: from_pretrained makes them new, untrained"
    yield "note", content["note"]


def _layer_rows(blocks: list[Content]) -> Iterator[tuple[str, str, str]]:
    """Layers that follow each other and are alike share a row."""
    alike = groupby(blocks, key=lambda block: {name: value for name, value in block.items() if name != "index"})
    for block, group in alike:
        indices = [one["index"] for one in group]
        span = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
        repeats = f", {block['repeats']} times" if block["repeats"] > 1 else ""
        heads = ", ".join(_heads(block, kind) for kind in block["heads"])
        yield f"{block['stack']} {span}{repeats}", heads, _of(block["neurons"], block["of_neurons"])


def _heads(block: Content, kind: str) -> str:
    before = block["of_heads"]
    words = _of(block["heads"][kind], before and before[kind])
    if block["groups"][kind] != block["heads"][kind]:
        words += f" in {block['groups'][kind]} groups"
    return words if len(block["heads"]) == 1 else f"{words} ({kind})"


def _of(left: int, before: int | None) -> str:
    return str(left) if before is None else f"{left} of {before}"


def _chosen(fields: Content) -> Content:
    """The fields of a format without what its name says."""
    return {name: value for name, value in fields.items() if not name.startswith("load_in_") and name not in _IMPLIED}
