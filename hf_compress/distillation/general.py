"""General distillation: what a student of the pretrained model learned, for the students of fine-tuned ones."""

from typing import TYPE_CHECKING

import torch

from hf_compress.modeling.blocks import count_layers, find_stacks
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
    models = tuple(map(unwrap, (student, general, untrained)))
    layers = [{stack: count_layers(model, stack) for stack in find_stacks(model)} for model in models]
    weights, after, before = (dict(model.base_model.named_parameters()) for model in models)
    # A general student may have a pooler that this task's models lack.
    if layers != [layers[0]] * 3 or before.keys() != after.keys() or not weights.keys() & before.keys():
        kinds = ", ".join(f"{type(model).__name__} ({found})" for model, found in zip(models, layers, strict=True))
        raise ValueError(
            f"The student, the general and the untrained one do not have the same layers: {kinds}. Make all three "
            "with the same StudentConfig."
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
