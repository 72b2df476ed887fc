"""A text classifier pruned to one budget or several, saved, reloaded, measured and reported."""

import json
import logging
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_compress.checkpoint.widths import read_widths
from hf_compress.classifiers import Yardstick, choose_metric, load_all, load_classifier, measure_all
from hf_compress.data import check_length, check_splits, check_tokenizer, label_ids, load_splits, tokenize
from hf_compress.job import PRUNED, PruneJob, check_output, prune_settings
from hf_compress.modeling.blocks import Block, find_blocks
from hf_compress.pruning.calibration import calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.costs import Costs
from hf_compress.pruning.figure import draw_widths
from hf_compress.pruning.prune import prune
from hf_compress.pruning.structured import check_prunable, choose_units
from hf_compress.pruning.units import find_sites
from hf_compress.report import title, write_report
from hf_compress.stages import REPORT_FILE, open_run, save_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DENSE = "dense"
CALIBRATION_BATCH = 32

Configs = dict[str, StructuredPruningConfig]


class Material(NamedTuple):
    """What a run works with, checked.

    Attributes:
        model (`PreTrainedModel`): The model to prune.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        batches (`list[dict[str, torch.Tensor]]`): Texts to calibrate with.
        test (`Dataset`): Tokenized rows to measure on.
        metric (`str`): What quality is measured by.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    batches: list[dict[str, torch.Tensor]]
    test: Dataset
    metric: str


def prune_classifier(
    job: PruneJob, config: StructuredPruningConfig, splits: DatasetDict | None = None
) -> dict[str, Any]:
    """Prunes a text classifier with unlabelled texts, saves, reloads and measures it beside the dense one.

    A run that was stopped continues when called again with the same arguments.

    Args:
        job (`PruneJob`): What to prune, on which data; `output_dir` gets `pruned/` and `widths.png` (with
            `job.budgets`, `pruned-0.5/` and `widths-0.5.png`), `report.json` and `report.md`.
        config (`StructuredPruningConfig`): How to prune.
        splits (`DatasetDict`, *optional*): The data, where they are no file and have no name on the Hub.

    Returns:
        `dict`: The report, as in `report.json`.

    Raises:
        ValueError: if the data do not fit the model, a budget cannot be met, or the output folder holds something
            else; before anything is calibrated or written.
    """
    output = Path(job.output_dir)
    configs = job.configs(config)
    check_output(job, job.output_dir)
    splits = load_splits(job.dataset, job.dataset_name) if splits is None else splits
    material = prepare(job, config, splits)
    for one in configs.values():
        check_budget(material, one)
    open_run(output, prune_settings(job, config), job.overwrite, [*configs, *map(figure_name, configs)])
    prune_missing(output, configs, material)
    write_report(measure(job, config, configs, material), output)
    return json.loads((output / REPORT_FILE).read_text())


def prepare(job: PruneJob, config: StructuredPruningConfig, splits: DatasetDict) -> Material:
    """Checks data, tokenizer and model against each other, and tokenizes.

    Args:
        job (`PruneJob`): What to prune.
        config (`StructuredPruningConfig`): Whether labels are used, and the seed of the choice of texts.
        splits (`DatasetDict`): The data.

    Returns:
        `Material`: Ready for calibration.

    Raises:
        ValueError: if a split, a column, a label, the tokenizer, the task head or the metric does not fit.
    """
    test_split = check_splits(splits, job.eval_split, job.text_columns, job.label_column, trains=config.use_labels)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = load_classifier(job.model)
    check_prunable(model)
    check_tokenizer(tokenizer, model)
    metric = choose_metric(job.metric, model)

    def encode(split: str, rows: Dataset, with_labels: bool) -> Dataset:
        labels = label_ids(rows, split, job.label_column, model.config) if with_labels else None
        return tokenize(rows, tokenizer, job.text_columns, labels, job.max_length)

    n_texts = min(job.n_texts, len(splits["train"]))
    chosen = random.Random(config.seed).sample(range(len(splits["train"])), n_texts)
    texts = encode("train", splits["train"].select(chosen), config.use_labels)
    test = encode(test_split, splits[test_split], True)
    check_length(model, max(texts, test, key=lambda rows: max(rows["length"])))
    logger.info("%d texts to calibrate with, %d of the split %s to measure on.", n_texts, len(test), test_split)
    return Material(model.to(device_of(job)), tokenizer, calibration_batches(texts, tokenizer), test, metric)


def device_of(job: PruneJob) -> torch.device:
    """Where to prune and measure: on the accelerator, if there is one and the job does not leave it alone."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or job.use_cpu else accelerator


def calibration_batches(texts: Dataset, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, torch.Tensor]]:
    """Batches of texts of similar length, so that there is little padding.

    Args:
        texts (`Dataset`): Tokenized rows, as `tokenize` returns them.
        tokenizer (`PreTrainedTokenizerBase`): Pads them.

    Returns:
        `list[dict[str, torch.Tensor]]`: From the shortest texts to the longest.
    """
    collate = DataCollatorWithPadding(tokenizer)
    lengths = texts["length"][:]
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
    rows = list(texts.select(by_length).remove_columns("length"))
    return [dict(collate(rows[i : i + CALIBRATION_BATCH])) for i in range(0, len(rows), CALIBRATION_BATCH)]


def check_budget(material: Material, config: StructuredPruningConfig) -> None:
    """Raises if no plan can meet a budget, which does not depend on what units are worth.

    Args:
        material (`Material`): The model and the texts.
        config (`StructuredPruningConfig`): The budget, and what may be cut. Whole layers and measured times are left
            to the pruning: nothing says what they cost before that.

    Raises:
        ValueError: if it cannot be met.
    """
    if config.cost == "latency" or config.units == ("layers",):
        return
    blind = replace(config, score="l1", use_labels=False, repair="none")
    sites = find_sites(find_blocks(material.model))
    calibration = calibrate(material.model, blind, material.batches)
    costs = Costs(config.cost, sites, calibration.batches)
    choose_units(sites, blind, calibration, costs, config.budget * costs.total(sites))


def prune_missing(output: Path, configs: Configs, material: Material) -> None:
    """Prunes to the budgets whose models are not saved yet.

    Args:
        output (`Path`): The run's folder.
        configs (`dict[str, StructuredPruningConfig]`): What to prune to, by the name of the folder.
        material (`Material`): The model, which comes to be in float32, and the texts.
    """
    missing = {name: config for name, config in configs.items() if not (output / name).exists()}
    for name in configs:
        if name not in missing:
            logger.info("%s is there already.", name)
    if not missing:
        return
    dense, dtype = material.model, material.model.dtype
    first = next(iter(missing.values()))
    if first.cost != "latency":
        # Scores and fits suffer from half precision; times have to be those of the dtype that is saved.
        dense.float()
    calibration = calibrate(dense, first, material.batches)
    for name, config in missing.items():
        logger.info("Pruning to %g %% of the %s.", 100 * config.budget, config.cost)
        save_whole(output / name, prune(dense, config, calibration).to(dtype), material.tokenizer)


def measure(job: PruneJob, config: StructuredPruningConfig, configs: Configs, material: Material) -> dict[str, Any]:
    """Reloads the saved models, measures them side by side, and draws what was kept of each layer.

    Args:
        job (`PruneJob`): Names the data and the folder.
        config (`StructuredPruningConfig`): How they were pruned.
        configs (`dict[str, StructuredPruningConfig]`): What they were pruned to, by the name of the folder.
        material (`Material`): The rows to measure on.

    Returns:
        `dict`: The report.
    """
    logger.info("Measuring the saved models on %d rows.", len(material.test))
    output = Path(job.output_dir)
    paths = {DENSE: job.model} | {name: str(output / name) for name in configs}
    models = load_all(paths, device_of(job))
    yardstick = Yardstick(material.test, material.tokenizer, material.metric, job.eval_batch_size, config.seed)
    # Each model has a budget of its own.
    how = {name: value for name, value in asdict(config).items() if name != "budget"}
    report = {
        "job": {name: value for name, value in asdict(job).items() if name not in ("overwrite", "output_dir")},
        "pruning": how | {"units": list(config.units)},
        "texts_calibrated_on": sum(len(batch["input_ids"]) for batch in material.batches),
        **measure_all(models, paths, yardstick),
        "gain": None,
    }
    dense, *pruned = report["models"]
    dense["widths"] = read_widths(models[DENSE])
    for row in pruned:
        name = row["name"]
        row |= {"budget": configs[name].budget, "figure": figure_name(name)}
        row["widths"] = widths_as_in(models[DENSE], models[name])
        draw_widths(dense["widths"], row["widths"], output / row["figure"], title(report | {"models": [dense, row]}))
    return report


def figure_name(name: str) -> str:
    """The file of a model's figure: `widths.png` for `pruned`, `widths-0.5.png` for `pruned-0.5`."""
    return f"{name.replace(PRUNED, 'widths', 1)}.png"


def widths_as_in(dense: "PreTrainedModel", pruned: "PreTrainedModel") -> dict[str, dict[str, int]]:
    """The widths of a model's blocks, each under its name in the dense model.

    Args:
        dense (`PreTrainedModel`): The model before it was pruned.
        pruned (`PreTrainedModel`): The model; where whole layers went, the names of later ones have moved.

    Returns:
        `dict[str, dict[str, int]]`: As `read_widths` gives them.
    """
    before, after = read_widths(dense), read_widths(pruned)
    if before.keys() == after.keys():
        return after
    # Where whole layers go, the others stay as they are, and in order.
    places = iter(zip(before, find_blocks(dense), strict=True))
    blocks = zip(after.values(), find_blocks(pruned), strict=True)
    return {next(name for name, other in places if _is_same(block, other)): widths for widths, block in blocks}


def _is_same(block: Block, other: Block) -> bool:
    return all(map(torch.equal, block.module.parameters(), other.module.parameters()))
