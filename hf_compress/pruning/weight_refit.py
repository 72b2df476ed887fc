"""Repairing a live model after single weights went, from the first block to the last."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from hf_compress.modeling.blocks import Attention, Block, find_blocks
from hf_compress.modeling.projections import write_matrix_
from hf_compress.pruning.batches import Batch, check_finite
from hf_compress.pruning.layer_inputs import check_reached, watch_inputs
from hf_compress.pruning.masked_fit import fit_masked
from hf_compress.pruning.refit import add_moments_, read_targets
from hf_compress.pruning.repair import Moments
from hf_compress.pruning.replay import Replay
from hf_compress.pruning.units import Part
from hf_compress.pruning.weight_layers import Layer, find_layers


class WeightRepair:
    """Fits the weights that are left to the model as it was before anything went, block by block.

    Inputs come from the model whose earlier layers are pruned and repaired already. The projection that ends an
    attention or a feed-forward network aims at what the reference's residual stream holds after it, less what the
    model's holds before it, so that it makes up for what earlier ones could not; the others aim at the outputs that
    they have in the reference. Weights of 0 stay 0. What is tied to another layer's weight is left as it is.

    Args:
        model (`nn.Module`): A Transformers model. Is changed.
        reference (`nn.Module`): The model before.
        layers (`Sequence[Layer]`): Of the model, what may be changed.
        ridge (`float`): Pull towards the weights as they are, in units of the mean variance of the inputs.
        batches (`Sequence[dict[str, torch.Tensor]]`): Calibration data.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        layers: Sequence[Layer],
        ridge: float,
        batches: Sequence[Batch],
    ) -> None:
        n_users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
        dense = {layer.name: layer for layer in find_layers(reference)}
        self.ridge = ridge
        self._layers = {layer.module: layer for layer in layers if n_users[id(layer.module.weight)] == 1}
        self._dense_of = {layer: dense[layer.name] for layer in layers}
        self._dense, self._pruned = Replay(reference, batches), Replay(model, batches)
        self._blocks = zip(find_blocks(model), find_blocks(reference), strict=True)
        self._is_changed = False

    def repair_(self, name: str) -> None:
        """Repairs a block that is pruned by now; those between the one before and this one stay as they are.

        Args:
            name (`str`): Of the block, which comes after all that are repaired.

        Raises:
            ValueError: if activations are not finite, or a fit is impossible.
        """
        for block, dense_block in self._blocks:
            self._repair_block_(block, dense_block)
            if block.name == name:
                return

    def _repair_block_(self, block: Block, dense_block: Block) -> None:
        parts = [part for part in (*block.attentions, block.ffn) if any(self._layers_of(part))]
        given: dict[str, list[torch.Tensor]] = {}
        inner = [self._dense_of[layer] for part in parts for layer in self._inner(part)]
        keep = lambda layer, inputs, _: given.setdefault(layer.name, []).append(inputs)  # noqa: E731
        with watch_inputs(self._dense.model, inner, keep):
            targets = read_targets(self._dense, dense_block, {part.name for part in parts}) if parts else {}
        self._dense.finish(dense_block)
        for part in parts:
            self._fit_inner_(block, part, given)
            output = self._layers.get(part.output)
            if output and self._is_due(output):
                moments = Moments()
                add_moments_(moments, self._pruned, block, part, targets)
                self._fit_(output, moments)
        self._pruned.finish(block)

    def _fit_inner_(self, block: Block, part: Part, given: Mapping[str, list[torch.Tensor]]) -> None:
        moments = {layer: Moments() for layer in self._inner(part) if self._is_due(layer)}

        def add(layer: Layer, inputs: torch.Tensor, mask: torch.Tensor) -> None:
            # Batch after batch, and run after run where all layers share a block.
            target = self._dense_of[layer].module(given[layer.name].pop(0))
            moments[layer].add(inputs, target, mask.float())

        if moments:
            with watch_inputs(self._pruned.model, moments, add):
                self._pruned.visit(block, [part], lambda *_: None)
        for layer, sums in moments.items():
            self._fit_(layer, sums)

    def _layers_of(self, part: Part) -> Iterator[Layer]:
        extra = part.extra_inputs if isinstance(part, Attention) else ()
        return (self._layers[module] for module in (*part.inputs, *extra, part.output) if module in self._layers)

    def _inner(self, part: Part) -> list[Layer]:
        return [layer for layer in self._layers_of(part) if layer.module is not part.output]

    def _is_due(self, layer: Layer) -> bool:
        # Up to the first weight that went there is nothing to make up for.
        self._is_changed = self._is_changed or not torch.equal(layer.weight, self._dense_of[layer].weight)
        return self._is_changed

    def _fit_(self, layer: Layer, moments: Moments) -> None:
        check_reached(layer, moments.weight)
        check_finite(layer.name, moments.xx())
        check_finite(layer.name, moments.xy())
        old, has_bias = layer.weight.cpu(), layer.module.bias is not None
        weight, bias = fit_masked(moments, old != 0, old, self.ridge, has_bias)
        write_matrix_(layer.module, weight, bias if has_bias else None)
