"""What units cost is what a forward pass computes, of text and of images; too small a budget is refused at once."""

import numpy as np
import pytest
import torch

import hf_compress as hc
from hf_compress.evaluation.cost import count_macs
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.removal import remove_attention_
from hf_compress.pruning import structured
from hf_compress.pruning.batches import read_batches, token_mask
from hf_compress.pruning.costs import Costs, measure_lengths
from hf_compress.pruning.structured import check_budget
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import MODEL_TYPES, tiny_batch, tiny_model


def blind(**values):
    """A config that needs no scores from data."""
    return hc.StructuredPruningConfig(**({"multiple_of": 4, "score": "l2", "repair": "none"} | values))


def total_macs(model, batches) -> float:
    sites = find_sites(find_blocks(model))
    return Costs("macs", sites, batches, lengths=measure_lengths(model, batches)).total(sites)


# Products with relative positions, which DeBERTa has, are not counted.
@pytest.mark.parametrize("model_type", [model_type for model_type in MODEL_TYPES if model_type != "deberta-v2"])
def test_macs_are_those_that_are_counted(model_type):
    model = tiny_model(model_type)
    batch = {name: tensor[:1] for name, tensor in tiny_batch(model).items()}
    pruned = hc.prune(model, blind(budget=0.5), [batch])
    counted = count_macs(model, batch) - count_macs(pruned, batch)
    assert counted == pytest.approx(total_macs(model, [batch]) - total_macs(pruned, [batch]))


def test_an_image_is_as_long_as_its_patches_and_what_is_put_before_them():
    model = tiny_model("vit")
    small = tiny_batch(model)
    assert measure_lengths(model, [small])["encoder"].tolist() == [5, 5]
    sites = find_sites(find_blocks(model))
    with pytest.raises(ValueError, match="How many tokens an image makes is not seen"):
        Costs("macs", sites, [small])
    assert Costs("params", sites, [small]).total(sites) > 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_lengths_are_those_of_real_tokens():
    model = tiny_model("t5")
    batch = tiny_batch(model)
    lengths = measure_lengths(model, [batch])
    assert {stack: counts.tolist() for stack, counts in lengths.items()} == {"encoder": [8, 6], "decoder": [5, 5]}
    assert all(counts.tolist() == [128] for counts in measure_lengths(model, []).values())


def test_choices_are_texts_of_their_own():
    model = tiny_model("bert", "BertForMultipleChoice")
    batch = tiny_batch(model)
    assert measure_lengths(model, [batch])["encoder"].tolist() == [8, 8, 8, 6, 6, 6]
    assert token_mask(batch, "encoder").shape == (6, 8)
    pruned = hc.prune(model, blind(repair="least_squares"), [batch])
    assert total_macs(pruned, [batch]) <= 0.5 * total_macs(model, [batch])


def test_labels_tell_where_the_decoder_reads_padding():
    model = tiny_model("t5")
    batch = {name: value for name, value in tiny_batch(model).items() if name != "decoder_input_ids"}
    labels = torch.tensor([[5, 6, 7, 2], [5, 2, -100, -100]])
    # As the collator of sequence-to-sequence models gives them.
    made = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
    for more in ({}, made):
        (read,) = read_batches(model, [batch | {"labels": labels} | more])
        assert token_mask(read, "decoder").tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("model_type", ["t5", "mpnet"])
@pytest.mark.parametrize("score", ["l2", "obs"])
def test_stacks_of_which_an_attention_was_removed(model_type, score):
    model = tiny_model(model_type)
    remove_attention_(find_blocks(model)[-1].attentions[-1])
    repair = "none" if score == "l2" else "least_squares"
    pruned = hc.prune(model, blind(score=score, repair=repair), [tiny_batch(model)])
    assert total_macs(pruned, [tiny_batch(model)]) <= 0.5 * total_macs(model, [tiny_batch(model)])


@pytest.fixture
def _no_scores(monkeypatch):
    """Fails where units are scored."""

    def fail(*_):
        raise AssertionError("units were scored before the budget was checked")

    monkeypatch.setattr(structured, "score_units", fail)


@pytest.mark.parametrize("changes", [{}, {"uniform": True}, {"steps": 3}, {"cost": "params"}, {"scope": "local"}])
def test_the_smallest_budget_that_is_named_can_be_met(changes):
    model = tiny_model("bert")
    batches = [tiny_batch(model)]
    with pytest.raises(ValueError, match="cannot be met") as refused:
        check_budget(model, blind(budget=0.01, **changes), batches)
    least = float(str(refused.value).split("budget=")[1].split(" ")[0])
    check_budget(model, blind(budget=least, **changes), batches)
    hc.prune(model, blind(budget=least, **changes), batches)
    with pytest.raises(ValueError, match="cannot be met"):
        check_budget(model, blind(budget=least - 0.002, **changes), batches)


@pytest.mark.usefixtures("_no_scores")
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_scored():
    for model_type in ("bert", "vit", "t5"):
        model = tiny_model(model_type)
        with pytest.raises(ValueError, match="cannot be met"):
            hc.prune(model, hc.StructuredPruningConfig(budget=0.01, multiple_of=4), [tiny_batch(model)])


def test_a_share_of_time_counts_what_cannot_be_cut():
    curves = [structured.plan.Curve(np.array([2, 1]), np.zeros(2), np.array([2.0, 1.0]), "heads")]
    # 8 of 10 ms are fixed, and 1 more has to stay.
    with pytest.raises(ValueError, match=r"budget of 0\.500 .* 0\.900 is left\. Give budget=0\.9 or more"):
        structured.plan.check_target(curves, 5.0 - 8.0, fixed=8.0)
