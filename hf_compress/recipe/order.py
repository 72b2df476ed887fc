"""Which steps may follow which, and why others may not."""

from collections.abc import Sequence

from hf_compress.recipe.steps import (
    DistilStep,
    EvaluateStep,
    FinetuneStep,
    PruneStep,
    PushStep,
    QuantizeStep,
    RecoverStep,
    SparsifyStep,
    Step,
    StudentStep,
    VocabularyStep,
)

_CUTS = (StudentStep, PruneStep, SparsifyStep, VocabularyStep)


def check_order(steps: Sequence[Step], places: Sequence[str] | None = None) -> None:
    """Raises if a step cannot come where it is.

    Args:
        steps (sequence of `Step`): In order.
        places (sequence of `str`, *optional*): Where each stands in a file, with which the message begins.

    Raises:
        ValueError: with the step, the reason and what to do instead.
    """
    if not steps:
        raise ValueError("The recipe has no steps, so nothing would be done: add one, such as `- prune:`.")
    for number, step in enumerate(steps):
        before = steps[:number]
        reason = _refused(step, before, is_last=number == len(steps) - 1)
        if reason:
            where = "S" if places is None else f"{places[number]}: s"
            raise ValueError(f"{where}tep {number + 1}, {step.key}, cannot come here: {reason}")


def _refused(step: Step, before: Sequence[Step], is_last: bool) -> str | None:
    """Why a step cannot follow others; `None` if it can."""

    def has(*kinds: type) -> bool:
        # By type, since a recovery is a distillation too.
        return any(type(one) in kinds for one in before)

    made = [one for one in before if not isinstance(one, EvaluateStep)]
    checks = {
        FinetuneStep: [(bool(made), "it makes the teacher, so it comes first.")],
        StudentStep: [
            (has(StudentStep), "there is a student already. Give its size in one step."),
            (any(not isinstance(one, FinetuneStep) for one in made), _STUDENT),
        ],
        DistilStep: [
            (not has(StudentStep), "it trains a student. Put `- student:` before it, or take `recover` after a prune.")
        ],
        RecoverStep: [
            (not has(*_CUTS), "nothing was taken away that could be recovered. Put `- prune:` or another cut before.")
        ],
        PruneStep: [(has(SparsifyStep), "its refit would fill the zeros of sparsify. Put it before that.")],
        SparsifyStep: [(has(SparsifyStep), "there are zeros already. Ask for the final sparsity in one step.")],
        VocabularyStep: [(has(VocabularyStep), "the vocabulary is cut already. Ask for the final size in one step.")],
        QuantizeStep: [
            (has(QuantizeStep), "the weights are rounded already. Give one format."),
            (
                isinstance(step, QuantizeStep) and step.format == "binary" and has(SparsifyStep),
                "weights of one bit have no zero, so those of sparsify would be lost. Give another format.",
            ),
        ],
        EvaluateStep: [(not made, "there is nothing to evaluate yet. Put it after a step that makes a model.")],
        PushStep: [
            (not is_last, "what is pushed is finished. Put it last."),
            (not made, "there is nothing to push. Put a step that makes a model before it."),
        ],
    }
    if has(QuantizeStep) and not isinstance(step, EvaluateStep | PushStep | QuantizeStep):
        return "nothing changes weights after they are quantized. Put it before quantize."
    return next((reason for is_wrong, reason in checks[type(step)] if is_wrong), None)


_STUDENT = "a student starts from a whole teacher. Put it first, or after finetune."
