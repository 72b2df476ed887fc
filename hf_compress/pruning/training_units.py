"""Heads and neurons that go while a model is trained: switched off step by step, and cut out at the end."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_compress.checkpoint.widths import write_widths_
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.capture import hang_gates_, release_gates_
from hf_compress.modeling.projections import read_matrix
from hf_compress.pruning.calibration import calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.costs import Costs
from hf_compress.pruning.cutting import cut_
from hf_compress.pruning.obs import Removal
from hf_compress.pruning.structured import check_budget, check_prunable, choose_units
from hf_compress.pruning.units import Part, Site, find_sites, unit_size

logger = logging.getLogger(__name__)


class UnitPruning:
    """Switches units off, for `PruningCallback`.

    What is switched off stays so: its columns of the output projection are 0, in checkpoints too, from which a resumed
    run reads what was gone. At the end the units are cut out, which changes no output. Nothing is repaired by least
    squares: the training does that.

    Args:
        config (`StructuredPruningConfig`): What to cut; `budget` is what is left at the end.

    Raises:
        ValueError: if the config asks for several steps, for a measured latency or for whole layers.
    """

    default_updates = 8
    first_step = 0
    # Costs are counted at the mean length of the texts.
    needs_data = True

    def __init__(self, config: StructuredPruningConfig) -> None:
        if config.steps != 1 or config.cost == "latency" or config.units == ("layers",):
            raise ValueError(
                f"steps={config.steps}, cost={config.cost!r} and units={config.units} do not fit a schedule: give "
                "n_updates for rounds, a cost that is counted, and heads or neurons."
            )
        self.config = config
        self._hooks = ExitStack()
        self._gates: dict[Part, torch.Tensor] = {}
        self._sites: list[Site] = []

    def start_(
        self,
        model: nn.Module,
        optimizer: Any,
        batches: Sequence[Mapping[str, Any]],
        checkpoint: Path | None,
    ) -> None:
        """Hangs gates on the model; a resumed one says by its zeros what is switched off.

        Args:
            model (`nn.Module`): A Transformers model, not wrapped.
            optimizer (`AcceleratedOptimizer`): Whose steps are refused once the units are cut out. Until then, what
                its momentum moves is taken back.
            batches (`Sequence[Mapping[str, torch.Tensor]]`): Calibration data.
            checkpoint (`Path`, *optional*): Not used: the weights say it all.

        Raises:
            ValueError: if the model is quantized, or the budget cannot be met.
        """
        self._hooks.close()
        release_gates_(model)
        check_prunable(model)
        check_budget(model, self.config, batches or None)
        self._model, self._batches, self._optimizer = model, batches, optimizer
        self._sites = find_sites(find_blocks(model))
        self._gates = {part: _live_units(part) for site in self._sites for part in site.parts}
        self._hooks = hang_gates_(model, self._gates)

    def update_(self, share: float) -> None:
        """Scores the units, and switches more of them off.

        Args:
            share (`float`): Of all that is to go, how much is gone then, up to 1.
        """
        budget = self.config.budget + (1 - self.config.budget) * (1 - share)
        logger.info("Switching units off, down to %.1f %% of the %s.", 100 * budget, self.config.cost)
        # Every process reads batches of its own, and all must switch off the same units.
        found = [None]
        if PartialState().process_index == 0:
            calibration = calibrate(self._model, self.config, self._batches or None)
            for site in self._sites:
                live = self._gates[site.parts[0]].cpu() > 0
                calibration.removals[site.name] = dead_first(calibration.removals[site.name], live)
            costs = Costs(self.config.cost, self._sites, calibration.batches, lengths=calibration.lengths)
            target = budget * costs.total(self._sites)
            found = [choose_units(self._model, self._sites, self.config, calibration, costs, target)]
        kept = broadcast_object_list(found)[0]
        for site in self._sites:
            for part in site.parts:
                # What is off already does not come back.
                gate = torch.zeros(site.n_units)
                gate[kept[site.name]] = 1.0
                self._gates[part].mul_(gate)
        self.hold_()

    @torch.no_grad()
    def hold_(self) -> None:
        """Takes back what momentum moved in the columns of units that are off."""
        for part, gate in self._gates.items():
            weight = read_matrix(part.output)
            columns = gate.repeat_interleave(unit_size(part)).to(weight)
            weight.mul_(columns)

    def save(self, checkpoint: Path) -> None:
        """Adds nothing to a checkpoint: its weights say what is off.

        Args:
            checkpoint (`Path`): The folder.
        """

    def finish_(self) -> None:
        """Cuts out what is switched off, and writes the config."""
        self._hooks.close()
        self.hold_()
        kept = {site.name: self._gates[site.parts[0]].nonzero()[:, 0] for site in self._sites}
        cut_(self._model, self._sites, kept)
        write_widths_(self._model)
        if self._optimizer is not None:
            getattr(self._optimizer, "optimizer", self._optimizer).register_step_pre_hook(_refuse_step)


def _refuse_step(*_: Any) -> None:
    raise ValueError(
        "The model was cut, and this optimizer holds the weights that it had before: to train on, make a new Trainer "
        "for the pruned model, without the PruningCallback."
    )


def dead_first(removal: Removal, live: torch.Tensor) -> Removal:
    """An order in which units that are off go first and cost nothing: scores of weights alone may rank them higher.

    Args:
        removal (`Removal`): As scored.
        live (`torch.Tensor`): True for units that are on, shape (units,).

    Returns:
        `Removal`: With the others in their order, at what each adds.
    """
    is_live, lost = live[removal.order], removal.error.diff()
    lost = torch.cat([torch.zeros_like(lost[~is_live]), lost[is_live]])
    order = torch.cat([removal.order[~is_live], removal.order[is_live]])
    return Removal(order, torch.cat([lost.new_zeros(1), lost.cumsum(0)]))


def _live_units(part: Part) -> torch.Tensor:
    """1 for units whose columns of the output projection are not all 0."""
    columns = read_matrix(part.output).unflatten(1, (-1, unit_size(part)))
    return (columns != 0).any(2).any(0).float().cpu()
