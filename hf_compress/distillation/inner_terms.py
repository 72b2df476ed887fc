"""What the student imitates inside its teacher: from term configs to the signals and the values of each term."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hf_compress.distillation import inner_losses as formulas
from hf_compress.distillation.arguments import TermConfig
from hf_compress.distillation.layer_map import map_layers
from hf_compress.distillation.objective import embed
from hf_compress.distillation.signals import Signals, signal_name
from hf_compress.modeling.blocks import Attention, check_stack, count_layers, find_blocks, find_stacks
from hf_compress.modeling.projections import out_width
from hf_compress.modeling.tasks import unwrap

# Kinds that compare token with token, so that both models must read the same tokens.
TOKEN_KINDS = frozenset({"hidden_mse", "hidden_cosine", "embedding", "attention_kl", "attention_mse", "relations"})
_QKV_KINDS = frozenset({"attention_kl", "attention_mse", "relations"})
_PROJECTED_KINDS = frozenset({"hidden_mse", "hidden_cosine", "embedding", "pkd", "contrastive"})


class Masks(NamedTuple):
    """Where the texts of a stack are real.

    Attributes:
        student (`torch.Tensor` or `None`): True at the student's real tokens (batch, length); `None` means all.
        teacher (`torch.Tensor` or `None`): The same for the teacher, whose tokenizer may be another.
        unit (`str`): What the student's tokens are counted as: `"tokens"` or `"decoder_tokens"`.
    """

    student: torch.Tensor | None
    teacher: torch.Tensor | None
    unit: str = "tokens"


class TermValues(NamedTuple):
    """What a term gives for one micro-batch.

    Attributes:
        values (`torch.Tensor`): One value per token (batch, length), or per row (batch,).
        mask (`torch.Tensor` or `None`): True where a value counts, of the same shape; `None` means everywhere.
        unit (`str`): What is counted: `"tokens"`, `"decoder_tokens"` or `"rows"`.
    """

    values: torch.Tensor
    mask: torch.Tensor | None
    unit: str


@dataclass(frozen=True)
class InnerTerm:
    """A term ready to be computed.

    Attributes:
        name (`str`): As it is logged.
        config (`TermConfig`): What was asked for.
        stack (`str`): Which stack of the student.
        teacher_stack (`str`): Which stack of the teacher.
        pairs (`list[tuple[int, int]]`): Layers of student and teacher.
        is_causal (`bool`): Whether a token sees only those before it.
    """

    name: str
    config: TermConfig
    stack: str
    teacher_stack: str
    pairs: list[tuple[int, int]]
    is_causal: bool

    @property
    def signal_kind(self) -> str:
        """The kind of signal that both models give for it."""
        return "qkv" if self.config.kind in _QKV_KINDS else "hidden"

    def student_signals(self) -> list[str]:
        """Names of the student's signals, pair by pair."""
        return [signal_name(self.signal_kind, self.stack, layer) for layer, _ in self.pairs]

    def teacher_signals(self) -> list[str]:
        """Names of the teacher's signals, pair by pair."""
        return [signal_name(self.signal_kind, self.teacher_stack, layer) for _, layer in self.pairs]


def plan_terms(configs: Sequence[TermConfig], student: nn.Module, teachers: Sequence[nn.Module]) -> list[InnerTerm]:
    """Checks term configs against the models, and maps layers.

    Args:
        configs (sequence of `TermConfig`): What to imitate.
        student (`nn.Module`): The student.
        teachers (sequence of `nn.Module`): The teachers.

    Returns:
        `list[InnerTerm]`: One per config, in its order; a kind that comes again gets a number behind its name.

    Raises:
        ValueError: if a teacher, stack or layer does not exist, the attention of a layer was removed, heads cannot be
            split, or an architecture's attention maps do not follow from its queries and keys.
    """
    terms, seen = [], {}
    for config in configs:
        if not 0 <= config.teacher < len(teachers):
            raise ValueError(
                f"teacher={config.teacher} of the term {config.kind} is out of range: there are {len(teachers)} "
                "teachers, counted from 0."
            )
        teacher = teachers[config.teacher]
        stack, teacher_stack = _choose_stack(student, config.stack), _choose_stack(teacher, config.stack)
        n_student, n_teacher = count_layers(student, stack), count_layers(teacher, teacher_stack)
        is_hidden = config.kind not in _QKV_KINDS
        try:
            pairs = map_layers(config.layer_map, n_student, n_teacher, allow_embeddings=is_hidden)
        except ValueError as error:
            raise ValueError(f"The term {config.kind}: {error}") from error
        seen[config.kind] = seen.get(config.kind, 0) + 1
        name = config.kind if seen[config.kind] == 1 else f"{config.kind}_{seen[config.kind]}"
        is_causal = stack == "decoder" or getattr(unwrap(student).config, "is_decoder", False)
        term = InnerTerm(name, config, stack, teacher_stack, pairs, is_causal)
        _check_attention(term, student, teacher)
        terms.append(term)
    return terms


def make_projections(terms: Sequence[InnerTerm], student: nn.Module, teachers: Sequence[nn.Module]) -> nn.ModuleDict:
    """Linear maps from the student's width to the teacher's, for hidden states that are compared across widths.

    Args:
        terms (sequence of `InnerTerm`): The terms of all stages.
        student (`nn.Module`): The student.
        teachers (sequence of `nn.Module`): The teachers.

    Returns:
        `nn.ModuleDict`: By teacher, stack and layers; terms that compare the same layers share one. Empty where all
        widths agree.
    """
    projections = nn.ModuleDict()
    for term in terms:
        if term.config.kind not in _PROJECTED_KINDS:
            continue
        width = hidden_width(student, term.stack)
        teacher_width = hidden_width(teachers[term.config.teacher], term.teacher_stack)
        for pair in term.pairs:
            key = _projection_key(term, pair)
            if width != teacher_width and key not in projections:
                projections[key] = nn.Linear(width, teacher_width)
    return projections


def compute_term(
    term: InnerTerm,
    student: Signals,
    teacher: Signals,
    projections: Mapping[str, nn.Module],
    masks: Masks,
) -> TermValues:
    """The values of a term for one micro-batch: the mean over its pairs of layers.

    Args:
        term (`InnerTerm`): What to compare.
        student (`Signals`): The student's signals, with their graph.
        teacher (`Signals`): The teacher's.
        projections (`Mapping[str, nn.Module]`): As `make_projections` made them.
        masks (`Masks`): Where the tokens of the term's stack are real.

    Returns:
        `TermValues`: One value per token or row.

    Raises:
        ValueError: if a signal is missing, or the models read texts of different length.
    """
    per_pair = []
    for pair, name, teacher_name in zip(term.pairs, term.student_signals(), term.teacher_signals(), strict=True):
        ours, theirs = student.get(name), teacher.get(teacher_name)
        if ours is None or theirs is None:
            raise ValueError(
                f"The term {term.name} needs {name} of the student and {teacher_name} of the teacher, but a forward "
                "pass gave none: the model did not run through that layer. Choose other layers."
            )
        per_pair.append(_KINDS[term.config.kind](term, pair, ours, theirs, projections, masks))
    values = torch.stack(per_pair).mean(0)
    if term.config.kind not in TOKEN_KINDS:
        return TermValues(values, None, "rows")
    if masks.student is None:
        return TermValues(values.mean(-1), None, "rows")
    return TermValues(values, masks.student, masks.unit)


def _choose_stack(model: nn.Module, stack: str | None) -> str:
    stacks = list(find_stacks(model))
    return check_stack(model, stack if stack is not None and len(stacks) > 1 else stacks[0])


def hidden_width(model: nn.Module, stack: str) -> int:
    """Width of the hidden states of a stack.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        stack (`str`): `"encoder"` or `"decoder"`.

    Returns:
        `int`: The live width, which the config may not tell.
    """
    return out_width(find_blocks(model, stack)[0].ffn.output)


def _projection_key(term: InnerTerm, pair: tuple[int, int]) -> str:
    return f"teacher{term.config.teacher}_{term.stack}{pair[0]}_{term.teacher_stack}{pair[1]}"


def _check_attention(term: InnerTerm, student: nn.Module, teacher: nn.Module) -> None:
    for model, stack in ((student, term.stack), (teacher, term.teacher_stack)):
        attention: Attention = find_blocks(model, stack)[0].attention
        is_plain = attention.layout.computes_plain_scores(unwrap(model).config)
        if term.config.kind in ("attention_kl", "attention_mse") and not is_plain:
            raise ValueError(
                f"The attention maps of {type(unwrap(model)).__name__} do not follow from its queries and keys alone, "
                "because positions are added later or they are scaled in another way: the term "
                f"{term.config.kind} cannot be computed. Use kind='relations', which any attention has."
            )
    if term.signal_kind == "qkv":
        _check_present(term, student, teacher)
    if term.config.kind == "relations":
        _check_relation_heads(term, student, teacher)


def _check_present(term: InnerTerm, student: nn.Module, teacher: nn.Module) -> None:
    sides = (("student", student, term.stack), ("teacher", teacher, term.teacher_stack))
    left = list(term.pairs)
    missing = []
    for place, (side, model, stack) in enumerate(sides):
        for layer in sorted({pair[place] for pair in term.pairs}):
            if not _attention_of(model, stack, layer).num_heads:
                missing.append(f"layer {layer} of the {side}'s {stack}")
                left = [pair for pair in left if pair[place] != layer]
    if missing:
        remedy = f"layers={[list(pair) for pair in left]}" if left else "other layers, or kind='hidden_mse'"
        raise ValueError(
            f"The term {term.name} compares queries, keys and values, but there are none in {' and '.join(missing)}, "
            f"whose attention was removed as a whole. Give the term {remedy}."
        )


def _check_relation_heads(term: InnerTerm, student: nn.Module, teacher: nn.Module) -> None:
    for layer, teacher_layer in term.pairs:
        ours = _attention_of(student, term.stack, layer)
        theirs = _attention_of(teacher, term.teacher_stack, teacher_layer)
        for attention in (ours, theirs):
            for heads in (attention.num_heads, attention.num_groups):
                width, number = heads * attention.head_dim, term.config.num_relation_heads or theirs.num_groups
                if width % number:
                    raise ValueError(
                        f"{number} relation heads do not divide the width {width} of {attention.name}: give the term "
                        "relations a num_relation_heads that divides the widths of student and teacher."
                    )


def _attention_of(model: nn.Module, stack: str, layer: int) -> Attention:
    blocks = find_blocks(model, stack)
    return blocks[min(layer, len(blocks)) - 1].attention


def _projected(term, pair, ours, projections) -> torch.Tensor:
    key = _projection_key(term, pair)
    return projections[key](ours.float()) if key in projections else ours


def embedding_width(models: Sequence[nn.Module]) -> int:
    """Channels of the embeddings that some models make of a text.

    Args:
        models (sequence of `nn.Module`): Teachers, or the student.

    Raises:
        ValueError: if they are not the same for all.
    """
    widths = [hidden_width(model, next(iter(find_stacks(model)))) for model in models]
    if len(set(widths)) > 1:
        raise ValueError(
            f"The teachers' embeddings have {', '.join(map(str, widths))} channels, which cannot be mixed: give "
            "teachers of one width, or one teacher."
        )
    return widths[0]


def check_tokens(term: InnerTerm, batch: Mapping[str, torch.Tensor]) -> None:
    """Raises if a term compares token with token, and the teacher reads other tokens than the student.

    Args:
        term (`InnerTerm`): The term.
        batch (`Mapping[str, torch.Tensor]`): With `teacher_input_ids` for a teacher with another tokenizer.

    Raises:
        ValueError: if so; lengths that are equal by padding would hide it.
    """
    if term.config.kind in TOKEN_KINDS and "teacher_input_ids" in batch:
        raise ValueError(
            f"The term {term.name} compares token with token, but the batch has teacher_input_ids, which are other "
            "tokens: take pkd, distance, angle or contrastive, or a teacher with the student's tokenizer."
        )


def _check_lengths(term: InnerTerm, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if ours.shape[:2] != theirs.shape[:2]:
        raise ValueError(
            f"The term {term.name} compares token with token, but the student reads {tuple(ours.shape[:2])} and the "
            f"teacher {tuple(theirs.shape[:2])} (rows, tokens): with another tokenizer or patch size take pkd, "
            "distance, angle or contrastive, which compare whole texts."
        )


def _hidden(formula: Callable) -> Callable:
    def compute(term, pair, ours, theirs, projections, masks):
        _check_lengths(term, ours, theirs)
        return formula(_projected(term, pair, ours, projections), theirs)

    return compute


def _first_token(term, pair, ours, theirs, projections, masks):
    ours, theirs = _embeddings(ours, theirs, masks, "cls")
    return formulas.normalized_squared_error(_projected(term, pair, ours, projections), theirs)


def _attention_map(formula: Callable) -> Callable:
    def compute(term, pair, ours, theirs, projections, masks):
        _check_lengths(term, ours.q[:, 0], theirs.q[:, 0])
        scores = [formulas.attention_scores(x.q, x.k, x.q.shape[-1] ** -0.5) for x in (ours, theirs)]
        return formula(*scores, _key_mask(masks.student, ours.k), term.is_causal)

    return compute


def _relations(term, pair, ours, theirs, projections, masks):
    _check_lengths(term, ours.q[:, 0], theirs.q[:, 0])
    number = term.config.num_relation_heads or theirs.k.shape[1]
    key_mask = _key_mask(masks.student, ours.k)
    each = [
        formulas.relation_divergence(s, t, number, key_mask, term.is_causal) for s, t in zip(ours, theirs, strict=True)
    ]
    return torch.stack(each).mean(0)


def _between_texts(formula: Callable) -> Callable:
    def compute(term, pair, ours, theirs, projections, masks):
        return formula(*_embeddings(ours, theirs, masks, "mean"))

    return compute


def _contrastive(term, pair, ours, theirs, projections, masks):
    ours, theirs = _embeddings(ours, theirs, masks, "mean")
    return formulas.contrastive(_projected(term, pair, ours, projections), theirs, term.config.temperature)


def _embeddings(ours: torch.Tensor, theirs: torch.Tensor, masks: Masks, pooling: str) -> list[torch.Tensor]:
    """Each text as one vector; all tokens count where there is no mask, as for images."""
    return [embed(hidden, mask, pooling) for hidden, mask in ((ours, masks.student), (theirs, masks.teacher))]


def _key_mask(mask: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    return mask if mask is not None else keys.new_ones((keys.shape[0], keys.shape[2]), dtype=torch.bool)


_KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "hidden_mse": _hidden(formulas.hidden_squared_error),
    "hidden_cosine": _hidden(formulas.hidden_cosine),
    "embedding": _hidden(formulas.hidden_squared_error),
    "attention_kl": _attention_map(formulas.attention_kl),
    "attention_mse": _attention_map(formulas.attention_squared_error),
    "pkd": _first_token,
    "relations": _relations,
    "distance": _between_texts(formulas.distance_loss),
    "angle": _between_texts(formulas.angle_loss),
    "contrastive": _contrastive,
}
