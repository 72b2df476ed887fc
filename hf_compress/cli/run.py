"""`hf-compress run`: a recipe from the command line."""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress.report.tables import print_json, show_table, show_text

if TYPE_CHECKING:
    from hf_compress.recipe.recipe import Recipe

# A gate of the recipe was not passed.
STOPPED = 3


@dataclass
class RunJob:
    """Where a recipe's run writes, and what takes the place of the recipe's own words."""

    output_dir: str = field(metadata={"help": "Folder for the models, the reports and the card."})
    model: str | None = field(default=None, metadata={"help": "The model, in the place of the recipe's."})
    dataset: str | None = field(default=None, metadata={"help": "The data, in the place of the recipe's."})
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Column of the texts, two for pairs, or the column of words."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to measure on."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens per row at most."})
    train_rows: int | None = field(default=None, metadata={"help": "Rows of train to learn from."})
    metric: str | None = field(default=None, metadata={"help": "What quality is."})
    seed: int | None = field(default=None, metadata={"help": "Of all that is drawn by chance."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print what would be done, with the sizes expected, and stop."}
    )
    json: bool = field(default=False, metadata={"help": "Print the report as JSON instead of a table."})
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the results of an earlier run in the folder, and start anew."}
    )

    def overrides(self) -> dict[str, Any]:
        """What takes the place of the recipe's own words."""
        names = ("model", "dataset", "dataset_name", "text_columns", "label_column", "eval_split", "max_length")
        return {name: getattr(self, name) for name in (*names, "train_rows", "metric", "seed")}


def run_recipe(file: str, job: RunJob) -> int:
    """Runs a recipe, or shows what it would do, and prints the result.

    Args:
        file (`str`): The recipe.
        job (`RunJob`): The options.

    Returns:
        `int`: Exit code: 0, or 3 if an `evaluate` step was not passed.

    Raises:
        ValueError: if the recipe, the data or the model cannot be used.
    """
    from accelerate import PartialState

    from hf_compress.pipeline.compress import compress
    from hf_compress.recipe.recipe import Recipe
    from hf_compress.report.run_page import show_run

    recipe = Recipe.from_yaml(Path(file), **job.overrides())
    if job.dry_run:
        show_plan(recipe, job)
        return 0
    # `Trainer` logs to where the report is to go.
    with contextlib.redirect_stdout(sys.stderr):
        report = compress(recipe, job.output_dir, overwrite=job.overwrite)
    if PartialState().is_main_process:
        if job.json:
            print_json(report)
        else:
            show_run(report, Path(job.output_dir))
    return STOPPED if report["stopped_by"] else 0


def show_plan(recipe: "Recipe", job: RunJob) -> None:
    """Prints what a recipe would do: the steps, what is there already, and the sizes expected.

    Args:
        recipe (`Recipe`): The recipe.
        job (`RunJob`): Where it would write.
    """
    rows = plan_rows(recipe, Path(job.output_dir))
    if job.json:
        print_json(rows)
        return
    shown = [
        (
            row["name"],
            ", ".join(f"{name} {value}" for name, value in row["settings"].items()),
            row["state"],
            f"{row['megabytes']:.1f}",
            f"{100 * row['macs']:.0f} %",
        )
        for row in rows
    ]
    show_table(("step", "settings", "state", "MB", "MACs"), shown)
    show_text("Nothing was done. MB and MACs are expected from the settings; the run measures them.")


def plan_rows(recipe: "Recipe", output: Path) -> list[dict[str, Any]]:
    """The steps of a recipe as they would be done.

    Args:
        recipe (`Recipe`): The recipe.
        output (`Path`): Where it would write.

    Returns:
        `list[dict]`: `name`, `settings`, `state` ("there" or "to do"), `megabytes`, and `macs` as a share.
    """
    from transformers import AutoTokenizer

    from hf_compress.jobs.task_data import read_task
    from hf_compress.pipeline.checks import check_before
    from hf_compress.pipeline.estimate import estimate
    from hf_compress.pipeline.state import places_of

    data = read_task(recipe.data, recipe.seed)
    model = check_before(recipe, data, output)
    sizes = estimate(recipe, model, AutoTokenizer.from_pretrained(recipe.model), data)
    rows = []
    settings_of = recipe.to_dict()["steps"]
    for place, settings, size in zip(places_of(recipe, output, data.digest), settings_of, sizes, strict=True):
        is_there = place.folder.exists() and bool(place.read_entry())
        rows.append(
            {
                "name": place.name,
                "settings": next(iter(settings.values())),
                "state": "there" if is_there else "to do",
                "megabytes": round(size.megabytes, 3),
                "macs": round(size.macs, 4),
            }
        )
    return rows
