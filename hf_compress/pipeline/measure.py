"""The measurements of a recipe's run: each saved model, loaded again, beside the one that all began with."""

import platform
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from transformers import AutoTokenizer

import hf_compress
from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.evaluation.cost import measure_cost
from hf_compress.evaluation.files import weight_files
from hf_compress.evaluation.latency import compare_latency
from hf_compress.evaluation.parts import bytes_by_part, seconds_by_part
from hf_compress.evaluation.retention import retention_from_outputs
from hf_compress.evaluation.sample import sample_batch
from hf_compress.modeling.tasks import names_of_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_compress.jobs.task_data import Outputs, TaskData
    from hf_compress.recipe.steps import MeasureConfig

Entry = dict[str, Any]


class Measurer:
    """Measures saved models beside a reference.

    Args:
        reference (`str`): Folder or name of the model that all are compared with.
        data (`TaskData`): The rows to measure on.
        config (`MeasureConfig`): Batches and lengths.
        seed (`int`): Of the resamples.
    """

    def __init__(self, reference: str, data: "TaskData", config: "MeasureConfig", seed: int) -> None:
        self._data, self._config, self._seed = data, config, seed
        self._path = reference
        # Made when they are needed: a run that continues may have nothing left to measure.
        self._reference: PreTrainedModel | None = None
        self._outputs: Outputs | None = None

    @property
    def reference(self) -> "PreTrainedModel":
        """The model that all are compared with."""
        if self._reference is None:
            self._reference = self._load(self._path)
        return self._reference

    @property
    def reference_outputs(self) -> "Outputs":
        """What it says of the rows to measure on."""
        if self._outputs is None:
            tokenizer = AutoTokenizer.from_pretrained(self._path)
            self._outputs = self._data.outputs(self.reference, tokenizer, self._config.eval_batch_size)
        return self._outputs

    def measure(self, path: str) -> Entry:
        """Measures a saved model.

        Args:
            path (`str`): Its folder, or a name on the Hub.

        Returns:
            `dict`: `quality`, `cost`, `latency`, `latency_conditions`, `parts`, `needs_hf_compress`.
        """
        is_reference = path == self._path
        model = self.reference if is_reference else self._load(path)
        # Before the model runs, since a forward may repack quantized weights.
        n_bytes = bytes_by_part(path) if weight_files(path) else {}
        quality = self._quality(model, path)
        latency: dict[str, Any] = {}
        conditions: dict[str, Any] = {}
        for size in self._config.batch_sizes:
            batch = self._batch(model, size)
            models = {"reference": self.reference} | ({} if is_reference else {"model": model})
            times = compare_latency(models, batch, n_runs=self._config.n_runs)
            name = list(models)[-1]
            one = times.latency[name]
            latency[str(size)] = {
                "median_s": one.median_s,
                "p95_s": one.p95_s,
                "reference_median_s": times.latency["reference"].median_s,
                "ratio": times.ratio[name],
                "dtype": one.dtype,
            }
            conditions = times.to_dict()["conditions"]
        largest = self._batch(model, max(self._config.batch_sizes))
        cost = measure_cost(model, largest, path=path if weight_files(path) else None, n_runs=self._config.n_runs)
        return {
            "needs_hf_compress": isinstance(vars(model.config).get("quantization_config"), CompressionConfig),
            "quality": quality,
            "cost": cost.to_dict(),
            "latency": latency,
            "latency_conditions": conditions,
            "parts": {"bytes": n_bytes, "seconds": seconds_by_part(model, largest)},
        }

    def _quality(self, model: "PreTrainedModel", path: str) -> dict[str, Any]:
        of_reference = self.reference_outputs
        outputs = of_reference
        if path != self._path:
            tokenizer = AutoTokenizer.from_pretrained(path)
            outputs = self._data.outputs(model, tokenizer, self._config.eval_batch_size)
        kept = retention_from_outputs(
            of_reference.logits,
            outputs.logits,
            of_reference.labels,
            metric=self._data.metric(self.reference),
            kind=self._data.kind(self.reference),
            label_names=names_of_labels(model.config),
            seed=self._seed,
        )
        return kept.to_dict()

    def _load(self, path: str) -> "PreTrainedModel":
        return self._data.model_class.from_pretrained(path).to(PartialState().device).eval()

    def _batch(self, model: "PreTrainedModel", size: int) -> dict[str, torch.Tensor]:
        length = self._config.length or self._data.config.max_length
        return sample_batch([model, self.reference], size, length, self._seed)


def surroundings(conditions: dict[str, Any]) -> dict[str, Any]:
    """What the figures of a report were measured with.

    Args:
        conditions (`dict`): Of one latency.

    Returns:
        `dict`: `machine` and `versions`.
    """
    return {
        "machine": {name: conditions[name] for name in ("device", "processor", "threads")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_compress": hf_compress.__version__,
        },
    }
