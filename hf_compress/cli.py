"""The command line: `hf-compress demo`, `hf-compress distill`, `hf-compress prune`."""

import difflib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import hf_compress

if TYPE_CHECKING:
    from hf_compress.distillation.arguments import DistillationArguments
    from hf_compress.job import DistillJob, PruneJob, SparsifyJob
    from hf_compress.pruning.config import StructuredPruningConfig
    from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

app = typer.Typer(
    name="hf-compress",
    help="Distil, prune and quantize fine-tuned Transformers models, and measure what was kept.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

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
# What says how much, of heads and neurons and of single weights.
_COUNTERPARTS = {"--budget": "--sparsity", "--budgets": "--sparsities"}
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


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and all logs. May stand anywhere.")
    ] = False,
) -> None:
    """Options that come before every command."""
    if version:
        typer.echo(f"hf_compress {hf_compress.__version__}")
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("hf-compress-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the split, the new weights and the order of the rows.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Delete the results of an earlier run there.")] = False,
) -> None:
    """The main job on packaged weights and texts: fine-tune, distil, save, reload, measure.

    A stopped run continues with the same command.
    """
    from hf_compress.demo import run_demo

    run_demo(output, seed=seed, overwrite=overwrite)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def distill(
    context: typer.Context,
    help_: Annotated[bool, typer.Option("--help", "-h", help="Show the usual options and stop.")] = False,
    help_all: Annotated[bool, typer.Option("--help-all", help="Show every training argument too.")] = False,
) -> None:
    """Distil a text classifier on your own data. See `hf-compress distill --help`."""
    if help_ or help_all:
        print_distill_help(everything=help_all)
        raise typer.Exit
    from hf_compress.pipeline import distill as run
    from hf_compress.report import show_report

    job, args = parse_distill(context.args)
    report = run(job, args)
    if args.process_index == 0:
        show_report(report, args.output_dir)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def prune(
    context: typer.Context,
    help_: Annotated[bool, typer.Option("--help", "-h", help="Show the options and stop.")] = False,
) -> None:
    """Prune a text classifier with unlabelled texts of your own. See `hf-compress prune --help`."""
    if help_:
        print_prune_help()
        raise typer.Exit
    from hf_compress.prune_run import prune_classifier
    from hf_compress.report import show_report

    job, config = parse_prune(context.args)
    show_report(prune_classifier(job, config), job.output_dir)


def parse_distill(arguments: list[str]) -> "tuple[DistillJob, DistillationArguments]":
    """Parses a command line of `hf-compress distill`.

    Args:
        arguments (`list[str]`): Options such as `--model` and their values.

    Returns:
        `tuple[DistillJob, DistillationArguments]`: What to distil, and how to train.

    Raises:
        ValueError: if an option is missing, unknown or has no such value.
    """
    from hf_compress.distillation.arguments import DistillationArguments
    from hf_compress.job import DistillJob

    return _parse("distill", (DistillJob, DistillationArguments), arguments, DISTILL_DEFAULTS)


def parse_prune(
    arguments: list[str],
) -> "tuple[PruneJob, StructuredPruningConfig] | tuple[SparsifyJob, UnstructuredPruningConfig]":
    """Parses a command line of `hf-compress prune`.

    Args:
        arguments (`list[str]`): Options such as `--model` and their values; `--unstructured` among them asks for
            single weights in the place of heads and neurons.

    Returns:
        `tuple[PruneJob, StructuredPruningConfig]` or `tuple[SparsifyJob, UnstructuredPruningConfig]`: What to prune,
        and how.

    Raises:
        ValueError: if an option is missing, unknown, for the other kind of pruning, or has no such value.
    """
    from hf_compress.job import PruneJob, SparsifyJob
    from hf_compress.pruning.config import StructuredPruningConfig
    from hf_compress.weight_options import read_weight_options, weight_options

    structured, unstructured = (PruneJob, StructuredPruningConfig), (SparsifyJob, weight_options())
    if UNSTRUCTURED not in arguments:
        hint = f"It is for single weights: add {UNSTRUCTURED} to prune those."
        return _parse("prune", structured, arguments, {}, _elsewhere(unstructured, hint))
    words = [word for word in arguments if word != UNSTRUCTURED]
    hint = f"It is for heads and neurons: leave out {UNSTRUCTURED} to prune those."
    job, options = _parse("prune", unstructured, words, {}, _elsewhere(structured, hint))
    return job, read_weight_options(options)


def _elsewhere(classes: tuple[type, ...], hint: str) -> dict[str, str]:
    return {_option(one.name): hint for fields_of in map(fields, classes) for one in fields_of}


def _parse(
    command: str,
    classes: tuple[type, ...],
    arguments: list[str],
    defaults: dict[str, Any],
    elsewhere: Mapping[str, str] | None = None,
) -> tuple:
    from transformers import HfArgumentParser

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. `hf-compress {command} --help` shows the options.")

    parser = HfArgumentParser(classes, add_help=False, allow_abbrev=False)
    parser.set_defaults(**defaults)
    parser.error = refuse  # argparse's own prints a hundred options and exits
    options = parser._option_string_actions
    options["--output-dir"].required = True
    # First, because a misspelt option would else be said to be missing.
    unknown = [word for word in arguments if word.startswith("--") and word.split("=")[0] not in options]
    unknown = unknown or parser.parse_known_args(arguments)[1]
    if unknown:
        refuse(f"{' '.join(unknown)} is no option{_meant(unknown[0].split('=')[0], options, elsewhere or {})}")
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def _meant(unknown: str, options: Mapping[str, Any], elsewhere: Mapping[str, str]) -> str:
    """What to type in the place of an option that there is not, as the end of a sentence."""
    same = {**_COUNTERPARTS, **{there: here for here, there in _COUNTERPARTS.items()}}.get(unknown)
    near = [same] if same in options else difflib.get_close_matches(unknown, options, n=1)
    meant = "".join(f" (did you mean {name}?)" for name in near)
    hint = elsewhere.get(unknown.replace("_", "-"))
    return meant if hint is None else f" here{meant}. {hint}"


def print_distill_help(everything: bool = False) -> None:
    """Prints the options of `hf-compress distill` as tables.

    Args:
        everything (`bool`, *optional*, defaults to `False`): Also the rarer arguments of `transformers.Trainer`.
    """
    from hf_compress.distillation.arguments import DistillationArguments
    from hf_compress.job import DistillJob

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
    from hf_compress.job import CalibratedJob, PruneJob, SparsifyJob
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


def _option_table(title: str, options, defaults: dict[str, Any]) -> Table:
    table = Table("option", "default", "meaning", title=title, title_justify="left", expand=True)
    for option in sorted(options, key=_is_optional):
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        default = defaults.get(option.name, default)
        default = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        shown = "[red]required[/]" if default is MISSING else "" if default is None else escape(str(default))
        meaning = escape(" ".join(option.metadata.get("help", "").split()))
        table.add_row(_option(option.name), shown, meaning)
    table.columns[0].no_wrap = True
    return table


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_optional(option: Field) -> bool:
    return option.default is not MISSING or option.default_factory is not MISSING


def _set_up_logging(debug: bool) -> None:
    import transformers

    handler = RichHandler(console=console, show_path=debug, show_level=debug, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # Of several processes, the first speaks for all.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.getLogger("hf_compress").setLevel(logging.DEBUG if debug else level)
    if not debug:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error is one paragraph and exit code 1, with its traceback after --debug.

    Args:
        arguments (`list[str]`, *optional*): The words after the program's name; by default those it was called with.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Taken out here, because it may stand before or after the command.
    is_debug = "--debug" in arguments
    _set_up_logging(is_debug)
    try:
        app([word for word in arguments if word != "--debug"], prog_name="hf-compress")
    except (ValueError, TypeError, ImportError, OSError) as error:
        if is_debug:
            raise
        message = escape(" ".join(str(error).split()))
        console.print(f"[bold red]Error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
