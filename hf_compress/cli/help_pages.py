"""The pages of `hf-compress COMMAND --help`: what a command does, examples, and tables of its options."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# What a student of a small data set wants, where it differs from Trainer's defaults.
DISTILL_DEFAULTS = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "dropout": 0.0,
    "plain_attention": "auto",
    "logging_steps": 20,
    "save_steps": 0.25,
    "save_total_limit": 1,
    "report_to": "none",
    # Trainer hides its bar by default where transformers logs errors only, as here.
    "disable_tqdm": False,
}
# Chooses which of two configs the options of `prune` are for.
UNSTRUCTURED = "--unstructured"
_USUAL_ARGUMENTS = (
    "output_dir",
    "temperature",
    "alpha",
    "divergence",
    "terms",
    "stages",
    "dropout",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "bf16",
    "use_cpu",
    "seed",
)


def print_distill_help(everything: bool = False) -> None:
    """Prints the options of `hf-compress distill` as tables.

    Args:
        everything (`bool`, *optional*, defaults to `False`): Also the rarer arguments of `transformers.Trainer`.
    """
    from hf_compress.distillation.arguments import DistillationArguments
    from hf_compress.jobs.job import DistillJob

    out = Console()
    out.print(
        "[bold]hf-compress distill[/] --model MODEL --dataset DATA --student-layers N \\\n"
        "    --output-dir FOLDER \\[options]\n"
    )
    out.print(
        "Makes a student of the model's layers, trains it with the model as its teacher, saves it, reloads it, and "
        "reports what it kept and what it costs. A stopped run continues with the same command.\n"
    )
    out.print("[bold]Example[/]: a fine-tuned 12-layer model to 6 layers, on a folder with train.csv and test.csv\n")
    out.print(
        "  hf-compress distill --model ./my-classifier --dataset ./reviews \\\n"
        "      --text-columns review --label-column sentiment \\\n"
        "      --student-layers 6 --output-dir ./student --bf16\n"
    )
    out.print(_option_table("The job", fields(DistillJob), {}))
    training = fields(DistillationArguments)
    usual = [f for name in _USUAL_ARGUMENTS for f in training if f.name == name]
    out.print(_option_table("Training", usual, {**DISTILL_DEFAULTS, "output_dir": MISSING}))
    # --debug is this program's own: it shows tracebacks.
    rest = [f for f in training if f.init and f.name not in (*_USUAL_ARGUMENTS, "debug")]
    if everything:
        out.print(_option_table("All other arguments of transformers.TrainingArguments", rest, DISTILL_DEFAULTS))
    else:
        out.print(
            f"{len(rest)} further arguments of transformers.TrainingArguments are taken too. "
            "--help shows this page, --help-all all arguments, --debug the traceback of an error."
        )


def print_prune_help() -> None:
    """Prints the options of `hf-compress prune` as tables."""
    from hf_compress.jobs.job import CalibratedJob, PruneJob, SparsifyJob
    from hf_compress.pruning.config import StructuredPruningConfig
    from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

    out = Console()
    out.print(
        "[bold]hf-compress prune[/] --model MODEL --dataset DATA --budget SHARE \\\n"
        "    --output-dir FOLDER \\[options]\n"
        f"[bold]hf-compress prune {UNSTRUCTURED}[/] --model MODEL --dataset DATA --sparsity SHARE \\\n"
        "    --output-dir FOLDER \\[options]\n"
    )
    out.print(
        "Cuts the heads and neurons that matter least on some hundred texts without labels, refits what is left, "
        "saves the model, reloads it, and reports what it kept and what it costs, with a figure of what each layer "
        f"kept. With {UNSTRUCTURED}, single weights become 0: the model has the same shape and is about as fast, but "
        "takes fewer bytes on disk. Nothing is trained. A stopped run continues with the same command.\n"
    )
    out.print("[bold]Example[/]: a fine-tuned model to a half and to a third of its multiply-accumulates\n")
    out.print(
        "  hf-compress prune --model ./my-classifier --dataset ./reviews \\\n"
        "      --text-columns review --label-column sentiment \\\n"
        "      --budgets 0.5 0.33 --output-dir ./pruned\n"
    )
    out.print("[bold]Example[/]: two of each four weights that lie side by side made 0\n")
    out.print(
        f"  hf-compress prune {UNSTRUCTURED} --model ./my-classifier --dataset ./reviews \\\n"
        "      --text-columns review --label-column sentiment \\\n"
        "      --pattern 2:4 --output-dir ./sparse\n"
    )
    shared = fields(CalibratedJob)
    out.print(_option_table("The job", shared, {}))
    for title, job, config in (
        (f"Heads and neurons, without {UNSTRUCTURED}", PruneJob, StructuredPruningConfig),
        (f"Single weights, with {UNSTRUCTURED}", SparsifyJob, UnstructuredPruningConfig),
    ):
        own = [one for one in fields(job) if one.name not in {other.name for other in shared}]
        out.print(_option_table(title, (*own, *fields(config)), {}))


def print_quantize_help() -> None:
    """Prints the options of `hf-compress quantize` as tables, format by format."""
    from hf_compress.jobs.job import QuantizeJob
    from hf_compress.recipe.format_options import FORMATS, NoOptions, format_options

    out = Console()
    out.print(
        "[bold]hf-compress quantize[/] --model MODEL --dataset DATA --format FORMAT \\\n"
        "    --output-dir FOLDER \\[options]\n"
    )
    out.print(
        "Writes the model with numbers of fewer bits, reloads it, and reports what it kept and what it costs beside "
        "the model as it was. Nothing is trained. Pruned models are quantized like others; the task head stays in "
        "floating point. A stopped run continues with the same command.\n"
    )
    for example, words in (
        ("integers of 8 bits, which also compute", "--format int8 --output-dir ./int8"),
        (
            "4 bits in groups, where at most half a point of accuracy may be lost",
            "--format fixed-point --bits 4 --granularity group \\\n      --max-drop 0.005 --output-dir ./small",
        ),
        ("several formats in one table", "--formats int8 bf16 nf4 --output-dir ./formats"),
        (
            "the one that is fast on this machine, for eight texts at a time",
            "--auto --cost-batch 8 --output-dir ./fast",
        ),
    ):
        out.print(f"[bold]Example[/]: {example}\n")
        out.print(f"  hf-compress quantize --model ./my-classifier --dataset ./reviews \\\n      {words}\n")
    out.print(_option_table("The job", (*fields(QuantizeJob), *fields(format_options())[:2]), {}))
    groups: dict[type, list[str]] = {}
    for name, number_format in FORMATS.items():
        groups.setdefault(number_format.options, []).append(name)
    for options, names in groups.items():
        title = f"{', '.join(names)}: {'; '.join(dict.fromkeys(FORMATS[name].meaning for name in names))}"
        if options is NoOptions:
            out.print(f"[italic]{title}[/], without options\n")
        else:
            out.print(_option_table(title, fields(options), {}))
    out.print("--debug shows the traceback of an error, and all logs.")


def print_plan_help() -> None:
    """Prints the options of `hf-compress plan`."""
    from hf_compress.cli.plan import PlanJob

    out = Console()
    out.print("[bold]hf-compress plan[/] MODEL --dataset DATA \\[options]\n")
    out.print(
        "Measures what pruning to several budgets and rounding to several formats cost a fine-tuned model, each by "
        "itself and without a training, and proposes recipes that get it to a size. The one that is chosen is "
        "written as YAML, for hf-compress run. Nothing is chosen on the rows that the recipe measures on.\n"
    )
    out.print("[bold]Example[/]: at most 10 MB, and 98 % of the metric kept\n")
    out.print(
        "  hf-compress plan ./my-classifier --dataset ./reviews \\\n"
        "      --text-columns review --label-column sentiment \\\n"
        "      --target-mb 10 --min-retention 0.98 --output recipe.yaml\n"
    )
    out.print(_option_table("Options", fields(PlanJob), {}))


def print_run_help() -> None:
    """Prints the options of `hf-compress run`, and the steps that a recipe can have."""
    from hf_compress.cli.run import RunJob
    from hf_compress.recipe.steps import STEPS, DataConfig, MeasureConfig

    out = Console()
    out.print("[bold]hf-compress run[/] RECIPE.yaml --output-dir FOLDER \\[options]\n")
    out.print(
        "Applies the steps of a recipe in order. Each is saved to a folder of its own, loaded again and measured. A "
        "run that was stopped continues with the same command; a changed recipe re-does what follows the change. The "
        "exit code is 3 where an `evaluate` step was not passed.\n"
    )
    out.print("[bold]Example[/]: five times fewer multiply-accumulates, int8, on your own data\n")
    out.print(
        "  hf-compress run prune-distil-int8.yaml --model ./my-encoder --dataset ./reviews \\\n"
        "      --text-columns review --label-column sentiment --output-dir ./small\n"
    )
    out.print("[bold]Example[/]: what it would do, with the sizes expected\n")
    out.print("  hf-compress run recipe.yaml --output-dir ./small --dry-run\n")
    out.print(_option_table("Options", fields(RunJob), {}))
    out.print("A recipe has `model`, `data`, `steps`, and where wanted `seed` and `measure`:\n")
    for title, kind in (("data", DataConfig), ("measure", MeasureConfig)):
        out.print(_option_table(title, fields(kind), {}, name=str))
    for name, kind in STEPS.items():
        out.print(_option_table(f"- {name}: {(kind.__doc__ or '').splitlines()[0]}", fields(kind), {}, name=str))
    out.print("--debug shows the traceback of an error, and all logs.")


def _option_table(
    title: str, options: Iterable[Field], defaults: Mapping[str, Any], name: Callable[[str], str] | None = None
) -> Table:
    # Keys of a file stand as they are, options of a command line with dashes.
    name = name or option
    table = Table(
        "key" if name is str else "option", "default", "meaning", title=title, title_justify="left", expand=True
    )
    for one in sorted(options, key=_is_optional):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        default = defaults.get(one.name, default)
        default = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        shown = "[red]required[/]" if default is MISSING else "" if default is None else escape(str(default))
        meaning = escape(" ".join(one.metadata.get("help", "").split()))
        table.add_row(name(one.name), shown, meaning)
    table.columns[0].no_wrap = True
    return table


def option(name: str) -> str:
    """A field of a config as it is typed."""
    return f"--{name.replace('_', '-')}"


def _is_optional(one: Field) -> bool:
    return one.default is not MISSING or one.default_factory is not MISSING
