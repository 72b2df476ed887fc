"""A text classifier quantized to one format or several, saved, reloaded, measured and reported."""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import DatasetDict
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from hf_compress import recommend
from hf_compress.formats.packed import PackedModule
from hf_compress.hub.card import write_card
from hf_compress.jobs.classifiers import DENSE, Yardstick, cost_batch, load_all, measure_all, score_alone
from hf_compress.jobs.data import check_columns, check_splits, evaluation_split, load_splits
from hf_compress.jobs.inputs import inputs_digest, rows_digest
from hf_compress.jobs.job import QuantizeJob, check_output, job_settings
from hf_compress.jobs.lock import alone_in
from hf_compress.jobs.material import Material, Part, by_length, device_of, draw, hold_out, load_material
from hf_compress.jobs.quantize_figure import draw_formats, draw_noise
from hf_compress.jobs.stages import INPUTS, REPORT_FILE, RUN_FILE, open_run, save_whole
from hf_compress.modeling.blocks import find_blocks
from hf_compress.quantization.gate import excluded_names
from hf_compress.quantization.modules import check_float, choose_modules
from hf_compress.quantization.noise import measure_noise
from hf_compress.quantization.quantize import quantize
from hf_compress.recipe.format_options import format_settings, needs_texts
from hf_compress.report.files import write_whole
from hf_compress.report.report import title, write_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FORMATS_FIGURE, NOISE_FIGURE = "formats.png", "noise.png"
# What was timed, and chosen: a run that continues must not choose again.
CHOICE_FILE = "choice.json"

Batch = Mapping[str, Any]
Configs = Mapping[str, Any]


def quantize_classifier(job: QuantizeJob, configs: Configs, splits: DatasetDict | None = None) -> dict[str, Any]:
    """Quantizes a text classifier, saves, reloads and measures it beside the one in floating point.

    A run that was stopped continues when called again with the same arguments.

    Args:
        job (`QuantizeJob`): What to quantize, on which data; `output_dir` gets a folder for each format,
            `formats.png`, `noise.png` where modules are in a number format of this library, `report.json` and
            `report.md`.
        configs (`Mapping[str, Any]`): What `quantize` takes, by what the model is called. With `job.auto`, names in
            `recommend.FORMATS` to choose from; empty for all.
        splits (`DatasetDict`, *optional*): The data, where they are no file and have no name on the Hub.

    Returns:
        `dict`: The report, as in `report.json`.

    Raises:
        ValueError: if the data do not fit the model, the model is quantized already or cannot be quantized so, the
            score cannot hold, or the output folder holds something else.
        TypeError: if a config is of no known kind.
        ImportError: if a format needs bitsandbytes, and it is missing.
    """
    output = Path(job.output_dir)
    candidates = _candidates(job, configs)
    settings = {"formats": {name: format_settings(one) for name, one in candidates.items()}} | job_settings(job)
    check_output(job.model, job.dataset, job.output_dir)
    rows = None if splits is None else rows_digest(splits, [*job.text_columns, job.label_column])
    settings[INPUTS] = inputs_digest(job.model, job.dataset, output, rows)
    splits = load_splits(job.dataset, job.dataset_name) if splits is None else splits
    material = prepare(job, candidates, splits)
    check(material.model, candidates.values())
    made = [*candidates, FORMATS_FIGURE, NOISE_FIGURE, CHOICE_FILE]
    with alone_in(output):
        open_run(output, settings, job.overwrite, made)
        try:
            choice = choose(job, candidates, material) if job.auto else None
            chosen = candidates if choice is None else {choice["choice"]: candidates[choice["choice"]]}
            quantize_missing(job, chosen, material)
        except (ValueError, TypeError, ImportError):
            _withdraw(output, candidates)
            raise
        report = measure(job, chosen, material) | ({} if choice is None else {"recommendation": choice})
        for name in chosen:
            write_card(report, output / name)
        write_report(report, output)
    return json.loads((output / REPORT_FILE).read_text())


def prepare(job: QuantizeJob, configs: Configs, splits: DatasetDict) -> Material:
    """Checks data, tokenizer and model against each other, and tokenizes.

    Args:
        job (`QuantizeJob`): What to quantize.
        configs (`Mapping[str, Any]`): The formats: only some need texts.
        splits (`DatasetDict`): The data. A split `train` is needed for texts, and to hold rows out.

    Returns:
        `Material`: Ready for quantization; with `held_out` where a loss is allowed.

    Raises:
        ValueError: if a split, a column, a label, the tokenizer, the task head or the metric does not fit.
    """
    test_split = evaluation_split(splits, job.eval_split)
    check_columns(splits[test_split], test_split, job.text_columns, job.label_column)
    held_out, train = None, splits.get("train")
    if job.max_drop is not None:
        held_out, train = hold_out(job, splits, test_split, job.seed)
    texts = None
    if any(map(needs_texts, configs.values())):
        check_splits(splits, job.eval_split, job.text_columns, job.label_column, trains=False)
        texts = Part("train", draw(train, job.n_texts, job.seed), False)
    return load_material(job, Part(test_split, splits[test_split], True), texts, held_out)


def check(model: "PreTrainedModel", configs: Iterable[Any]) -> None:
    """Raises what can be known of formats and a model before anything is written.

    Args:
        model (`PreTrainedModel`): The model to quantize.
        configs (`Iterable[Any]`): What `quantize` takes.

    Raises:
        ValueError: if the model is quantized already or of an unknown architecture, or a pattern matches nothing.
        ImportError: if the format needs bitsandbytes, and it is missing.
    """
    check_float(model)
    for config in configs:
        excluded = excluded_names(config)
        if excluded is not None:
            find_blocks(model)
        if excluded:
            choose_modules(model, excluded, _takes_tables(config))
        if isinstance(config, BitsAndBytesConfig):
            AutoHfQuantizer.from_config(config).validate_environment()


def choose(job: QuantizeJob, candidates: Configs, material: Material) -> dict[str, Any]:
    """Times formats and chooses one, unless the run did so before.

    Args:
        job (`QuantizeJob`): Names the folder.
        candidates (`Mapping[str, Any]`): The formats.
        material (`Material`): The model, and the rows that a batch is taken from.

    Returns:
        `dict`: A `Recommendation` as plain JSON types, and its `table`. Its `choice` is a format even where the model
        in float32 is about as fast: the fastest one then.

    Raises:
        ValueError: if no format but float32 can be timed here.
    """
    file = Path(job.output_dir) / CHOICE_FILE
    if file.exists():
        found = json.loads(file.read_text())
        logger.info("%s", found["table"])
        return found
    batch = cost_batch(_yardstick(job, material))
    recommendation = recommend.recommend_format(material.model, batch, formats=list(candidates))
    times = {one.name: one.median_s for one in recommendation.candidates if one.name != recommend.FLOAT32}
    if not times:
        raise ValueError(f"None of {', '.join(candidates)} can be timed here: {recommendation.skipped}.")
    choice = recommendation.choice
    if choice == recommend.FLOAT32:
        choice = min(times, key=times.__getitem__)
        logger.warning(
            "No format is more than %.0f %% faster than float32 here; the fastest is %s. If it is bytes that you "
            "want, give --format fixed-point --bits 4 --granularity group.",
            100 * recommendation.tolerance,
            choice,
        )
    found = recommendation.to_dict() | {"choice": choice, "table": str(recommendation)}
    write_whole(file, json.dumps(found, indent=2) + "\n")
    return found


def quantize_missing(job: QuantizeJob, configs: Configs, material: Material) -> None:
    """Quantizes to those formats that are not saved yet.

    Args:
        job (`QuantizeJob`): Names the folder, and the loss that is allowed.
        configs (`Mapping[str, Any]`): What to quantize to, by the name of the folder.
        material (`Material`): The model, the texts and the rows that a loss is allowed on.
    """
    gate = {}
    if material.held_out is not None:
        held_out = material._replace(test=by_length(material.held_out))
        gate = {"evaluate": lambda model: score_alone(model, _yardstick(job, held_out)), "max_drop": job.max_drop}
    for name, config in configs.items():
        folder = Path(job.output_dir) / name
        if folder.exists():
            logger.info("%s is there already.", name)
            continue
        logger.info("Quantizing to %s.", name)
        texts = material.batches if needs_texts(config) else None
        save_whole(folder, quantize(material.model, config, texts, **gate), material.tokenizer)


def measure(job: QuantizeJob, configs: Configs, material: Material) -> dict[str, Any]:
    """Reloads the saved models, measures them side by side, and draws what they cost and what rounding did.

    Args:
        job (`QuantizeJob`): Names the data and the folder.
        configs (`Mapping[str, Any]`): What was quantized to, by the name of the folder.
        material (`Material`): The rows to measure on.

    Returns:
        `dict`: The report.
    """
    logger.info("Measuring the saved models on %d rows.", len(material.test))
    output, yardstick = Path(job.output_dir), _yardstick(job, material)
    paths = {DENSE: job.model} | {name: str(output / name) for name in configs}
    models = load_all(paths, device_of(job.use_cpu))
    noise = {name: noise_of(models[name], models[DENSE], cost_batch(yardstick)) for name in configs}
    report = {
        "job": job_settings(job),
        "quantization": {name: format_settings(config) for name, config in configs.items()},
        "texts_calibrated_on": sum(len(batch["input_ids"]) for batch in material.batches),
        "rows_held_out": None if material.held_out is None else len(material.held_out),
        "held_out_of": material.held_out_split,
        **measure_all(models, paths, yardstick),
        "gain": None,
    }
    for row in report["models"][1:]:
        name = row["name"]
        row["kept_in_float"] = kept_in_float(models[DENSE], models[name], configs[name])
        row["noise"] = noise[name]
    report["figures"] = {"size, quality and speed": FORMATS_FIGURE}
    draw_formats(report, output / FORMATS_FIGURE, title(report))
    drawn = {name: found for name, found in noise.items() if found}
    if drawn:
        report["figures"]["signal-to-noise ratio per module"] = NOISE_FIGURE
        draw_noise(drawn, output / NOISE_FIGURE, "What rounding did to each module")
    return report


def kept_in_float(dense: "PreTrainedModel", quantized: "PreTrainedModel", config: Any) -> list[str]:
    """The modules that a format could have taken and did not: for a pattern, their widths, or what they would cost.

    Args:
        dense (`PreTrainedModel`): The model before it was quantized.
        quantized (`PreTrainedModel`): The model.
        config (`Any`): What it was quantized by.

    Returns:
        `list[str]`: Dotted names, without the task head; empty for formats that take a model whole.
    """
    if excluded_names(config) is None:
        return []
    could = choose_modules(dense, (), _takes_tables(config))
    return [name for name, module in could.items() if type(quantized.get_submodule(name)) is type(module)]


def _candidates(job: QuantizeJob, configs: Configs) -> dict[str, Any]:
    if not job.auto:
        if not configs:
            raise ValueError("configs={} names no format to quantize to: give one, or auto=True to have one chosen.")
        return dict(configs)
    known = {name: config for name, config in recommend.FORMATS.items() if name != recommend.FLOAT32}
    unknown = [name for name in configs if name not in known]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} cannot be chosen by its time: give formats out of {', '.join(known)}, or name one "
            "without --auto."
        )
    return {name: known[name] for name in configs or known}


def _yardstick(job: QuantizeJob, material: Material) -> Yardstick:
    return Yardstick(material.test, material.tokenizer, material.metric, job.eval_batch_size, job.seed, job.cost_batch)


def _takes_tables(config: Any) -> bool:
    # Only some formats have embeddings to choose.
    return bool(getattr(config, "embeddings", False))


def noise_of(model: "PreTrainedModel", dense: "PreTrainedModel", batch: Batch) -> dict[str, dict[str, float | None]]:
    """What rounding did to each module, as `measure_noise` finds it.

    Args:
        model (`PreTrainedModel`): The quantized model.
        dense (`PreTrainedModel`): The model before.
        batch (`dict[str, torch.Tensor]`): Inputs.

    Returns:
        `dict`: Plain JSON types: signal-to-noise ratios in dB of `"weights"` and `"outputs"` by module, `None` where
        nothing was lost; empty for formats of other libraries.
    """
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        return {}

    def plain(ratio: float | None) -> float | None:
        return ratio if ratio is not None and math.isfinite(ratio) else None

    found = measure_noise(model, dense, [batch])
    return {name: {"weights": plain(one.weights), "outputs": plain(one.outputs)} for name, one in found.items()}


def _withdraw(output: Path, names: Configs) -> None:
    """Takes back that a run began in a folder, if it saved no model: other settings may be tried there."""
    if any((output / name).exists() for name in names):
        return
    for name in (RUN_FILE, CHOICE_FILE):
        (output / name).unlink(missing_ok=True)
