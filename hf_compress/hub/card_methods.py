"""Which published methods a step used: what a model card cites, and what it is tagged with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Settings = Mapping[str, Any]


class Reference(NamedTuple):
    """A publication.

    Attributes:
        use (`str`): What of it was used.
        text (`str`): Authors, title, year, and where to find it.
    """

    use: str
    text: str


def _arxiv(authors: str, title: str, year: int, number: str) -> str:
    return f"{authors.rstrip('.')}. *{title}* ({year}). [arXiv:{number}](https://arxiv.org/abs/{number})"


_TINYBERT = _arxiv("Jiao et al.", "TinyBERT: Distilling BERT for Natural Language Understanding", 2020, "1909.10351")
_DISTILBERT = _arxiv(
    "Sanh, Debut, Chaumond and Wolf",
    "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
    2019,
    "1910.01108",
)
_WANDA = _arxiv(
    "Sun, Liu, Bair and Kolter",
    "A Simple and Effective Pruning Approach for Large Language Models",
    2024,
    "2306.11695",
)
_RKD = _arxiv("Park, Kim, Lu and Cho", "Relational Knowledge Distillation", 2019, "1904.05068")
_FILTERS = _arxiv("Li et al.", "Pruning Filters for Efficient ConvNets", 2017, "1608.08710")
_CONNECTIONS = _arxiv(
    "Han, Pool, Tran and Dally",
    "Learning both Weights and Connections for Efficient Neural Networks",
    2015,
    "1506.02626",
)
_QLORA = _arxiv(
    "Dettmers, Pagnoni, Holtzman and Zettlemoyer",
    "QLoRA: Efficient Finetuning of Quantized LLMs",
    2023,
    "2305.14314",
)
_INTEGERS = _arxiv(
    "Jacob et al.",
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    2018,
    "1712.05877",
)

# By the values of settings, which are unlike each other across steps.
_DIVERGENCES = {
    "forward_kl": Reference(
        "soft targets",
        _arxiv("Hinton, Vinyals and Dean", "Distilling the Knowledge in a Neural Network", 2015, "1503.02531"),
    ),
    "reverse_kl": Reference(
        "reverse KL divergence",
        _arxiv(
            "Gu, Dong, Wei and Huang", "MiniLLM: Knowledge Distillation of Large Language Models", 2024, "2306.08543"
        ),
    ),
    "jensen_shannon": Reference(
        "Jensen-Shannon divergence",
        _arxiv(
            "Agarwal et al.",
            "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
            2024,
            "2306.13649",
        ),
    ),
    "mse": Reference(
        "distance of the outputs", _arxiv("Ba and Caruana", "Do Deep Nets Really Need to be Deep?", 2014, "1312.6184")
    ),
}
_DIVERGENCES["auto"] = _DIVERGENCES["cross_entropy"] = _DIVERGENCES["forward_kl"]
_TERMS = {
    "hidden_mse": Reference("hidden states", _TINYBERT),
    "hidden_cosine": Reference("directions of hidden states", _DISTILBERT),
    "embedding": Reference("embeddings", _TINYBERT),
    "attention_mse": Reference("attention maps", _TINYBERT),
    "attention_kl": Reference(
        "attention distributions",
        _arxiv(
            "Wang et al.",
            "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
            2020,
            "2002.10957",
        ),
    ),
    "pkd": Reference(
        "first tokens of the layers",
        _arxiv(
            "Sun, Cheng, Gan and Liu", "Patient Knowledge Distillation for BERT Model Compression", 2019, "1908.09355"
        ),
    ),
    "relations": Reference(
        "self-attention relations",
        _arxiv(
            "Wang et al.",
            "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
            2021,
            "2012.15828",
        ),
    ),
    "distance": Reference("distances between texts", _RKD),
    "angle": Reference("angles between texts", _RKD),
    "contrastive": Reference(
        "contrastive term",
        _arxiv("Tian, Krishnan and Isola", "Contrastive Representation Distillation", 2020, "1910.10699"),
    ),
}
_MIXTURES = {
    "mean": Reference(
        "several teachers", "You, Xu, Xu and Tao. *Learning from Multiple Teacher Networks* (2017), KDD."
    ),
    "confidence": Reference(
        "several teachers",
        _arxiv("Zhang, Chen and Wang", "Confidence-Aware Multi-Teacher Knowledge Distillation", 2022, "2201.00007"),
    ),
}
_MIXTURES["weighted"] = _MIXTURES["mean"]
_UNIT_SCORES = {
    "obs": Reference(
        "scores of heads and neurons",
        _arxiv(
            "Kurtic, Frantar and Alistarh",
            "ZipLM: Inference-Aware Structured Pruning of Language Models",
            2023,
            "2302.04089",
        ),
    ),
    "fisher": Reference(
        "scores of heads and neurons",
        _arxiv("Kwon et al.", "A Fast Post-Training Pruning Framework for Transformers", 2022, "2204.09656"),
    ),
    "taylor": Reference(
        "scores of heads and neurons",
        _arxiv("Michel, Levy and Neubig", "Are Sixteen Heads Really Better than One?", 2019, "1905.10650"),
    ),
    "activation": Reference("scores of heads and neurons", _WANDA),
    **dict.fromkeys(("l1", "l2", "linf"), Reference("scores of heads and neurons", _FILTERS)),
}
_SPDY = Reference(
    "search for the widths",
    _arxiv("Frantar and Alistarh", "SPDY: Accurate Pruning with Speedup Guarantees", 2022, "2201.13096"),
)
_UNIT_REPAIRS = {
    "least_squares": Reference(
        "repair of what is left",
        _arxiv(
            "Park, Choi and Kang",
            "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models",
            2024,
            "2308.03449",
        ),
    ),
    "bias": Reference(
        "repair of what is left",
        _arxiv(
            "An, Zhao, Yu, Tang and Wang",
            "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
            2024,
            "2312.11983",
        ),
    ),
}
_WEIGHT_SCORES = {
    "sparsegpt": Reference(
        "choice of the weights",
        _arxiv(
            "Frantar and Alistarh",
            "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
            2023,
            "2301.00774",
        ),
    ),
    "wanda": Reference("choice of the weights", _WANDA),
    **dict.fromkeys(("magnitude", "l1", "l2"), Reference("choice of the weights", _CONNECTIONS)),
    "movement": Reference(
        "choice of the weights",
        _arxiv("Sanh, Wolf and Rush", "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, "2005.07683"),
    ),
}
_OWL = Reference(
    "sparsities of the layers",
    _arxiv(
        "Yin et al.",
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        2024,
        "2310.05175",
    ),
)
_VOCABULARY = Reference(
    "smaller vocabulary",
    _arxiv(
        "Yang, Cui and Chen", "TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models", 2022, "2203.15996"
    ),
)
_STUDENT = Reference("student that starts from its teacher", _DISTILBERT)
_FORMATS: dict[str, list[Reference]] = {
    "int8": [Reference("integer arithmetic", _INTEGERS)],
    "int8-bf16": [Reference("integer arithmetic", _INTEGERS)],
    "fixed-point": [Reference("integers with a scale", _INTEGERS)],
    "llm-int8": [
        Reference(
            "8-bit weights",
            _arxiv(
                "Dettmers, Lewis, Belkada and Zettlemoyer",
                "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
                2022,
                "2208.07339",
            ),
        )
    ],
    "nf4": [Reference("4-bit NormalFloat", _QLORA)],
    "fp4": [Reference("4-bit floats", _QLORA)],
    "binary": [
        Reference(
            "weights of one bit",
            _arxiv(
                "Rastegari, Ordonez, Redmon and Farhadi",
                "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
                2016,
                "1603.05279",
            ),
        ),
        Reference(
            "binary Transformers",
            _arxiv("Liu et al.", "BiT: Robustly Binarized Multi-distilled Transformer", 2022, "2205.13016"),
        ),
    ],
}
_SMOOTH = Reference(
    "smoothing of the inputs",
    _arxiv(
        "Xiao et al.",
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        2023,
        "2211.10438",
    ),
)
BOOTSTRAP = Reference(
    "intervals", "Koehn. *Statistical Significance Tests for Machine Translation Evaluation* (2004), EMNLP."
)
_TAGS = {
    "student": ("knowledge-distillation",),
    "distil": ("knowledge-distillation",),
    "recover": ("knowledge-distillation",),
    "prune": ("pruning", "structured-pruning"),
    "sparsify": ("pruning", "unstructured-pruning"),
    "vocabulary": ("vocabulary-pruning",),
    "quantize": ("quantization",),
}


def references_of(step: str, settings: Settings) -> list[Reference]:
    """The publications behind a step.

    Args:
        step (`str`): What a recipe calls it: `"distil"`, `"prune"`, ...
        settings (`Mapping`): Its settings, as a report holds them; of `distil` also `n_teachers`.

    Returns:
        `list[Reference]`: Of the methods that these settings choose; empty for what is common knowledge.
    """
    return _REFERENCES[step](settings) if step in _REFERENCES else []


def tags_of(step: str, settings: Settings) -> Sequence[str]:
    """What a model is tagged with that went through a step.

    Args:
        step (`str`): What a recipe calls it.
        settings (`Mapping`): Its settings.
    """
    return (*_TAGS.get(step, ()), settings["format"]) if step == "quantize" else _TAGS.get(step, ())


def _distillation(settings: Settings) -> list[Reference]:
    parts = [settings, *(settings.get("stages") or ())]
    found = []
    for part in parts:
        weights = [part.get("alpha", settings.get("alpha")), part.get("end_alpha")]
        name = part.get("divergence") or settings.get("divergence", "auto")
        if any(weights) and name in _DIVERGENCES:
            found.append(_DIVERGENCES[name])
        found += [_TERMS[term["kind"]] for term in part.get("terms") or ()]
    if settings.get("n_teachers", 1) > 1:
        found.append(_MIXTURES[settings["teacher_mixture"]])
    return found


def _student(settings: Settings) -> list[Reference]:
    return [_STUDENT] if settings.get("init", "teacher") == "teacher" else []


def _structured(settings: Settings) -> list[Reference]:
    found = []
    if list(settings["units"]) != ["layers"]:
        found += [_UNIT_SCORES[name] for name in [settings["score"]] if name in _UNIT_SCORES]
        is_searched = settings["scope"] == "global" and settings["search"] == "dynamic" and not settings["uniform"]
        found += [_SPDY] if is_searched else []
    return found + [_UNIT_REPAIRS[name] for name in [settings["repair"]] if name in _UNIT_REPAIRS]


def _unstructured(settings: Settings) -> list[Reference]:
    found = [_WEIGHT_SCORES[name] for name in [settings["score"]] if name in _WEIGHT_SCORES]
    return found + ([_OWL] if settings["allocation"] == "owl" else [])


def _quantization(settings: Settings) -> list[Reference]:
    found = list(_FORMATS.get(settings["format"], ()))
    return found + ([_SMOOTH] if settings.get("smooth") is not None else [])


_REFERENCES: dict[str, Callable[[Settings], list[Reference]]] = {
    "student": _student,
    "distil": _distillation,
    "recover": _distillation,
    "prune": _structured,
    "sparsify": _unstructured,
    "vocabulary": lambda settings: [_VOCABULARY],
    "quantize": _quantization,
}
