"""What a card cites: every method that settings can choose, and none that they did not."""

import re

import pytest

from hf_compress.distillation.arguments import Divergence, TermKind
from hf_compress.hub import card_methods
from hf_compress.hub.card_methods import references_of, tags_of
from hf_compress.pruning.config import Score
from hf_compress.pruning.unstructured_config import WeightScore
from hf_compress.recipe.format_options import FORMATS


def cited(step, settings):
    return {reference.text for reference in references_of(step, settings)}


PRUNED = {"units": ["heads", "neurons"], "scope": "global", "search": "dynamic", "uniform": False, "repair": "none"}


@pytest.mark.parametrize("kind", TermKind.__args__)
def test_every_term_is_cited(kind):
    with_term = cited("distil", {"alpha": 0.9, "terms": [{"kind": kind}]})
    assert len(with_term) == 2
    assert with_term - cited("distil", {"alpha": 0.9})
    assert cited("distil", {"alpha": 0.0, "stages": [{"terms": [{"kind": kind}]}]}) == with_term - cited(
        "distil", {"alpha": 0.9}
    )


@pytest.mark.parametrize("divergence", Divergence.__args__)
def test_every_divergence_is_cited(divergence):
    assert len(cited("distil", {"alpha": 0.5, "divergence": divergence})) == (divergence != "cosine")
    assert not cited("distil", {"alpha": 0.0, "divergence": divergence})


@pytest.mark.parametrize("score", Score.__args__)
def test_every_score_of_units_is_cited(score):
    ranked = PRUNED | {"search": "ranking", "score": score}
    assert len(cited("prune", ranked)) == (score != "random")
    assert len(cited("prune", PRUNED | {"score": score})) == 1 + (score != "random")
    assert not cited("prune", ranked | {"units": ["layers"]})
    assert len(cited("prune", ranked | {"units": ["layers"], "repair": "bias"})) == 1


@pytest.mark.parametrize("score", WeightScore.__args__)
def test_every_score_of_weights_is_cited(score):
    assert len(cited("sparsify", {"score": score, "allocation": "uniform"})) == (score != "random")
    assert len(cited("sparsify", {"score": score, "allocation": "owl"})) == 1 + (score != "random")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_cited(name):
    assert bool(cited("quantize", {"format": name})) == (name not in ("bf16", "fp16"))
    assert tags_of("quantize", {"format": name}) == ("quantization", name)


def test_nothing_is_cited_that_was_not_used():
    assert not cited("finetune", {})
    assert not cited("student", {"init": "random"})
    several = {"alpha": 0.9, "n_teachers": 2, "teacher_mixture": "confidence"}
    assert len(cited("distil", several)) == 2


def test_references_are_whole():
    texts = [one.text for one in vars(card_methods).values() if isinstance(one, card_methods.Reference)]
    assert texts
    for text in texts:
        assert re.fullmatch(r"[^*]+\. \*[^*]+\* \((19|20)\d\d\).*", text), text
