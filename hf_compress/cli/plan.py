"""`hf-compress plan`: a recipe proposed for a model, from what pruning and rounding do to it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.prompt import IntPrompt

from hf_compress.report.tables import print_json, show_table

if TYPE_CHECKING:
    from hf_compress.pipeline.planner import Proposal, Sensitivity

_SHOWN = 8


@dataclass
class PlanJob:
    """What a model is to become, and the data to find out on."""

    dataset: str = field(metadata={"help": "Labelled rows: a name on the Hub, or a folder with train and test files."})
    output: str = field(default="recipe.yaml", metadata={"help": "File for the recipe."})
    target_mb: float | None = field(
        default=None, metadata={"help": "Megabytes (10^6 bytes) that the model may have on disk. By default, any."}
    )
    max_macs: float = field(
        default=1.0, metadata={"help": "Share of the blocks' multiply-accumulates that may be left, 0.2 for a fifth."}
    )
    min_retention: float = field(
        default=0.98, metadata={"help": "Share of the metric that must be kept, which the recipe checks in the end."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "Column of the texts, two for pairs, or the column of words."},
    )
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split that the recipe will measure on; nothing is chosen on it."}
    )
    max_length: int = field(default=64, metadata={"help": "Tokens per row at most."})
    n_texts: int = field(default=256, metadata={"help": "Texts to calibrate with."})
    n_rows: int = field(default=500, metadata={"help": "Rows to score on."})
    seed: int = field(default=0, metadata={"help": "Of the choice of rows."})
    yes: bool = field(default=False, metadata={"help": "Take the first proposal without asking."})
    json: bool = field(default=False, metadata={"help": "Print what was found as JSON, and ask nothing."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the file, if it is there."})

    def __post_init__(self) -> None:
        for name in ("target_mb", "max_macs", "min_retention"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: give a number above 0.")


def plan_recipe(model: str, job: PlanJob) -> None:
    """Measures a model, shows the proposals, and writes the one that is chosen.

    Args:
        model (`str`): A fine-tuned model: a folder, or a name on the Hub.
        job (`PlanJob`): What it is to become.

    Raises:
        ValueError: if the file is there already, the data do not fit the model, or nothing gets so small.
    """
    from transformers import AutoTokenizer

    from hf_compress.jobs.task_data import read_task
    from hf_compress.pipeline.checks import check_before
    from hf_compress.pipeline.planner import as_recipe, measure_sensitivity, propose
    from hf_compress.recipe.recipe import Recipe
    from hf_compress.recipe.steps import DataConfig, PruneStep

    file = Path(job.output)
    if file.exists() and not job.overwrite:
        raise ValueError(f"There is a file {file} already: give another one, or --overwrite to replace it.")
    names = ("dataset", "dataset_name", "text_columns", "label_column", "eval_split", "max_length")
    config = DataConfig(**{name: getattr(job, name) for name in names})
    recipe = Recipe(model, config, [PruneStep()], seed=job.seed)
    data = read_task(config, job.seed)
    loaded = check_before(recipe, data, file)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = measure_sensitivity(loaded, tokenizer, data, n_texts=job.n_texts, n_rows=job.n_rows, seed=job.seed)
    proposals = propose(found, job.target_mb, job.min_retention, job.max_macs)[:_SHOWN]
    chosen = _choose(job, found, proposals)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_recipe(chosen, recipe).to_yaml(), encoding="utf-8")
    if not job.json:
        Console(highlight=False).print(
            f"Wrote {file}. Run it: hf-compress run {file} --output-dir FOLDER", soft_wrap=True
        )


def _choose(job: PlanJob, found: "Sensitivity", proposals: "list[Proposal]") -> "Proposal":
    if job.json:
        print_json({"sensitivity": _plain(found), "proposals": [one.to_dict() for one in proposals]})
        return proposals[0]
    console = Console(highlight=False)
    _show(console, found, proposals)
    if job.yes or not sys.stdin.isatty():
        return proposals[0]
    choices = [str(number) for number in range(1, len(proposals) + 1)]
    return proposals[IntPrompt.ask("Which one", console=console, choices=choices, default=1) - 1]


def _show(console: Console, found: "Sensitivity", proposals: "list[Proposal]") -> None:
    pruned = ", ".join(f"{100 * budget:g} %: {100 * kept:.1f}" for budget, kept in found.pruned.items())
    rounded = ", ".join(f"{name}: {100 * kept:.1f}" for name, kept in found.rounded.items())
    where = "held-out rows" if found.held_out else "rows of train, which the model may know"
    console.print(f"Kept on {found.rows} {where}, in percent of the metric, without training:")
    console.print(f"  pruned to a share of the multiply-accumulates: {pruned}")
    console.print(f"  rounded: {rounded}")
    if found.tokens is not None:
        console.print(f"  {100 * found.tokens:.0f} % of the tokens are used by the texts.")
    rows = [
        (
            str(number),
            " > ".join(_word(step) for step in one.steps if step.key != "evaluate"),
            f"{one.megabytes:.1f}",
            f"{100 * one.macs:.0f} %",
            f"{100 * one.retention:.1f} %",
            "before the recovery" if one.needs_training else "",
        )
        for number, one in enumerate(proposals, start=1)
    ]
    show_table(("", "steps", "MB", "MACs", "kept", ""), rows)
    console.print("Expected, not measured: the run measures, and stops where less is kept than asked for.")


def _word(step: Any) -> str:
    if step.key == "prune":
        return f"prune to {step.budget:g}"
    if step.key == "quantize":
        return " ".join(["quantize to", step.format, *(f"{v}" for k, v in step.options.items() if k == "bits")])
    return step.key


def _plain(found: "Sensitivity") -> dict[str, Any]:
    return {
        "megabytes": found.size.megabytes,
        "tokens": found.tokens,
        "pruned": {str(budget): kept for budget, kept in found.pruned.items()},
        "rounded": found.rounded,
        "rows": found.rows,
        "held_out": found.held_out,
    }
