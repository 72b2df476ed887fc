"""Pruning while a model is trained: units are switched off step by step, and cut out at the end."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_compress.checkpoint.widths import write_widths_
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.capture import gate_outputs
from hf_compress.modeling.projections import read_matrix
from hf_compress.modeling.tasks import unwrap
from hf_compress.pruning.calibration import calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.costs import Costs
from hf_compress.pruning.cutting import cut_
from hf_compress.pruning.structured import check_prunable, choose_units
from hf_compress.pruning.units import Part, Site, find_sites, unit_size

logger = logging.getLogger(__name__)


def cubic_budget(progress: float, budget: float) -> float:
    """How much may be left after a share of the pruning: fast at first, slow at the end.

    s_t = s_f (1 - (1 - t)^3), for the share s_t that is gone; Zhu and Gupta, "To Prune, or Not to Prune" (2017),
    equation 1.

    Args:
        progress (`float`): t, from 0 to 1; values outside count as the nearer end.
        budget (`float`): What is left at the end, 1 - s_f.

    Returns:
        `float`: 1 - s_t.
    """
    left = 1 - min(max(progress, 0.0), 1.0)
    return budget + (1 - budget) * left**3


class PruningCallback(TrainerCallback):
    """Prunes the model of a `Trainer` or `DistillationTrainer` during its training.

    Between two points of the training, units are scored again and again on calibration data, and more and more of them
    are switched off by a cubic schedule; the weights around them adapt. What is switched off stays so: its columns of
    the output projection are 0, in checkpoints too, from which a resumed run reads what was gone. At the end of the
    training the units are cut out, which changes no output, and the config is written for `save_pretrained`. Nothing
    is repaired by least squares: the training does that.

    Args:
        config (`StructuredPruningConfig`): What to cut; `budget` is what is left at the end.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Calibration batches; by default the first
            `n_batches` of the training data.
        begin (`float`, *optional*, defaults to 0.0): Share of the training after which pruning begins.
        end (`float`, *optional*, defaults to 0.6): Share after which the budget is reached; the rest is recovery.
        n_updates (`int`, *optional*, defaults to 8): How often units are scored and switched off.
        n_batches (`int`, *optional*, defaults to 16): Training batches to calibrate with.

    Raises:
        ValueError: if `begin`, `end` or the numbers are out of range, or the config asks for several steps or for a
            measured latency.
    """

    def __init__(
        self,
        config: StructuredPruningConfig,
        data: Iterable[Mapping[str, Any]] | None = None,
        begin: float = 0.0,
        end: float = 0.6,
        n_updates: int = 8,
        n_batches: int = 16,
    ) -> None:
        if not 0 <= begin < end <= 1:
            raise ValueError(f"begin={begin} and end={end} are shares of the training: give 0 <= begin < end <= 1.")
        if n_updates < 1 or n_batches < 1:
            raise ValueError(f"n_updates={n_updates} and n_batches={n_batches} must both be at least 1.")
        if config.steps != 1 or config.cost == "latency" or config.units == ("layers",):
            raise ValueError(
                f"steps={config.steps}, cost={config.cost!r} and units={config.units} do not fit a schedule: give "
                "n_updates for rounds, a cost that is counted, and heads or neurons."
            )
        self.config, self.data = config, data
        self.begin, self.end, self.n_updates, self.n_batches = begin, end, n_updates, n_batches
        self._hooks = ExitStack()
        self._gates: dict[Part, torch.Tensor] = {}
        self._sites: list[Site] = []
        self._batches: list[Mapping[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hangs gates on the model; a resumed one says by its zeros what is switched off."""
        if args.load_best_model_at_end:
            logger.warning(
                "load_best_model_at_end may bring back weights from before the last units were switched off, which "
                "have not learned to do without them. Set it to False, or evaluate from `end` on only."
            )
        model = unwrap(model)
        check_prunable(model)
        data = kwargs["train_dataloader"] if self.data is None else self.data
        self._batches = list(islice(data, self.n_batches)) if self.data is None else list(data)
        self._sites = find_sites(find_blocks(model))
        self._gates = {part: _live_units(part) for site in self._sites for part in site.parts}
        self._hooks.enter_context(gate_outputs(self._gates))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Switches units off at the steps of the schedule."""
        updates = self.update_steps(state.max_steps)
        if state.global_step in updates:
            # Counted in updates, of which a short training has fewer than asked for: the last one reaches the budget.
            progress = (updates.index(state.global_step) + 1) / len(updates)
            self._switch_off(unwrap(model), cubic_budget(progress, self.config.budget))

    def update_steps(self, max_steps: int) -> list[int]:
        """The steps before which units are scored.

        Args:
            max_steps (`int`): Of the training.

        Returns:
            `list[int]`: Rising.
        """
        first, last = self.begin * max_steps, self.end * max_steps
        return sorted({int(first + (last - first) * i / self.n_updates) for i in range(self.n_updates)})

    def _switch_off(self, model: nn.Module, budget: float) -> None:
        logger.info("Switching units off, down to %.1f %% of the %s.", 100 * budget, self.config.cost)
        # Every process reads batches of its own, and all must switch off the same units.
        found = [None]
        if PartialState().process_index == 0:
            calibration = calibrate(model, self.config, self._batches or None)
            costs = Costs(self.config.cost, self._sites, calibration.batches)
            target = budget * costs.total(self._sites)
            found = [choose_units(self._sites, self.config, calibration, costs, target)]
        kept = broadcast_object_list(found)[0]
        for site in self._sites:
            for part in site.parts:
                # What is off already does not come back.
                gate = torch.zeros(site.n_units)
                gate[kept[site.name]] = 1.0
                self._gates[part].mul_(gate)
        self._zero_()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes back what momentum moved in the columns of units that are off."""
        self._zero_()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Cuts out what is switched off, and writes the config."""
        self._hooks.close()
        self._zero_()
        model = unwrap(model)
        kept = {site.name: self._gates[site.parts[0]].nonzero()[:, 0] for site in self._sites}
        cut_(model, self._sites, kept)
        write_widths_(model)

    @torch.no_grad()
    def _zero_(self) -> None:
        for part, gate in self._gates.items():
            weight = read_matrix(part.output)
            columns = gate.repeat_interleave(unit_size(part)).to(weight)
            weight.mul_(columns)


def _live_units(part: Part) -> torch.Tensor:
    """1 for units whose columns of the output projection are not all 0."""
    columns = read_matrix(part.output).unflatten(1, (-1, unit_size(part)))
    return (columns != 0).any(2).any(0).float().cpu()
