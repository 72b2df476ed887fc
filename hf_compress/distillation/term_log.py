"""What is noted of the loss terms between two logs, without waiting for the device until then."""

import logging
from collections.abc import Mapping

import torch
from transformers.trainer_pt_utils import nested_gather
from transformers.training_args import ParallelMode

from hf_compress.distillation.signals import Signals

logger = logging.getLogger(__name__)

# Values that are kept before they are added up: one operation for so many, which matters on a GPU.
_KEPT = 64


class TermLog:
    """Sums of the terms since the last log, and what went wrong with them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything noted."""
        self.shares: dict[str, torch.Tensor] = {}
        self.n_steps = 0
        self._values: dict[str, list[torch.Tensor]] = {}
        self._term_steps: dict[str, int] = {}
        self._zero: torch.Tensor | None = None
        self._empty_steps: torch.Tensor | int = 0

    def add(self, terms: Mapping[str, torch.Tensor], n_items: torch.Tensor | int, ends_step: bool) -> None:
        """Notes the terms of a micro-batch.

        Args:
            terms (`Mapping`): Unweighted terms of shape `()` by name.
            n_items (`torch.Tensor` of shape `()`, or `int`): Items of the whole optimizer step.
            ends_step (`bool`): Whether it is the last of the step.
        """
        for name, term in terms.items():
            values = self._values.setdefault(name, [])
            values.append(term.detach())
            if len(values) == _KEPT:
                values[:] = [torch.stack(values).sum()]
            # A term may be of one stage only: its mean is over the steps that had it.
            self._term_steps[name] = self._term_steps.get(name, 0) + ends_step
        self.n_steps += ends_step
        if ends_step:
            self._empty_steps = self._empty_steps + (n_items == 0)

    def check_finite(self, answers: Signals) -> None:
        """Notes whether what a teacher says are numbers; `read` raises where they were not.

        Args:
            answers (`Signals`): A teacher's outputs by name.
        """
        for value in answers.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                # Two extremes are cheaper than a test of every number, and NaN where one of them is. Infinity times 0
                # is NaN too.
                for extreme in value.aminmax():
                    self._zero = torch.mul(extreme, 0.0) if self._zero is None else self._zero.add(extreme, alpha=0.0)

    def raise_if_not_finite(self) -> None:
        """Raises where a teacher's outputs since the last log were not finite.

        Raises:
            ValueError: with what to check.
        """
        if self._zero is not None and self._zero.item() != 0:
            raise ValueError(
                "The teacher's outputs hold NaN or infinity, from which nothing can be learned: check its weights, "
                "and run it in float32 or bf16 where float16 overflows."
            )

    def read(self, parallel_mode: ParallelMode) -> dict[str, float]:
        """Means of the terms over the steps since the last time, over all processes.

        Args:
            parallel_mode (`ParallelMode`): As in the training arguments.

        Returns:
            `dict[str, float]`: By the terms' names; shares of the gradient norm as `<name>_gradient_share`.

        Raises:
            ValueError: if a teacher's outputs were not finite.
        """
        if self.n_steps == 0:
            return {}
        self.raise_if_not_finite()
        n_empty = int(self._empty_steps)
        if n_empty:
            logger.warning(
                "%d of the last %d optimizer steps had nothing to learn from: all their labels are -100 or all their "
                "tokens padding. Check the labels and the collator, or filter such rows out.",
                n_empty,
                self.n_steps,
            )
        totals = {name: torch.stack(values).sum() for name, values in self._values.items()}
        means = {
            name: nested_gather(total, parallel_mode).mean().item() / max(self._term_steps[name], 1)
            for name, total in totals.items()
        }
        means |= {f"{name}_gradient_share": share.item() for name, share in self.shares.items()}
        self.reset()
        return means


def gradient_shares(terms: Mapping[str, torch.Tensor], parameters: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The norm of each term's gradient over the sum of all terms' norms.

    Args:
        terms (`Mapping`): Weighted terms of shape `()` by name, with their graph, which stays.
        parameters (`list[torch.Tensor]`): With respect to which the gradients are.

    Returns:
        `dict[str, torch.Tensor]`: Shares of shape `()`, which sum to 1; all 0 where no term has a gradient.
    """
    norms = {}
    for name, term in terms.items():
        # Of what lies before all that is trained, there is none.
        has_graph = term.requires_grad
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True) if has_graph else ()
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        norms[name] = torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=term.device)
    total = sum(norms.values()).clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}
