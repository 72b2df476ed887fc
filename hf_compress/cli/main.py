"""The command line: `hf-compress demo | plan | run | distill | prune | quantize | evaluate | inspect ...`."""

import difflib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from safetensors import SafetensorError

import hf_compress
from hf_compress.cli.evaluate import SeveralValues, evaluate
from hf_compress.cli.help_pages import (
    DISTILL_DEFAULTS,
    UNSTRUCTURED,
    option,
    print_distill_help,
    print_plan_help,
    print_prune_help,
    print_quantize_help,
    print_run_help,
)
from hf_compress.cli.inspect import inspect
from hf_compress.cli.push import push
from hf_compress.cli.report import report

if TYPE_CHECKING:
    from hf_compress.cli.run import RunJob
    from hf_compress.distillation.arguments import DistillationArguments
    from hf_compress.jobs.job import DistillJob, PruneJob, QuantizeJob, SparsifyJob
    from hf_compress.pruning.config import StructuredPruningConfig
    from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

app = typer.Typer(
    name="hf-compress",
    help="Distil, prune and quantize fine-tuned Transformers models, and measure what was kept.\n\n"
    "`hf-compress COMMAND --help` shows the options of a command, with examples. Exit codes: 0 done, 1 or 2 an "
    "error, 3 less was kept than was asked for.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

# What says how much, of heads and neurons and of single weights.
_COUNTERPARTS = {"--budget": "--sparsity", "--budgets": "--sparsities"}


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
    from hf_compress.jobs.distill import distill as run
    from hf_compress.modeling.launch import leave_processes
    from hf_compress.report.report import show_report

    job, args = parse_distill(context.args)
    report = run(job, args)
    if args.process_index == 0:
        show_report(report, args.output_dir)
    leave_processes()


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
    from hf_compress.jobs.prune import prune_classifier
    from hf_compress.report.report import show_report

    job, config = parse_prune(context.args)
    show_report(prune_classifier(job, config), job.output_dir)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def quantize(
    context: typer.Context,
    help_: Annotated[bool, typer.Option("--help", "-h", help="Show the options and stop.")] = False,
) -> None:
    """Quantize a text classifier, to one number format or several. See `hf-compress quantize --help`."""
    if help_:
        print_quantize_help()
        raise typer.Exit
    from hf_compress.jobs.quantize import quantize_classifier
    from hf_compress.report.report import show_report

    job, configs = parse_quantize(context.args)
    show_report(quantize_classifier(job, configs), job.output_dir)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def run(
    context: typer.Context,
    help_: Annotated[bool, typer.Option("--help", "-h", help="Show the options and stop.")] = False,
) -> None:
    """Run a recipe: all steps in order, each saved, reloaded and measured. See `hf-compress run --help`."""
    if help_:
        print_run_help()
        raise typer.Exit
    from hf_compress.cli.run import run_recipe
    from hf_compress.modeling.launch import leave_processes

    file, job = parse_run(context.args)
    code = run_recipe(file, job)
    leave_processes()
    raise typer.Exit(code)


app.command()(inspect)
app.command()(report)
app.command(cls=SeveralValues)(evaluate)
app.command()(push)


def parse_run(arguments: list[str]) -> "tuple[str, RunJob]":
    """Parses a command line of `hf-compress run`.

    Args:
        arguments (`list[str]`): The recipe's file, then options.

    Returns:
        `tuple[str, RunJob]`: The file, and what is asked for.

    Raises:
        ValueError: if there is no file, or an option is missing, unknown or has no such value.
    """
    from hf_compress.cli.run import RunJob

    file, rest = _first(arguments, "no recipe", "hf-compress run recipe.yaml --output-dir FOLDER")
    return file, _parse("run", (RunJob,), rest, {})[0]


def _first(arguments: list[str], lacks: str, example: str) -> tuple[str, list[str]]:
    """The word that stands before all options, and these."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"There is {lacks}: give it first, as in `{example}`.")
    return arguments[0], arguments[1:]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def plan(
    context: typer.Context,
    help_: Annotated[bool, typer.Option("--help", "-h", help="Show the options and stop.")] = False,
) -> None:
    """Propose a recipe for a model, from what pruning and rounding cost it. See `hf-compress plan --help`."""
    if help_:
        print_plan_help()
        raise typer.Exit
    from hf_compress.cli.plan import PlanJob, plan_recipe

    model, arguments = _first(context.args, "no model", "hf-compress plan MODEL --dataset DATA --target-mb 10")
    plan_recipe(model, _parse("plan", (PlanJob,), arguments, {})[0])


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
    from hf_compress.jobs.job import DistillJob

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
    from hf_compress.jobs.job import PruneJob, SparsifyJob
    from hf_compress.jobs.weight_options import read_weight_options, weight_options
    from hf_compress.pruning.config import StructuredPruningConfig

    structured, unstructured = (PruneJob, StructuredPruningConfig), (SparsifyJob, weight_options())
    if UNSTRUCTURED not in arguments:
        hint = f"It is for single weights: add {UNSTRUCTURED} to prune those."
        return _parse("prune", structured, arguments, {}, _elsewhere(unstructured, hint))
    words = [word for word in arguments if word != UNSTRUCTURED]
    hint = f"It is for heads and neurons: leave out {UNSTRUCTURED} to prune those."
    job, options = _parse("prune", unstructured, words, {}, _elsewhere(structured, hint))
    return job, read_weight_options(options)


def parse_quantize(arguments: list[str]) -> "tuple[QuantizeJob, dict[str, Any]]":
    """Parses a command line of `hf-compress quantize`.

    Args:
        arguments (`list[str]`): Options such as `--model` and their values.

    Returns:
        `tuple[QuantizeJob, dict[str, Any]]`: What to quantize, and to what: configs by the names of their formats.

    Raises:
        ValueError: if an option is missing, unknown, for another format, or has no such value.
    """
    from hf_compress.jobs.job import QuantizeJob
    from hf_compress.recipe.format_options import format_options, read_format_options

    job, options = _parse("quantize", (QuantizeJob, format_options()), arguments, {})
    return job, read_format_options(options, job.auto)


def _elsewhere(classes: tuple[type, ...], hint: str) -> dict[str, str]:
    return {option(one.name): hint for fields_of in map(fields, classes) for one in fields_of}


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
    if "--output-dir" in options:
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


class Once(logging.Filter):
    """Lets each message pass once: where many models are made of one, each of them says the same."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record says something new."""
        message = record.getMessage()
        is_new = message not in self.said
        self.said.add(message)
        return is_new


def _set_up_logging(debug: bool) -> None:
    import transformers

    handler = RichHandler(console=console, show_path=debug, show_level=debug, log_time_format="%H:%M:%S")
    if not debug:
        handler.addFilter(Once())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # Of several processes, the first speaks for all.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.getLogger("hf_compress").setLevel(logging.DEBUG if debug else level)
    if not debug:
        transformers.utils.logging.set_verbosity_error()
        # When it is imported, it names kernels that it could download.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
    except (ValueError, TypeError, ImportError, OSError, SafetensorError) as error:
        if is_debug:
            raise
        message = escape(" ".join(str(error).split()))
        if isinstance(error, SafetensorError):
            message = (
                f"A file of weights (*.safetensors) is damaged, cut off, or a pointer of git-lfs: {message}. Get or "
                "save it again; `hf-compress inspect` with the model's folder names it."
            )
        console.print(f"[bold red]Error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
