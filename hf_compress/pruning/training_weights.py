"""Single weights that go while a model is trained: chosen step by step, held at 0, and left out of the saved model."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.autograd.graph import get_gradient_edge

from hf_compress.modeling.projections import oriented
from hf_compress.pruning.masks import Selection, pool, true_share
from hf_compress.pruning.movement import MovementScores
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.unstructured import (
    allocate,
    make_selections,
    mark_pruned_,
    read_calibration,
    survey,
    sweep_,
)
from hf_compress.pruning.unstructured_config import DATA_SCORES, UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import Layer, choose_layers

logger = logging.getLogger(__name__)

PRUNING_FILE = "pruning.safetensors"


def select_share(selection: Selection, share: float) -> Selection:
    """The selection on the way to a last one.

    Args:
        selection (`Selection`): The last one.
        share (`float`): Of what goes in the end, how much goes now, from 0 to 1.

    Returns:
        `Selection`: With that share of its sparsity; of an n:m pattern, of the m - n weights that each group loses,
        rounded to whole ones.
    """
    if selection.group is None:
        return replace(selection, sparsity=share * selection.sparsity)
    n, m = selection.group
    return replace(selection, group=(m - round(share * (m - n)), m))


def clear_state_(optimizer: Any, parameter: nn.Parameter, mask: torch.Tensor) -> None:
    """Makes an optimizer forget what it remembers of some weights: momentum, means of squares, and what it may have.

    Args:
        optimizer (`torch.optim.Optimizer`): Knows the parameter.
        parameter (`nn.Parameter`): Whose state is changed, where it is of the same shape.
        mask (`torch.Tensor`): True where to forget, of the parameter's shape.

    Raises:
        ValueError: if the state is rounded, as that of 8-bit optimizers.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            if not value.is_floating_point():
                raise ValueError(
                    f"The optimizer {type(optimizer).__name__} keeps its state in {value.dtype}, whose 0 is no number "
                    "to forget by: take one with floating-point state, such as optim='adamw_torch'."
                )
            value.masked_fill_(mask, 0)


class WeightPruning:
    """Makes single weights 0, for `PruningCallback`.

    At each update the weights are ranked again, as `prune` would in one round, and more of them go. A weight that is
    gone stays 0: its gradient is taken away before gradients are clipped, the optimizer forgets it, and after each
    step it is set to 0 again, whatever the optimizer did. It does not come back, but for two scores: `"movement"`
    chooses anew at each update, and weights that come back have the values that they left with; `"sparsegpt"` makes up
    for what goes with all others, those that were 0 among them, at each update. Checkpoints hold the weights with
    their zeros, and in a file of their own the masks, with the scores of movement pruning.

    Args:
        config (`UnstructuredPruningConfig`): Which weights, how many in the end, and how they are chosen.

    Raises:
        ValueError: if the config asks for several steps, or for a repair.
    """

    def __init__(self, config: UnstructuredPruningConfig) -> None:
        if config.steps != 1:
            raise ValueError(f"steps={config.steps} does not fit a schedule: leave steps=1, and give n_updates.")
        if config.repair == "least_squares":
            raise ValueError(
                "repair='least_squares' fits what is left to the model before the training, and the training itself "
                "makes up for what goes: leave repair out."
            )
        self.config = config = replace(config, repair="none")
        self.needs_data = config.needs_data
        # Those with data take a forward pass over all of it each time.
        self.default_updates = 8 if config.score in DATA_SCORES else 32
        # Movement is seen after a step.
        self.first_step = 1 if config.score == "movement" else 0
        self._hooks = ExitStack()
        self._layers: list[Layer] = []
        self._masks: dict[str, torch.Tensor] = {}
        self._movement: MovementScores | None = None

    def start_(
        self,
        model: nn.Module,
        optimizer: Any,
        batches: Sequence[Mapping[str, Any]],
        checkpoint: Path | None,
    ) -> None:
        """Finds the layers, and watches their gradients.

        Args:
            model (`nn.Module`): A Transformers model, not wrapped.
            optimizer (`AcceleratedOptimizer`): That of the training.
            batches (`Sequence[Mapping[str, torch.Tensor]]`): Calibration data, where the config needs them.
            checkpoint (`Path`, *optional*): That the training continues from.

        Raises:
            ValueError: if the model cannot be pruned so, its weights do not learn what they are scored by, or the
                checkpoint is none of a training with this config.
        """
        self._hooks.close()
        self._model, self._optimizer = model, optimizer
        self._layers = choose_layers(model, self.config)
        self._masks = {layer.name: torch.zeros_like(layer.weight, dtype=torch.bool) for layer in self._layers}
        self._movement = MovementScores(self._layers) if self.config.score == "movement" else None
        self._batches = read_calibration(model, self._layers, self.config, batches)
        if checkpoint is not None:
            self._load_(checkpoint)
        else:
            # Every process reads batches of its own.
            with frozen(model):
                self._shares = broadcast_object_list([allocate(model, self._layers, self.config, self._batches)])[0]
        self._watch_gradients()

    def _watch_gradients(self) -> None:
        self._nodes = []
        for layer in self._layers:
            parameter = layer.module.weight
            if parameter.requires_grad:
                # The node that adds to `grad` sees gradients before they are averaged and clipped. Unlike a hook on
                # the parameter, it is left alone by those who only look, with torch.autograd.grad.
                node = get_gradient_edge(parameter).node
                self._hooks.enter_context(node.register_prehook(partial(self._mask_gradient, layer)))
                # Nothing else need hold the node, and with it the hook would go.
                self._nodes.append(node)
            elif self._movement is not None:
                raise ValueError(
                    f"score='movement' learns from gradients, but {layer.name} is frozen and has none: add "
                    f"{layer.name!r} to exclude, or let it train."
                )

    def _mask_gradient(self, layer: Layer, gradients: tuple[torch.Tensor | None]) -> tuple[torch.Tensor | None]:
        (gradient,) = gradients
        if gradient is None:
            return gradients
        if self._movement is not None:
            scaler = self._optimizer.scaler
            self._movement.add_(layer, gradient, None if scaler is None else scaler.get_scale())
        return (gradient.masked_fill(oriented(layer.module, self._masks[layer.name]), 0),)

    def update_(self, share: float) -> None:
        """Ranks the weights, and makes more of them 0.

        Args:
            share (`float`): Of all that is to go, how much is gone then; 1 in the last update.
        """
        logger.info("Making weights 0, up to %.1f %% of them.", 100 * share * self.config.target)
        is_first, is_alone = PartialState().process_index == 0, PartialState().num_processes == 1
        if self._movement is not None:
            self._movement.average_()
        if is_first:
            self._masks |= self._choose_(share)
        for layer in self._layers:
            mask = self._masks[layer.name]
            if not is_alone:
                mask = _share(mask.byte()).bool()
                self._masks[layer.name] = mask
            if self._movement is not None:
                self._movement.mask_(layer, mask)
            elif not is_alone:
                layer.weight.copy_(_share(layer.weight))
            clear_state_(self._optimizer, layer.module.weight, oriented(layer.module, mask))
        if share == 1:
            self._movement = None

    def _choose_(self, share: float) -> dict[str, torch.Tensor]:
        """New masks, by layer; weights are set already, but for movement."""
        at = partial(select_share, share=share)
        if self._movement is not None:
            scores = self._movement.scores
            pooled = {name: pool(values, self.config.block) for name, values in scores.items()}
            selections = make_selections(self.config, self._shares, at, lambda: pooled)
            return {name: selection.mask(scores[name]) for name, selection in selections.items()}
        what = self._model, self._layers, self.config, self._batches
        with frozen(self._model):
            selections = make_selections(self.config, self._shares, at, lambda: survey(*what, gone=self._masks))
            return sweep_(*what, selections, gone=self._masks)

    @torch.no_grad()
    def hold_(self) -> None:
        """Sets to 0 again what is gone."""
        for layer in self._layers:
            layer.weight.masked_fill_(self._masks[layer.name], 0)

    def save(self, checkpoint: Path) -> None:
        """Writes what a resumed training needs beside a checkpoint; to be called in all processes.

        Args:
            checkpoint (`Path`): The folder.
        """
        state = {f"{name}.mask": mask for name, mask in self._masks.items()}
        if self._movement is not None:
            self._movement.average_()
            state |= self._movement.state()
        if PartialState().is_main_process:
            metadata = {"config": json.dumps(self._settings()), "shares": json.dumps(self._shares)}
            # Masks of transposed weights are not contiguous.
            save_file(
                {name: tensor.contiguous() for name, tensor in state.items()}, checkpoint / PRUNING_FILE, metadata
            )

    def _settings(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self.config), default=dict))

    def _load_(self, checkpoint: Path) -> None:
        path = checkpoint / PRUNING_FILE
        if not path.exists() and self._read_masks_():
            return
        if not path.exists():
            raise ValueError(
                f"The training continues from step {checkpoint.name.split('-')[-1]}, but there is no {path}, which "
                "says what was pruned until then: continue from a checkpoint inside output_dir that was saved with "
                "this callback, or start anew."
            )
        with safe_open(path, "pt") as file:
            stored = {key: json.loads(value) for key, value in file.metadata().items()}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        now = self._settings()
        changed = [name for name in now if stored["config"].get(name) != now[name]]
        if changed or stored["shares"].keys() != self._masks.keys():
            changes = ", ".join(f"{name} was {stored['config'].get(name)!r} and is {now[name]!r}" for name in changed)
            raise ValueError(
                f"{path} was saved with other settings or layers ({changes or 'layers of another model'}): continue "
                "with the same ones, or start anew."
            )
        self._shares = stored["shares"]
        for layer in self._layers:
            self._masks[layer.name].copy_(state[f"{layer.name}.mask"])
            if layer.weight[self._masks[layer.name]].any():
                raise ValueError(
                    f"{path} says that weights of {layer.name} are pruned, but in the model they are not 0: it is of "
                    "another training. Continue from a checkpoint inside output_dir, or start anew."
                )
        is_over = not any(name.endswith(".scores") for name in state)
        if self._movement is not None and not is_over:
            self._movement.load_(state)
        elif is_over:
            self._movement = None

    def _read_masks_(self) -> bool:
        """Takes zeros for masks, where all that is to go is gone: a kill may have come before those were saved."""
        if self._movement is not None or self.config.needs_data:
            return False
        shares = broadcast_object_list([allocate(self._model, self._layers, self.config, self._batches)])[0]
        masks = {layer.name: layer.weight == 0 for layer in self._layers}
        if any(true_share(masks[name]) < share - 1e-6 for name, share in shares.items()):
            return False
        self._shares, self._masks = shares, masks
        return True

    def finish_(self) -> None:
        """Has later saves leave the zeros out."""
        self._hooks.close()
        self.hold_()
        mark_pruned_(self._model, self._layers)
        self._movement = None


def _share(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of the first process, in all of them."""
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=0)
    return tensor
