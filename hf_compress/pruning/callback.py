"""Pruning while a model is trained: by a schedule, more and more of it goes, and the rest adapts."""

import json
import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_compress.modeling.tasks import unwrap
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.schedule import SHARES, Schedule, update_steps
from hf_compress.pruning.training_units import UnitPruning
from hf_compress.pruning.training_weights import WeightPruning
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

logger = logging.getLogger(__name__)

PROGRESS_FILE = "pruning.json"

# What goes: heads and neurons, or single weights.
_STRATEGIES = {StructuredPruningConfig: UnitPruning, UnstructuredPruningConfig: WeightPruning}


class PruningCallback(TrainerCallback):
    """Prunes the model of a `Trainer` or `DistillationTrainer` during its training.

    Between two points of the training, what can go is scored again and again, and more and more of it goes; the
    weights around adapt. With a `StructuredPruningConfig`, heads and neurons are switched off, and cut out at the end
    of the training (see `UnitPruning`). With an `UnstructuredPruningConfig`, single weights become 0 and are held
    there, and saves after the training leave them out (see `WeightPruning`). A training that is resumed, from a
    checkpoint inside `output_dir`, ends like one that was not stopped. Resumed with another number of steps, it has
    the schedule of those: what is gone stays so, and what should be gone already goes at once.

    Args:
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): What to prune, and how much in the end.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Calibration batches; by default the first
            `n_batches` of the training data. Scores of the weights alone and movement need none.
        begin (`float`, *optional*, defaults to 0.0): Share of the training after which pruning begins.
        end (`float`, *optional*, defaults to 0.6): Share after which all is gone that is to go; the rest is recovery.
        n_updates (`int`, *optional*): How often things are scored and go: by default 8 times, or 32 times for single
            weights by scores that take no pass over calibration data.
        n_batches (`int`, *optional*, defaults to 16): Training batches to calibrate with.
        schedule (`str`, *optional*, defaults to `"cubic"`): How fast: `"cubic"` (much at first, little at the end),
            `"linear"`, or `"constant"` (all of it at `begin`, in one update).

    Raises:
        ValueError: if `begin`, `end`, the numbers or the schedule are out of range, the config asks for several
            steps, for a measured latency or for a repair of single weights, which the training itself does, or
            movement would be scored before anything has moved.
        TypeError: if the config is of no known kind.
    """

    def __init__(
        self,
        config: StructuredPruningConfig | UnstructuredPruningConfig,
        data: Iterable[Mapping[str, Any]] | None = None,
        begin: float = 0.0,
        end: float = 0.6,
        n_updates: int | None = None,
        n_batches: int = 16,
        schedule: Schedule = "cubic",
    ) -> None:
        if type(config) not in _STRATEGIES:
            known = ", ".join(kind.__name__ for kind in _STRATEGIES)
            raise TypeError(f"A {type(config).__name__} does not say what to prune: give one of {known}.")
        if not 0 <= begin < end <= 1:
            raise ValueError(f"begin={begin} and end={end} are shares of the training: give 0 <= begin < end <= 1.")
        if schedule not in SHARES:
            raise ValueError(f"schedule={schedule!r} is unknown: give one of {', '.join(map(repr, SHARES))}.")
        self._strategy = _STRATEGIES[type(config)](config)
        self.n_updates = self._strategy.default_updates if n_updates is None else n_updates
        if self.n_updates < 1 or n_batches < 1:
            raise ValueError(f"n_updates={n_updates} and n_batches={n_batches} must both be at least 1.")
        if schedule == "constant" and begin == 0 and self._strategy.first_step:
            raise ValueError(
                f"score={config.score!r} ranks weights by what the training did to them, and with schedule='constant' "
                "and begin=0.0 they would go before that shows: give a later begin, such as 0.3."
            )
        self.config, self.data = config, data
        self.begin, self.end, self.n_batches, self.schedule = begin, end, n_batches, schedule
        self._batches: list[Mapping[str, Any]] = []
        # Of all that is to go, how much is gone.
        self._share = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Prepares the model, as it is at the start or where a resumed training was."""
        if args.load_best_model_at_end and self.config.score == "movement":
            raise ValueError(
                "load_best_model_at_end does not fit score='movement', which chooses anew at each update: the best "
                "model may have other zeros than the last one. Set it to False, or take score='magnitude'."
            )
        if args.load_best_model_at_end:
            logger.warning(
                "load_best_model_at_end may bring back weights from before the last of them went, which have not "
                "learned to do without. Set it to False, or evaluate from `end` on only."
            )
        steps = self.update_steps(state.max_steps)
        if state.max_steps <= steps[-1]:
            raise ValueError(
                f"A training of {state.max_steps} steps has none before which score={self.config.score!r} can be "
                f"told: train for more than {steps[-1]}."
            )
        kind = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"{kind.value} spreads weights over processes, and they are ranked as a whole: train data-parallel "
                "(accelerate launch --multi_gpu), or prune after the training."
            )
        if self.data is not None:
            self._batches = list(self.data)
        elif self._strategy.needs_data:
            self._batches = list(islice(kwargs["train_dataloader"], self.n_batches))
        checkpoint = _checkpoint(args, state) if state.global_step > 0 else None
        self._strategy.start_(unwrap(model), kwargs["optimizer"], self._batches, checkpoint)
        self._share = 0.0 if checkpoint is None else self._read_share(checkpoint, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prunes at the steps of the schedule."""
        steps = self.update_steps(state.max_steps)
        share = self._share_by(state.global_step, steps)
        if share <= self._share:
            return
        if self._share < self._share_by(state.global_step - 1, steps):
            logger.warning(
                "Before step %d of %d, %.0f %% of what goes should be gone, and %.0f %% is: the training had more "
                "steps when it was stopped. The rest goes at once; resume with as many steps to have it go slowly.",
                state.global_step,
                state.max_steps,
                100 * share,
                100 * self._share,
            )
        self._strategy.update_(share)
        self._share = share

    def _share_by(self, step: int, steps: list[int]) -> float:
        """How much is to be gone before a step."""
        # Counted in updates, of which a short training has fewer than asked for: the last one reaches the end.
        n_due = sum(update <= step for update in steps)
        return SHARES[self.schedule](n_due / len(steps)) if n_due else 0.0

    def update_steps(self, max_steps: int) -> list[int]:
        """The steps before which something is pruned.

        Args:
            max_steps (`int`): Of the training.

        Returns:
            `list[int]`: Rising.
        """
        first = self._strategy.first_step
        return update_steps(max_steps, self.begin, self.end, self.n_updates, self.schedule, first)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes back what the optimizer did to what is gone."""
        self._strategy.hold_()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes what a resumed training needs beside the checkpoint."""
        folder = _checkpoint(args, state)
        self._strategy.save(folder)
        if PartialState().is_main_process and folder.exists():
            (folder / PROGRESS_FILE).write_text(json.dumps({"share": self._share}) + "\n")

    def _read_share(self, checkpoint: Path, state: TrainerState) -> float:
        try:
            return json.loads((checkpoint / PROGRESS_FILE).read_text())["share"]
        except (FileNotFoundError, ValueError):
            # It was stopped before this was written; a training of the same length follows its schedule.
            return self._share_by(state.global_step - 1, self.update_steps(state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the pruned model one that can be saved."""
        if self._share < 1:
            logger.warning(
                "The training ended after %d of %d steps, and the last update would have been before step %d, so less "
                "is gone than was asked for: train on, or give an earlier `end`.",
                state.global_step,
                state.max_steps,
                self.update_steps(state.max_steps)[-1] + 1,
            )
        self._strategy.finish_()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that was just saved, or that the training continues from."""
    folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    # A search of hyperparameters has a folder for each of its runs, of which the last one is being trained.
    runs = Path(args.output_dir).glob(f"*/{folder.name}")
    return folder if folder.exists() else max(runs, key=lambda run: run.stat().st_mtime, default=folder)
