"""The command line: `hf-compress demo`, `hf-compress distill`."""

import logging
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

import hf_compress

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
    "logging_steps": 20,
    "save_steps": 0.25,
    "save_total_limit": 1,
    "report_to": "none",
}
_USUAL_ARGUMENTS = (
    "output_dir",
    "temperature",
    "alpha",
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
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and all logs.")] = False,
) -> None:
    """Options that come before every command."""
    if version:
        typer.echo(f"hf_compress {hf_compress.__version__}")
        raise typer.Exit
    _set_up_logging(debug)


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
    run_distill(context.args)


def run_distill(arguments: list[str]) -> dict[str, Any]:
    """Parses a command line of `hf-compress distill` and runs it.

    Args:
        arguments (`list[str]`): Options such as `--model` and their values; a single .yaml or .json file of them.

    Returns:
        `dict`: The report.
    """
    from transformers import HfArgumentParser

    from hf_compress.distillation.config import DistillationArguments
    from hf_compress.pipeline import DistillJob, distill
    from hf_compress.report import show_report

    parser = HfArgumentParser((DistillJob, DistillationArguments), prog="hf-compress distill", add_help=False)
    parser.set_defaults(**DISTILL_DEFAULTS)
    job, args = parser.parse_args_into_dataclasses(arguments)
    report = distill(job, args)
    show_report(report, Path(args.output_dir))
    return report


def print_distill_help(everything: bool = False) -> None:
    """Prints the options of `hf-compress distill` as tables.

    Args:
        everything (`bool`, *optional*, defaults to `False`): Also the rarer arguments of `transformers.Trainer`.
    """
    from hf_compress.distillation.config import DistillationArguments
    from hf_compress.pipeline import DistillJob

    out = Console()
    out.print(
        "[bold]hf-compress distill[/] --model MODEL --dataset DATA --student-layers N --output-dir FOLDER [options]\n"
    )
    out.print(
        "Makes a student of the model's layers, trains it with the model as its teacher, saves it, reloads it,\n"
        "and reports what it kept and what it costs. A stopped run continues with the same command.\n"
    )
    out.print(
        "[bold]Example[/]: a fine-tuned 12-layer model to 6 layers, on a folder with train.csv and test.csv\n"
        "  hf-compress distill --model ./my-classifier --dataset ./reviews --text-columns review \\\n"
        "      --label-column sentiment --student-layers 6 --output-dir ./student --bf16\n"
    )
    out.print(_option_table("The job", fields(DistillJob), {}))
    training = fields(DistillationArguments)
    usual = [f for name in _USUAL_ARGUMENTS for f in training if f.name == name]
    out.print(_option_table("Training", usual, DISTILL_DEFAULTS))
    rest = [f for f in training if f.init and f.name not in _USUAL_ARGUMENTS]
    if everything:
        out.print(_option_table("All other arguments of transformers.TrainingArguments", rest, DISTILL_DEFAULTS))
    else:
        out.print(
            f"{len(rest)} further arguments of transformers.TrainingArguments are taken too: --help-all lists them."
        )


def _option_table(title: str, options, defaults: dict[str, Any]) -> Table:
    table = Table("option", "default", "meaning", title=title, title_justify="left", expand=True)
    for option in options:
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        default = defaults.get(option.name, default)
        shown = "[red]required[/]" if default is MISSING else "" if default is None else str(default)
        table.add_row(f"--{option.name.replace('_', '-')}", shown, " ".join(option.metadata.get("help", "").split()))
    table.columns[0].no_wrap = True
    return table


def _set_up_logging(debug: bool) -> None:
    import transformers

    handler = RichHandler(console=console, show_path=debug, show_level=debug, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("hf_compress").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Runs the command line; an error is one paragraph and exit code 1, with its traceback after --debug."""
    try:
        app()
    except (ValueError, TypeError, ImportError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        console.print(f"[bold red]Error:[/] {' '.join(str(error).split())}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
