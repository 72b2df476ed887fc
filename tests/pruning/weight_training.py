"""Tiny trainings in which single weights go: rows for every kind of model, trainers, and what a callback can see."""

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_compress as hc
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import find_layers
from tests.modeling.tiny import tiny_model

TEXT = "BertForSequenceClassification"
# Conv1D, grouped heads, two stacks, images.
CLASSES = {
    "bert": TEXT,
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}


def model_of(model_type: str = "bert", **settings):
    return tiny_model(model_type, CLASSES[model_type], **settings)


def rows_of(model_type: str = "bert") -> list[dict]:
    rows = []
    for i in range(64):
        ids = [0, 5 + i % 30, 3 + i % 17, 2]
        if model_type == "vit":
            rows.append({"pixel_values": torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(i)).tolist()})
        else:
            rows.append({"input_ids": ids, "attention_mask": [1] * 4})
        # Trainer counts the first label of a text, which nothing predicts in a language model.
        rows[-1]["labels"] = i % 2 if model_type in ("bert", "vit") else [-100, *ids[1:]]
    return rows


def config(sparsity=0.6, score="magnitude", **values) -> UnstructuredPruningConfig:
    return UnstructuredPruningConfig(sparsity, score=score, **values)


def make_trainer(folder, callbacks, model=None, model_type="bert", distilled=False, rows=None, **values) -> Trainer:
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "lr_scheduler_type": "constant",
    } | values
    optimizer = settings.pop("optimizer_cls_and_kwargs", None)
    model = model_of(model_type) if model is None else model
    kinds = (hc.DistillationArguments, hc.DistillationTrainer) if distilled else (TrainingArguments, Trainer)
    extra = {"teacher": model_of(model_type)} if distilled else {}
    rows = rows_of(model_type) if rows is None else rows
    return kinds[1](
        model,
        kinds[0](str(folder), **settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer,
        **extra,
    )


def zeros(model) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight == 0 for layer in find_layers(model)}


def shares(model) -> dict[str, float]:
    return {name: mask.double().mean().item() for name, mask in zeros(model).items()}


class Watch(TrainerCallback):
    """Added after the pruning callback: masks after each update, and what moved in between."""

    def __init__(self) -> None:
        self.masks: list[dict[str, torch.Tensor]] = []
        self.moved = False
        self.has_memory = False
        self.has_gradient = False
        self.norms: list[float] = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.masks.append(zeros(model))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = [layer.module.weight.grad for layer in find_layers(model)]
        masks = [layer.module.weight == 0 for layer in find_layers(model)]
        self.has_gradient |= any(grad[mask].any().item() for grad, mask in zip(gradients, masks, strict=True))
        self.norms.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
        )

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        after = zeros(model)
        self.moved |= any((mask & ~after[name]).any().item() for name, mask in self.masks[-1].items())
        for layer in find_layers(model):
            for value in optimizer.state[layer.module.weight].values():
                if isinstance(value, torch.Tensor) and value.shape == layer.module.weight.shape:
                    self.has_memory |= value[layer.module.weight == 0].any().item()


class Stop(Exception):  # noqa: N818
    pass


class StopAt(TrainerCallback):
    """As if the process were killed before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop
