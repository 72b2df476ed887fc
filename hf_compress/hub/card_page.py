"""The page of a model card: facts in, metadata and text out. It knows neither reports nor trainers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_compress.hub.card_base import Base
from hf_compress.hub.card_methods import Reference, references_of, tags_of

TEMPLATE = Path(__file__).parent / "card.md.j2"
# Stands for the repository in a card that does not know it yet.
PLACEHOLDER = "FOLDER-OR-REPOSITORY-OF-THIS-MODEL"
TAG = "hf_compress"


class Task(NamedTuple):
    """How a task is called where models are found and loaded.

    Attributes:
        kind (`str`): Its type in evaluation results.
        pipeline (`str` or `None`): The pipeline that serves it, which is also its tag on the Hub.
        auto_class (`str`): The class that loads its models.
    """

    kind: str
    pipeline: str | None
    auto_class: str


TASKS = {
    "sequence-classification": Task(
        "text-classification", "text-classification", "AutoModelForSequenceClassification"
    ),
    "token-classification": Task("token-classification", "token-classification", "AutoModelForTokenClassification"),
    "question-answering": Task("question-answering", None, "AutoModelForQuestionAnswering"),
    "seq2seq-lm": Task("text2text-generation", None, "AutoModelForSeq2SeqLM"),
    "masked-lm": Task("fill-mask", "fill-mask", "AutoModelForMaskedLM"),
    "causal-lm": Task("text-generation", "text-generation", "AutoModelForCausalLM"),
    "image-classification": Task("image-classification", "image-classification", "AutoModelForImageClassification"),
    "feature-extraction": Task("feature-extraction", "feature-extraction", "AutoModel"),
}

# Identifiers of hf.co/metrics for measures that have other names here.
_METRICS = {
    "token_accuracy": ("accuracy", {}),
    "f1_macro": ("f1", {"average": "macro"}),
    "f1_micro": ("f1", {"average": "micro"}),
    "f1_weighted": ("f1", {"average": "weighted"}),
}


class Data(NamedTuple):
    """The rows that a model was measured on.

    Attributes:
        shown (`str`): What a text calls the data set.
        hub_name (`str` or `None`): Its name on the Hub, where it has one.
        config (`str` or `None`): Its configuration on the Hub.
        split (`str` or `None`): The split.
    """

    shown: str
    hub_name: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name (`str`): The model's name in the index of results.
        title (`str`): The heading.
        summary (`str`): The first paragraph.
        base (`Base`): What it was made of.
        relation (`Literal["finetune", "quantized"]`): How it descends from the base.
        task (`str`): A key of `TASKS`.
        needs_hf_compress (`bool`): Whether only the library's loader reads it.
        steps (`Sequence[tuple[str, Mapping]]`): What was done to it, and how: see `references_of`.
        results (`Sequence[EvalResult]`): What was measured.
        datasets (`Sequence[str]`): Names on the Hub of what it was trained on.
        table (`Sequence[Sequence[str]]`): Rows of the table, headings first.
        conditions (`str`): How the table was measured.
        recipe (`str`): YAML of the settings.
        uses (`str`): What the model is for.
        limits (`Sequence[str]`): What is not known, and where it should not be used.
        repo_id (`str` or `None`): Where it is pushed to.
        tags (`Sequence[str]`): Further tags.
        references (`Sequence[Reference]`): Besides those of the steps.
    """

    name: str
    title: str
    summary: str
    base: Base
    relation: Literal["finetune", "quantized"]
    task: str
    needs_hf_compress: bool
    steps: Sequence[tuple[str, Mapping[str, Any]]]
    results: Sequence[EvalResult]
    datasets: Sequence[str]
    table: Sequence[Sequence[str]]
    conditions: str
    recipe: str
    uses: str
    limits: Sequence[str]
    repo_id: str | None = None
    tags: Sequence[str] = ()
    references: Sequence[Reference] = field(default_factory=tuple)


def render(facts: CardFacts) -> ModelCard:
    """The card.

    Args:
        facts (`CardFacts`): What it says.

    Returns:
        `ModelCard`: `str(card)` is the text of README.md.

    Raises:
        ValueError: if the metadata are not what huggingface_hub takes.
    """
    found = [one for step, settings in facts.steps for one in references_of(step, settings)]
    return ModelCard.from_template(
        metadata(facts),
        str(TEMPLATE),
        title=facts.title,
        summary=facts.summary,
        base=facts.base,
        version=version("hf_compress"),
        needs_hf_compress=facts.needs_hf_compress,
        code=loading_code(facts),
        table=markdown_table(facts.table),
        conditions=facts.conditions,
        uses=facts.uses,
        limits=facts.limits,
        recipe=facts.recipe.rstrip(),
        references=list(dict.fromkeys([*found, *facts.references])),
    )


def metadata(facts: CardFacts) -> ModelCardData:
    """The block of YAML at the head of a card. What is not known is left out.

    Args:
        facts (`CardFacts`): What the card says.

    Raises:
        ValueError: if huggingface_hub does not take the results.
    """
    base = facts.base
    tags = [TAG, *(tag for step, settings in facts.steps for tag in tags_of(step, settings)), *facts.tags]
    metrics = list(dict.fromkeys(one.metric_type for one in facts.results))
    return ModelCardData(
        language=base.language,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        library_name="transformers",
        pipeline_tag=TASKS[facts.task].pipeline,
        tags=tags,
        base_model=base.hub_name,
        base_model_relation=facts.relation if base.hub_name else None,
        datasets=list(facts.datasets) or None,
        metrics=metrics or None,
        model_name=facts.name if facts.results else None,
        eval_results=list(facts.results) or None,
    )


def eval_result(task: str, data: Data, metric: str, value: float, whose: str = "") -> EvalResult:
    """One measured value, as the index of results holds it.

    Args:
        task (`str`): A key of `TASKS`.
        data (`Data`): What it was measured on.
        metric (`str`): The library's name of the measure.
        value (`float`): The value, a share between 0 and 1 where the measure is one.
        whose (`str`, *optional*, defaults to `""`): What follows the measure's name, for another model's value.
    """
    kind, args = _METRICS.get(metric, (metric, {}))
    return EvalResult(
        task_type=TASKS[task].kind,
        dataset_type=data.hub_name or "local",
        dataset_name=data.shown,
        dataset_config=data.config,
        dataset_split=data.split,
        metric_type=kind,
        metric_name=metric + whose,
        metric_value=value,
        metric_args=args or None,
    )


def shared_limits(base: str) -> list[str]:
    """What is not known of any model that was compressed here.

    Args:
        base (`str`): What the model was made of.
    """
    return [
        "No groups were evaluated apart: neither rare labels, nor topics, dialects or groups of people. Compression "
        "can cost some of them more than the mean tells.",
        f"What {base} learned to do wrong, and its biases, can be in this model too: see its card.",
    ]


def loading_code(facts: CardFacts) -> str:
    """The lines that load a model.

    Args:
        facts (`CardFacts`): Its task, and whether the library must be imported.

    Returns:
        `str`: Python.
    """
    task, where = TASKS[facts.task], facts.repo_id or PLACEHOLDER
    names = [task.auto_class] + (["pipeline"] if task.pipeline else [])
    lines = ["import hf_compress  # registers what loads this checkpoint"] if facts.needs_hf_compress else []
    lines += [f"from transformers import {', '.join(names)}", ""]
    if task.pipeline:
        lines += [f'run = pipeline("{task.pipeline}", "{where}")', "# or the model alone"]
    return "\n".join([*lines, f'model = {task.auto_class}.from_pretrained("{where}")'])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        rows (`Sequence[Sequence[str]]`): Cells, headings first.
    """
    if not rows:
        return ""
    headings, *others = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *others))
