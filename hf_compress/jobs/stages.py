"""A run in its folder: what was asked for, and trainings that are done once and continue where they were stopped."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

import hf_compress
from hf_compress.jobs.lock import is_taken
from hf_compress.report.files import PARTIAL, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
REPORT_FILE = "report.json"
# Among the settings of a run, `inputs_digest` of what it reads.
INPUTS = "inputs"
_MADE_BY = "hf-compress"
# What the folder of a stage's training checkpoints is called; that of a model being saved ends in `PARTIAL`.
WORK = ".training"


def open_run(folder: Path, settings: dict[str, Any], overwrite: bool, stages: Sequence[str] = ()) -> None:
    """Takes an output folder for a run, or continues the same run in it.

    Args:
        folder (`Path`): The output folder; made if missing.
        settings (`dict`): What the run was asked for, as plain JSON types. It is stored, so that a run continues only
            what it began itself.
        overwrite (`bool`): Whether the results of an earlier run in the folder may be deleted; files of others stay.
        stages (sequence of `str`, *optional*): Names of the folders and files that the run makes, besides its report.
            They are stored too, since a run that overwrites this one may make others.

    Raises:
        ValueError: if the folder holds a finished run, one with other settings, or files that no run made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output folder {folder} is a file: give a new or an empty folder.")
    run_file = folder / RUN_FILE
    stored = _read_run(run_file)
    if stored is not None and not overwrite:
        _check_continuable(folder, stored["settings"], settings)
        logger.info("Continuing the run in %s.", folder)
        warn_of_another_version(folder, stored.get("version"))
        return
    if stored is not None:
        _delete_results(folder, [*stored.get("stages", []), *stages])
    elif is_taken(folder, folder / (RUN_FILE + PARTIAL)):
        raise ValueError(
            f"The output folder {folder} holds files that are not of a run of {_MADE_BY}, so nothing is written "
            "there and nothing deleted: give a new or an empty folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"made_by": _MADE_BY, "version": hf_compress.__version__, "settings": settings, "stages": list(stages)}
    write_whole(run_file, json.dumps(content, indent=2) + "\n")


def _read_run(run_file: Path) -> dict[str, Any] | None:
    """What a run's file holds; `None` if there is none, or another program's of that name."""
    content = read_json(run_file)
    return content if content.get("made_by") == _MADE_BY else None


def warn_of_another_version(folder: Path, version: str | None) -> None:
    """Warns if an unfinished run was begun by another version of the library.

    Args:
        folder (`Path`): Its folder.
        version (`str` or `None`): What its file says.
    """
    if version != hf_compress.__version__:
        logger.warning(
            "The run in %s was begun by hf_compress %s, and this is %s: what is done stays as it is. Give another "
            "folder, or --overwrite, to have it all made by one.",
            folder,
            version,
            hf_compress.__version__,
        )


def _check_continuable(folder: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    if (folder / REPORT_FILE).exists():
        raise ValueError(
            f"The output folder {folder} holds a finished run: its results are in {REPORT_FILE} and report.md. "
            "Give another folder, or --overwrite to delete it and start anew."
        )
    changed = sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name))
    if changed:
        changes = ", ".join(
            "the model's or the data's contents are others"
            if name == INPUTS
            else f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}"
            for name in changed
        )
        raise ValueError(
            f"The output folder {folder} holds an unfinished run with other settings ({changes}). Repeat the former "
            "command to continue it, give another folder, or --overwrite to delete it and start anew."
        )


def _delete_results(folder: Path, stages: Sequence[str]) -> None:
    # By name, because someone may keep notes, or models made of these, in the same folder.
    made = {f"{name}{suffix}" for name in (REPORT_FILE, "report.md", *stages) for suffix in ("", WORK, PARTIAL)}
    # Of what is there, so that no name in the run's file can lead out of the folder.
    for path in [path for path in folder.iterdir() if path.name in made]:
        remove_folder(path) if path.is_dir() else path.unlink()


def remove_folder(path: Path) -> None:
    """Deletes a folder, or a link to one but not what it leads to; what is not there is no error.

    Args:
        path (`Path`): The folder.

    Raises:
        OSError: if it cannot be deleted, since what is left there would pass for another run's result.
    """
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def train_once(folder: Path, make_trainer: Callable[[Path], Trainer]) -> bool:
    """Trains a model and saves it, unless that was done before.

    Args:
        folder (`Path`): Where the model and its tokenizer are saved. If it exists, nothing is trained.
        make_trainer (`Callable`): Builds the trainer; gets the folder for its training checkpoints, which a stopped
            training continues from and which is removed in the end.

    Returns:
        `bool`: Whether anything was trained.
    """
    work = folder.with_name(folder.name + WORK)
    if folder.exists():
        logger.info("%s is there already.", folder.name)
        # A run that was stopped right after it saved the model has left them.
        shutil.rmtree(work, ignore_errors=True)
        return False
    trainer = make_trainer(work)
    trainer.add_callback(_OrderByEpoch)
    checkpoint = last_checkpoint(work)
    if checkpoint is not None:
        logger.info("%s continues from %s.", folder.name, checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    partial = folder.with_name(folder.name + PARTIAL)
    # By all processes, of which each may hold a part of the model.
    trainer.save_model(str(partial), _internal_call=True)
    if trainer.is_world_process_zero():
        (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        partial.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return True


def save_whole(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Saves a model so that its folder appears with all of it or not at all.

    Args:
        folder (`Path`): Where to; there must be nothing yet.
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Its tokenizer.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    partial.rename(folder)


def read_json(file: Path) -> dict[str, Any]:
    """What a file holds, or nothing where it was cut off while it was written.

    Args:
        file (`Path`): Of plain JSON types.
    """
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none.

    Args:
        folder (`Path`): The folder.
    """
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest training checkpoint that was written to its end.

    Args:
        folder (`Path`): Output folder of a `Trainer`.

    Returns:
        `Path` or `None`: A `checkpoint-N` folder. One without the trainer's state, which is written last, was cut off
        while saving and is passed over.
    """
    # A full disk leaves the file, and nothing in it.
    checkpoints = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if read_json(path)]
    return max(checkpoints, key=lambda path: int(path.name.split("-")[1]), default=None)


class _OrderByEpoch(TrainerCallback):
    """Lets seed and epoch alone decide the order of rows that are grouped by length.

    Trainer's sampler draws it from the global generator. A training that continues in the middle of an epoch, having
    drawn less from it, would skip other rows than those it had learned from; processes that draw unequally would not
    share one order.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = train_dataloader.batch_sampler
        # Of several processes, each wraps the batches of all.
        batches = batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches
        # Other samplers of batches take their order from seed and epoch already.
        if type(batches) is BatchSampler and isinstance(batches.sampler, LengthGroupedSampler):
            seed = args.seed if args.data_seed is None else args.data_seed
            batches.sampler.generator = torch.Generator().manual_seed(seed + int(state.epoch))
