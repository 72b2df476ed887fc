"""The model card of a distilled student: what its trainer was told, did and measured."""

import math
from collections.abc import Sequence, Sized
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard

from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.hub.card_base import Base, hub_name, name_base, read_base
from hf_compress.hub.card_page import TASKS, CardFacts, Data, eval_result, render, shared_limits
from hf_compress.modeling.tasks import unwrap

# Training arguments that decide a result, and none that names a place, an account or a token.
_ARGUMENTS = (
    "alpha", "end_alpha", "alpha_schedule", "temperature", "end_temperature", "temperature_schedule", "divergence",
    "terms", "stages", "pooling", "teacher_mixture", "teacher_weights", "dropout", "freeze_embeddings",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "label_smoothing_factor", "optim",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16",
    "fp16",
)  # fmt: skip
_ALWAYS = ("alpha", "temperature", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
_NO_MEASURES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_PREFIX = "eval_"


class CardMixin:
    """Writes the library's card in the place of `Trainer`'s own, also when the trainer pushes."""

    def create_model_card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
    ) -> None:
        """Writes `README.md` into the output folder.

        Adapters of PEFT keep `Trainer`'s card, since they are loaded in another way.

        Args:
            language (`str` or sequence of `str`, *optional*): By default, what the base's card says.
            license (`str`, *optional*): By default, the base's, if its card is found.
            tags (`str` or sequence of `str`, *optional*): Besides those of distillation.
            model_name (`str`, *optional*): By default, the name of the repository or of the output folder.
            finetuned_from (`str`, *optional*): The base. By default, what the student was loaded from, or its teacher.
            tasks (`str` or sequence of `str`, *optional*): The first is the pipeline's tag in the place of the task's.
            dataset_tags (`str` or sequence of `str`, *optional*): Names of the data sets on the Hub.
            dataset (`str` or sequence of `str`, *optional*): What the data sets are called.
            dataset_args (`str` or sequence of `str`, *optional*): Their configurations.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        old = ModelCard.load(path, ignore_metadata_errors=True).data if path.exists() else None
        if hasattr(self.model, "peft_config") or (old is not None and old.get("library_name") == "peft"):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        base = self._base(finetuned_from, language, license)
        named, configs = _listed(dataset_tags), _listed(dataset_args)
        shown = next(iter(_listed(dataset) or named), None)
        data = Data(
            shown or "its evaluation set",
            next((name for name in named if hub_name(name)), None),
            next(iter(configs), None),
        )
        extra = [*_listed(tags), *_listed(old.get("tags") if old is not None else None), "generated_from_trainer"]
        facts = self._facts(base, data, model_name or path.parent.resolve().name)
        facts = replace(facts, tags=extra, datasets=[name for name in named if hub_name(name)])
        card = render(facts)
        if tasks:
            card.data.pipeline_tag = _listed(tasks)[0]
        card.save(path)

    def _base(self, given: str | None, language: Any, license: str | None) -> Base:
        models = [unwrap(self.model), *(unwrap(teacher.model) for teacher in self.teachers)]
        names = [given, *(model.config._name_or_path for model in models)]
        name = next((name for name in names if name), None)
        base = Base(type(models[0]).__name__) if name is None else read_base(name)
        return base._replace(language=language or base.language, license=license or base.license)

    def _facts(self, base: Base, data: Data, name: str) -> CardFacts:
        model, args = unwrap(self.model), self.args
        measured = _last_measures(self._evaluations())
        settings = {key: value for key, value in args.to_dict().items() if key in _ARGUMENTS}
        teachers = " and ".join(dict.fromkeys(_called(unwrap(one.model)) for one in self.teachers))
        rows = f" on {len(self.train_dataset)} rows" if isinstance(self.train_dataset, Sized) else ""
        return CardFacts(
            name=name,
            title=f"{name}: distilled from {teachers}",
            summary=f"{model.num_parameters() / 1e6:.1f} M parameters, made of {base.shown} and trained by "
            f"`hf_compress` with {teachers} as its teacher{rows}.",
            base=base,
            relation="finetune",
            task=self.task,
            needs_hf_compress=isinstance(vars(model.config).get("quantization_config"), CompressionConfig),
            steps=[("distil", settings | {"n_teachers": len(self.teachers), "divergence": self._divergence()})],
            results=_results(self.task, data, measured),
            datasets=[],
            table=[("measure", "value"), *((key, f"{value:.4f}") for key, value in measured.items())]
            if measured
            else [],
            conditions=self._conditions(bool(measured)),
            recipe=yaml.safe_dump(_told(settings), sort_keys=False),
            uses=f"{TASKS[self.task].kind.capitalize().replace('-', ' ')} where its teacher would be used and is too "
            "large or too slow. Measure it on rows of your own before you rely on it.",
            limits=[
                "It was not compared with its teacher here: `hf_compress.score_retention(teacher, student, rows)` "
                "tells what it kept, and how far chance could have moved that.",
                *shared_limits(base.shown),
            ],
            # The former is known once a repository was made.
            repo_id=self.hub_model_id or self.args.hub_model_id,
        )

    def _evaluations(self) -> list[dict[str, Any]]:
        """What was logged of the model as it is: after the training, else at the step that was loaded in the end."""
        history = self.state.log_history
        ended = max((number for number, entry in enumerate(history) if "train_loss" in entry), default=-1)
        after = [entry for entry in history[ended + 1 :] if _is_evaluation(entry)]
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        if after or not best:
            return after or history
        return [entry for entry in history if entry.get("step") == best]

    def _divergence(self) -> str:
        if self.task == "feature-extraction":
            return "cosine" if self.args.divergence == "auto" else self.args.divergence
        is_regression = self.task == "sequence-classification" and unwrap(self.model).config.num_labels == 1
        return "mse" if is_regression else self.args.divergence

    def _conditions(self, is_measured: bool) -> str:
        state = self.state
        trained = f"Trained for {state.global_step} steps ({state.epoch or 0:.2f} epochs)"
        how = f"with one seed ({self.args.seed}), on {self.args.device.type}, {torch.get_num_threads()} threads"
        names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "hf_compress"))
        if not is_measured:
            return (
                f"{trained} {how}, and not measured: call `trainer.evaluate()` on labelled rows and write the card "
                f"again. Versions: {names}."
            )
        return f"{trained} and measured on the evaluation set of its trainer, {how}. Versions: {names}."


def _called(model: Any) -> str:
    name = model.config._name_or_path
    return name_base(name).shown if name else type(model).__name__


def _listed(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _is_evaluation(entry: dict[str, Any]) -> bool:
    return any(key.startswith(_PREFIX) for key in entry)


def _last_measures(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the last evaluation found, the loss first. Several evaluation sets have an entry each, of one step."""
    found = [entry for entry in history if _is_evaluation(entry)]
    last = {
        key: value for entry in found if entry.get("step") == found[-1].get("step") for key, value in entry.items()
    }
    values = {key.removeprefix(_PREFIX): value for key, value in last.items() if key.startswith(_PREFIX)}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value) and not key.endswith(_NO_MEASURES)
    }


def _results(task: str, data: Data, measured: dict[str, float]) -> list[EvalResult]:
    return [eval_result(task, data, key, value) for key, value in measured.items() if not key.endswith("loss")]


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides every training, and of the rest what is not as by default."""
    defaults = {one.name: one.default for one in fields(DistillationArguments)}
    is_default = {key for key, value in settings.items() if value in (defaults[key], None, [])}
    return {key: settings[key] for key in _ARGUMENTS if key in _ALWAYS or key not in is_default}
