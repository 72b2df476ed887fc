"""hf_compress: distil, prune and quantize fine-tuned Transformers models, and measure what was kept."""

import importlib
from typing import Any

from hf_compress.checkpoint.quantizer import register as _register_loader

_MODULES = {
    "AugmentationConfig": "hf_compress.distillation.augmentation",
    "BinaryConfig": "hf_compress.quantization.config",
    "BinaryCurriculum": "hf_compress.quantization.training",
    "Calibration": "hf_compress.pruning.calibration",
    "Cost": "hf_compress.evaluation.cost",
    "DistillationArguments": "hf_compress.distillation.arguments",
    "DistillationTrainer": "hf_compress.distillation.trainer",
    "FixedPointConfig": "hf_compress.quantization.config",
    "FloatConfig": "hf_compress.quantization.config",
    "Int8DynamicConfig": "hf_compress.quantization.config",
    "PruningCallback": "hf_compress.pruning.callback",
    "Recipe": "hf_compress.recipe.recipe",
    "StageConfig": "hf_compress.distillation.arguments",
    "StructuredPruningConfig": "hf_compress.pruning.config",
    "StudentConfig": "hf_compress.distillation.config",
    "TeacherCache": "hf_compress.distillation.cache",
    "TeacherCollator": "hf_compress.distillation.tokenizers",
    "TermConfig": "hf_compress.distillation.arguments",
    "UnstructuredPruningConfig": "hf_compress.pruning.unstructured_config",
    "VocabularyPruningConfig": "hf_compress.pruning.vocabulary_config",
    "add_general_": "hf_compress.distillation.general",
    "add_teacher_inputs": "hf_compress.distillation.tokenizers",
    "augment": "hf_compress.distillation.augmentation",
    "calibrate": "hf_compress.pruning.calibration",
    "compress": "hf_compress.pipeline.compress",
    "compare_latency": "hf_compress.evaluation.latency",
    "fake_quantize_": "hf_compress.quantization.training",
    "load_metric": "hf_compress.evaluation.metrics",
    "make_student": "hf_compress.distillation.student",
    "measure_cost": "hf_compress.evaluation.cost",
    "prune": "hf_compress.pruning.prune",
    "prune_": "hf_compress.pruning.prune",
    "prune_vocabulary": "hf_compress.pruning.vocabulary",
    "push_compressed": "hf_compress.hub.push",
    "quantize": "hf_compress.quantization.quantize",
    "quantize_": "hf_compress.quantization.quantize",
    "recommend_format": "hf_compress.recommend",
    "score_retention": "hf_compress.evaluation.retention",
    "set_activation_bits_": "hf_compress.quantization.training",
    "use_dense_kernels_": "hf_compress.pruning.sparse_compute",
    "use_sparse_kernels_": "hf_compress.pruning.sparse_compute",
}

__version__ = "0.1.0"
__all__ = sorted(_MODULES)


_register_loader()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
