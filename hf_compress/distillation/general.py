"""General distillation: what a student of the pretrained model learned, for the students of fine-tuned ones."""

from typing import TYPE_CHECKING

import torch

from hf_compress.modeling.tasks import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def add_general_(student: "PreTrainedModel", general: "PreTrainedModel", untrained: "PreTrainedModel") -> None:
    """Adds what a general student learned to a student that was cut from a fine-tuned teacher.

    TinyBERT distils the pretrained model on general text once, and then each fine-tuned teacher into that student
    (Jiao et al., 2020, arXiv:1909.10351, section 3.2). Here a student keeps what its teacher was fine-tuned to, and
    gets the difference: `student + general - untrained`, a task vector (Ilharco et al., 2023, arXiv:2212.04089).

    Args:
        student (`PreTrainedModel`): From `make_student`, of a teacher that was fine-tuned from the pretrained model.
            Its head, and what else the others lack, stay.
        general (`PreTrainedModel`): A student of the pretrained model, from the same `StudentConfig`, distilled.
        untrained (`PreTrainedModel`): The same as `make_student` gave it.

    Raises:
        ValueError: if the three are not of the same shape. The student is as it was then.
    """
    weights, after, before = (_body(model) for model in (student, general, untrained))
    if before.keys() != after.keys() or not weights.keys() & before.keys():
        raise ValueError(
            f"The student, a {type(unwrap(student)).__name__}, the general one, a {type(unwrap(general)).__name__}, "
            f"and the untrained one, a {type(unwrap(untrained)).__name__}, do not have the same layers: make "
            "all three with the same StudentConfig."
        )
    shared = [name for name in weights if name in before]
    for name in shared:
        shapes = [tuple(one[name].shape) for one in (weights, after, before)]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"{name} is {shapes[0]} in the student, {shapes[1]} in the general student and {shapes[2]} in the "
                "untrained one: make all three with the same StudentConfig, from teachers of one pretrained model."
            )
    for name in shared:
        weights[name] += (after[name] - before[name]).to(weights[name])


def _body(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """Parameters without the task head."""
    return dict(unwrap(model).base_model.named_parameters())
