"""Movement pruning: weights that a training pushes away from 0 stay, those that it pushes towards 0 go.

Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from hf_compress.modeling.projections import oriented
from hf_compress.pruning.weight_layers import Layer


def movement(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What one step adds to the scores of weights: -dL/dS_ij = -(dL/da_i) x_j W_ij.

    With a_i = sum_k W_ik M_ik x_k and a mask M that keeps the highest scores S, equation 1 takes the gradient straight
    through the mask, so that weights that are masked collect scores too; (dL/da_i) x_j is the gradient by the weights
    of the forward pass, W * M. Equation 3 sums it up, S = -sum_t (dL/dW)_t W_t; a learning rate would not change the
    order.

    Args:
        gradient (`torch.Tensor`): By the masked weights, not masked itself, shape (outputs, inputs).
        weight (`torch.Tensor`): W, not masked, of the same shape.

    Returns:
        `torch.Tensor`: Of the same shape, in float32; positive where a step of descent moves a weight away from 0.
    """
    return -gradient.float() * weight.float()


class MovementScores:
    """The scores of the weights of some layers, and the values of those that are masked, which may come back.

    The parameters of the model hold W * M all the time, so that what runs, what is evaluated and what is saved is one
    and the same. A masked weight gets no gradient (equation 2) and keeps its value here.

    Args:
        layers (`Iterable[Layer]`): To be pruned, whole.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.scores = {layer.name: torch.zeros_like(layer.weight, dtype=torch.float32) for layer in layers}
        self._values = {layer.name: torch.zeros_like(layer.weight) for layer in layers}

    def add_(self, layer: Layer, gradient: torch.Tensor, scale: float | None) -> None:
        """Adds what one backward pass says.

        Args:
            layer (`Layer`): One of the layers.
            gradient (`torch.Tensor`): In the shape of the module's weight.
            scale (`float`, *optional*): What the loss was multiplied by, for float16; what overflowed counts nothing.
        """
        # One of the two is 0.
        weight = layer.weight + self._values[layer.name]
        gain = movement(oriented(layer.module, gradient), weight)
        if scale is not None:
            gain = (gain / scale).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.scores[layer.name] += gain

    def average_(self) -> None:
        """Makes the scores those of all processes, each of which has seen the gradients of its own rows."""
        n_processes = PartialState().num_processes
        if n_processes > 1:
            for scores in self.scores.values():
                dist.all_reduce(scores)
                scores /= n_processes

    @torch.no_grad()
    def mask_(self, layer: Layer, mask: torch.Tensor) -> None:
        """Masks other weights of a layer than before; those that come back have the values that they left with.

        Args:
            layer (`Layer`): One of the layers.
            mask (`torch.Tensor`): True where a weight is 0 from now on, shape (outputs, inputs).
        """
        weight = layer.weight + self._values[layer.name]
        self._values[layer.name] = weight.masked_fill(~mask, 0)
        layer.weight.copy_(weight.masked_fill(mask, 0))

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed training needs.

        Returns:
            `dict[str, torch.Tensor]`: By name.
        """
        scores = {f"{name}.scores": scores for name, scores in self.scores.items()}
        return scores | {f"{name}.values": values for name, values in self._values.items()}

    def load_(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` gave.

        Args:
            state (`Mapping[str, torch.Tensor]`): By name; others are passed over.
        """
        for name, scores in self.scores.items():
            scores.copy_(state[f"{name}.scores"])
            self._values[name].copy_(state[f"{name}.values"])
