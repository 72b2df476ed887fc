"""A text classifier pruned to one budget or several, saved, reloaded, measured and reported."""

import json
import logging
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from hf_compress.hub.card import write_card
from hf_compress.jobs.classifiers import DENSE, Yardstick, load_all, measure_all
from hf_compress.jobs.data import check_splits, load_splits
from hf_compress.jobs.inputs import inputs_digest, rows_digest
from hf_compress.jobs.job import PRUNED, CalibratedJob, check_output, job_settings, prune_settings
from hf_compress.jobs.lock import alone_in
from hf_compress.jobs.material import Material, Part, device_of, draw, load_material
from hf_compress.jobs.prune_kinds import Config, Kind, kind_of, uses_labels
from hf_compress.jobs.stages import INPUTS, REPORT_FILE, open_run, save_whole
from hf_compress.pruning.prune import prune
from hf_compress.recipe.format_options import plain
from hf_compress.report.report import title, write_report

logger = logging.getLogger(__name__)

Configs = dict[str, Config]


def prune_classifier(job: CalibratedJob, config: Config, splits: DatasetDict | None = None) -> dict[str, Any]:
    """Prunes a text classifier with unlabelled texts, saves, reloads and measures it beside the dense one.

    A run that was stopped continues when called again with the same arguments.

    Args:
        job (`PruneJob` or `SparsifyJob`): What to prune, on which data; `output_dir` gets `pruned/` and `widths.png`
            or `sparsity.png` (with several budgets or sparsities, `pruned-0.5/` and `widths-0.5.png`), `report.json`
            and `report.md`.
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): How to prune.
        splits (`DatasetDict`, *optional*): The data, where they are no file and have no name on the Hub.

    Returns:
        `dict`: The report, as in `report.json`.

    Raises:
        ValueError: if the data do not fit the model, the model cannot be pruned so, or the output folder holds
            something else; before anything is calibrated or written.
        TypeError: if the config is of no known kind.
    """
    kind, output, configs = kind_of(config), Path(job.output_dir), job.configs(config)
    check_output(job.model, job.dataset, job.output_dir)
    rows = None if splits is None else rows_digest(splits, [*job.text_columns, job.label_column])
    settings = prune_settings(job, config) | {INPUTS: inputs_digest(job.model, job.dataset, output, rows)}
    splits = load_splits(job.dataset, job.dataset_name) if splits is None else splits
    material = prepare(job, config, splits)
    for one in configs.values():
        kind.check(material.model, one, material.batches)
    made = [*configs, *(figure_name(kind, name) for name in configs)]
    with alone_in(output):
        open_run(output, settings, job.overwrite, made)
        prune_missing(output, configs, material)
        report = measure(job, config, configs, material)
        for name in configs:
            write_card(report, output / name)
        write_report(report, output)
    return json.loads((output / REPORT_FILE).read_text())


def prepare(job: CalibratedJob, config: Config, splits: DatasetDict) -> Material:
    """Checks data, tokenizer and model against each other, and tokenizes.

    Args:
        job (`PruneJob` or `SparsifyJob`): What to prune.
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): Whether labels are used, and the seed of the
            choice of texts.
        splits (`DatasetDict`): The data.

    Returns:
        `Material`: Ready for calibration.

    Raises:
        ValueError: if a split, a column, a label, the tokenizer, the task head or the metric does not fit.
    """
    with_labels = uses_labels(config)
    test_split = check_splits(splits, job.eval_split, job.text_columns, job.label_column, trains=with_labels)
    texts = Part("train", draw(splits["train"], job.n_texts, config.seed), with_labels)
    return load_material(job, Part(test_split, splits[test_split], True), texts)


def prune_missing(output: Path, configs: Configs, material: Material) -> None:
    """Prunes those models that are not saved yet.

    Args:
        output (`Path`): The run's folder.
        configs (`dict[str, Config]`): What to prune to, by the name of the folder.
        material (`Material`): The model, which may come to be in float32, and the texts.
    """
    missing = {name: config for name, config in configs.items() if not (output / name).exists()}
    for name in configs:
        if name not in missing:
            logger.info("%s is there already.", name)
    if not missing:
        return
    dense, dtype = material.model, material.model.dtype
    first = next(iter(missing.values()))
    data = kind_of(first).get_data(dense, first, material.batches)
    for name, config in missing.items():
        logger.info("Pruning to %s.", name)
        save_whole(output / name, prune(dense, config, data).to(dtype), material.tokenizer)


def measure(job: CalibratedJob, config: Config, configs: Configs, material: Material) -> dict[str, Any]:
    """Reloads the saved models, measures them side by side, and draws what was kept of each layer.

    Args:
        job (`PruneJob` or `SparsifyJob`): Names the data and the folder.
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): How they were pruned.
        configs (`dict[str, Config]`): What they were pruned to, by the name of the folder.
        material (`Material`): The rows to measure on.

    Returns:
        `dict`: The report.
    """
    logger.info("Measuring the saved models on %d rows.", len(material.test))
    kind, output = kind_of(config), Path(job.output_dir)
    paths = {DENSE: job.model} | {name: str(output / name) for name in configs}
    models = load_all(paths, device_of(job.use_cpu))
    yardstick = Yardstick(material.test, material.tokenizer, material.metric, job.eval_batch_size, config.seed)
    report = {
        "job": job_settings(job),
        # Each model has a share of its own.
        "pruning": {name: value for name, value in plain(config).items() if name != kind.share},
        "texts_calibrated_on": sum(len(batch["input_ids"]) for batch in material.batches),
        **measure_all(models, paths, yardstick),
        "gain": None,
    }
    dense, *pruned = report["models"]
    for row in pruned:
        name = row["name"]
        of_dense, found = kind.compare(models[DENSE], models[name], material.batches)
        dense |= of_dense
        row |= found | {kind.share: getattr(configs[name], kind.share), "figure": figure_name(kind, name)}
        kind.draw(of_dense, found, output / row["figure"], title(report | {"models": [dense, row]}))
    return report


def figure_name(kind: Kind, name: str) -> str:
    """The file of a model's figure: `widths.png` for `pruned`, `widths-0.5.png` for `pruned-0.5`."""
    return f"{name.replace(PRUNED, kind.figure, 1)}.png"
