"""How much a model's predictions depend on its units: gradients of all samples from few backward passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from hf_compress.modeling.capture import gate_outputs
from hf_compress.modeling.modes import evaluating
from hf_compress.modeling.tasks import CLASSIFICATION, count_rows, problem_type, task_of, without_cache
from hf_compress.pruning.batches import Batch, token_mask
from hf_compress.pruning.units import Site

OutputKind = Literal["categorical", "bernoulli", "gaussian"]
# Up to so many outputs per sample, the Fisher information is exact; one backward pass each.
MOST_OUTPUTS = 8
# Far below every logit, and finite in every dtype: what neither model can choose adds nothing to a divergence.
NEVER = -1e4


@dataclass
class Sensitivity:
    """What `measure_sensitivity` gathers, means over samples.

    Attributes:
        fisher (`dict[str, torch.Tensor]`): By site, the squared derivative of the log-likelihood by the gate of each
            unit, shape (units,).
        taylor (`dict[str, torch.Tensor]`): By site, the absolute derivative.
        tokens (`dict[str, list[torch.Tensor]]`): By part, the squared length of the gradient at its outputs, one
            tensor of shape (batch, length) per batch.
        metric (`dict[str, torch.Tensor]`): By part, second moments of that gradient, shape (hidden size, hidden size).
    """

    fisher: dict[str, torch.Tensor]
    taylor: dict[str, torch.Tensor]
    tokens: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    metric: dict[str, torch.Tensor] = field(default_factory=dict)


def output_factors(
    outputs: torch.Tensor, kind: OutputKind, n_draws: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Cotangents of outputs whose outer products sum up to the Fisher information of the distribution they stand for.

    For a categorical distribution that is diag(p) - p p^T, for Bernoulli's p (1 - p) per output, for a Gaussian of
    unit variance the identity. With few outputs per sample a root of it is taken exactly, which is the expectation
    over all labels; a categorical one needs one backward pass less than it has classes. Otherwise labels are drawn
    from the model, `n_draws` times: the same in expectation.

    Args:
        outputs (`torch.Tensor`): Logits or values, shape (samples, ..., outputs).
        kind (`str`): `"categorical"`, `"bernoulli"` or `"gaussian"`.
        n_draws (`int`): Draws, where there are many outputs per sample.
        generator (`torch.Generator`): Draws.

    Returns:
        `list[torch.Tensor]`: Tensors of the outputs' shape.
    """
    z = outputs.detach().float()
    n_outputs = z.shape[-1]
    is_exact = z.ndim == 2 and n_outputs <= MOST_OUTPUTS
    if kind == "categorical":
        p = z.softmax(-1)
        if is_exact:
            values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
            # The smallest is 0: adding the same to all logits changes nothing.
            return [values[:, i : i + 1].clamp_min(0).sqrt() * vectors[:, :, i] for i in range(1, n_outputs)]
        return [_draw_label(p, generator) / n_draws**0.5 for _ in range(n_draws)]
    scale = (z.sigmoid() * (1 - z.sigmoid())).sqrt() if kind == "bernoulli" else torch.ones_like(z)
    if is_exact:
        return [scale * one_hot for one_hot in torch.eye(n_outputs, device=z.device)]
    signs = [torch.randn(z.shape, generator=generator).sign().to(z.device) for _ in range(n_draws)]
    return [scale * sign / n_draws**0.5 for sign in signs]


def _draw_label(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """e_y - p for a label y drawn from p."""
    flat = p.flatten(0, -2)
    labels = torch.multinomial(flat.cpu(), 1, generator=generator).to(p.device)
    return torch.zeros_like(flat).scatter_(1, labels, 1.0).view_as(p) - p


def measure_sensitivity(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    *,
    use_labels: bool = False,
    n_draws: int = 4,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Derivatives by gates and by the outputs of parts, sample by sample.

    Args:
        model (`nn.Module`): A Transformers model.
        sites (`Sequence[Site]`): Whose units are gated.
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs of its forward.
        use_labels (`bool`, *optional*, defaults to `False`): Take the loss on the labels of the batches in place of
            the expectation over the model's own.
        n_draws (`int`, *optional*, defaults to 4): See `output_factors`.
        seed (`int`, *optional*, defaults to 0): Draws labels.
        progress (`Callable`, *optional*): Called after each batch.

    Returns:
        `Sensitivity`: In float64, the tokens' in float32.
    """
    task_of(model)  # Refuses what is not known, such as choices, which are rows of their own inside.
    parts = [part for site in sites for part in site.parts]
    generator = torch.Generator().manual_seed(seed)
    zeros = {site.name: torch.zeros(site.n_units, dtype=torch.float64) for site in sites}
    found = Sensitivity(zeros, {name: value.clone() for name, value in zeros.items()})
    found.tokens = {part.name: [] for part in parts}
    found.metric = {part.name: torch.zeros(1, dtype=torch.float64) for part in parts}
    n_samples = 0
    with frozen(model):
        for batch in batches:
            n_samples += count_rows(batch)
            _add_batch(model, sites, parts, batch, found, use_labels, n_draws, generator)
            progress()
    for values in (found.fisher, found.taylor, found.metric):
        for name in values:
            values[name] = values[name] / n_samples
    return found


def _add_batch(model, sites, parts, batch: Batch, found: Sensitivity, use_labels, n_draws, generator) -> None:
    n_samples = count_rows(batch)
    gates = {site.name: torch.ones(n_samples, site.n_units, device=model.device, requires_grad=True) for site in sites}
    outputs: dict[str, list[torch.Tensor]] = {part.name: [] for part in parts}
    with ExitStack() as hooks:
        hooks.enter_context(gate_outputs({part: gates[site.name] for site in sites for part in site.parts}))
        for part in parts:
            hook = part.output.register_forward_hook(lambda _, args, out, part=part: outputs[part.name].append(out))
            hooks.enter_context(hook)
        results = model(**without_cache(model, batch))
    if use_labels:
        # Of the mean over the batch: times the number of samples it is that of each sample's own loss.
        target, factors = results.loss[None], [torch.full((1,), float(n_samples))]
    else:
        target, factors = _prediction(model, results, batch, n_draws, generator)
    given = [(name, tensor) for name, tensors in outputs.items() for tensor in tensors]
    norms: dict[str, torch.Tensor | float] = dict.fromkeys(outputs, 0.0)
    for index, factor in enumerate(factors):
        wanted = [*gates.values(), *(tensor for _, tensor in given)]
        # What no prediction depends on, such as the last layer's other tokens, has no gradient.
        gradients = torch.autograd.grad(
            target, wanted, factor.to(target), retain_graph=index < len(factors) - 1, materialize_grads=True
        )
        for name, gradient in zip(gates, gradients, strict=False):
            gradient = gradient.cpu().double()
            found.fisher[name] += gradient.square().sum(0)
            found.taylor[name] += gradient.abs().sum(0)
        for (name, _), gradient in zip(given, gradients[len(gates) :], strict=True):
            norms[name] = norms[name] + gradient.float().square().sum(-1).cpu()
            flat = gradient.float().flatten(0, -2)
            found.metric[name] = found.metric[name] + (flat.T @ flat).cpu().double()
    for name, value in norms.items():
        found.tokens[name].append(value)


def _prediction(
    model: nn.Module, results, batch: Batch, n_draws: int, generator: torch.Generator
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    outputs, kind = task_outputs(model, results)
    stack = "decoder" if model.config.is_encoder_decoder else "encoder"
    is_answer = task_of(model) == "question-answering"
    if is_answer:
        # No answer lies in the padding.
        outputs = outputs.masked_fill(~token_mask(batch, stack, outputs.shape[-1]).bool()[:, None, :], NEVER)
    factors = output_factors(outputs, kind, n_draws, generator)
    if outputs.ndim == 3 and not is_answer:
        mask = token_mask(batch, stack, outputs.shape[1]).to(outputs)[..., None]
        factors = [factor * mask for factor in factors]
    return outputs, factors


def task_outputs(model: nn.Module, results) -> tuple[torch.Tensor, OutputKind]:
    """What a model predicts, and the distribution that it stands for.

    Args:
        model (`nn.Module`): A Transformers model.
        results (`ModelOutput`): What its forward returned.

    Returns:
        `tuple[torch.Tensor, str]`: Outputs, shape (batch, ..., outputs), for answers (batch, 2, length); and their
        kind as in `output_factors`.
    """
    task = task_of(model)
    if task == "question-answering":
        return torch.stack([results.start_logits, results.end_logits], dim=1), "categorical"
    if task == "feature-extraction":
        return results.last_hidden_state, "gaussian"
    if task in CLASSIFICATION:
        kinds = {"regression": "gaussian", "multi_label_classification": "bernoulli"}
        return results.logits, kinds.get(problem_type(model.config), "categorical")
    return results.logits, "categorical"


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradient of any parameter; all flags come back at the end.

    Args:
        model (`nn.Module`): Any model.
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
