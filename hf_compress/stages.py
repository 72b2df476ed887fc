"""A run in its folder: what was asked for, and trainings that are done once and continue where they were stopped."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
REPORT_FILE = "report.json"


def open_run(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Takes an output folder for a run, or continues the same run in it.

    Args:
        folder (`Path`): The output folder; made if missing.
        settings (`dict`): What the run was asked for, as plain JSON types. It is stored, so that a run continues only
            what it began itself.
        overwrite (`bool`): Whether an earlier run in the folder may be deleted.

    Raises:
        ValueError: if the folder holds a finished run, one with other settings, or files that no run made.
    """
    run_file = folder / RUN_FILE
    if overwrite and run_file.exists():
        shutil.rmtree(folder)
    if not run_file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"The output folder {folder} holds files that are not of a run of hf-compress, so nothing is written "
                "there and nothing deleted: give a new or an empty folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        partial = run_file.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=2) + "\n")
        partial.rename(run_file)
        return
    if (folder / REPORT_FILE).exists():
        raise ValueError(
            f"The output folder {folder} holds a finished run: its results are in {REPORT_FILE} and report.md. "
            "Give another folder, or --overwrite to delete it and start anew."
        )
    stored = json.loads(run_file.read_text())
    changed = sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name))
    if changed:
        changes = ", ".join(f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in changed)
        raise ValueError(
            f"The output folder {folder} holds an unfinished run with other settings ({changes}). Repeat the former "
            "command to continue it, give another folder, or --overwrite to delete it and start anew."
        )
    logger.info("Continuing the run in %s.", folder)


def train_once(folder: Path, make_trainer: Callable[[Path], "Trainer"]) -> bool:
    """Trains a model and saves it, unless that was done before.

    Args:
        folder (`Path`): Where the model and its tokenizer are saved. If it exists, nothing is trained.
        make_trainer (`Callable`): Builds the trainer; gets the folder for its training checkpoints, which a stopped
            training continues from and which is removed in the end.

    Returns:
        `bool`: Whether anything was trained.
    """
    if folder.exists():
        logger.info("%s is there already.", folder.name)
        return False
    work = folder.with_name(folder.name + ".training")
    trainer = make_trainer(work)
    checkpoint = last_checkpoint(work)
    if checkpoint is not None:
        logger.info("%s continues from %s.", folder.name, checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if trainer.is_world_process_zero():
        partial = folder.with_name(folder.name + ".partial")
        trainer.model.save_pretrained(partial)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(partial)
        partial.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return True


def last_checkpoint(folder: Path) -> Path | None:
    """The newest training checkpoint that was written to its end.

    Args:
        folder (`Path`): Output folder of a `Trainer`.

    Returns:
        `Path` or `None`: A `checkpoint-N` folder. One without the trainer's state, which is written last, was cut off
        while saving and is passed over.
    """
    checkpoints = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(checkpoints, key=lambda path: int(path.name.split("-")[1]), default=None)
