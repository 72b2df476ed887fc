import pytest
import torch

from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.capture import gate_outputs
from hf_compress.pruning.batches import read_batches
from hf_compress.pruning.sensitivity import measure_sensitivity, output_factors
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import tiny_batch, tiny_model


def classifier():
    # Scaled down, so that the classes are not certain.
    model = tiny_model("bert", "BertForSequenceClassification", num_labels=3)
    with torch.no_grad():
        model.classifier.weight.mul_(0.2)
    return model


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_the_factors_multiply_to_the_fisher_information(kind):
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    factors = torch.stack(output_factors(z, kind, 1, torch.Generator()))
    p, q = z.softmax(-1), z.sigmoid()
    expected = {
        "categorical": torch.diag_embed(p) - p[:, :, None] * p[:, None, :],
        "bernoulli": torch.diag_embed(q * (1 - q)),
        "gaussian": torch.eye(4).expand(5, 4, 4),
    }[kind]
    assert torch.allclose(torch.einsum("kni,knj->nij", factors, factors), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_draws_agree_with_it_in_expectation(kind):
    z = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack(output_factors(z, kind, 4000, generator))[:, 0, 0]
    exact = torch.stack(output_factors(z[0], kind, 1, generator))[:, 0]
    assert torch.allclose(drawn.T @ drawn, exact.T @ exact, atol=0.05)


def test_the_fisher_of_a_gate_is_the_expectation_over_all_labels():
    model = classifier()
    batch = tiny_batch(model)
    site = find_sites(find_blocks(model))[2]
    expected = torch.zeros(site.n_units)
    for row in range(2):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for label in range(3):
            gate = torch.ones(site.n_units, requires_grad=True)
            with gate_outputs({site.parts[0]: gate}):
                log_p = model(**one).logits.log_softmax(-1)[0]
            (gradient,) = torch.autograd.grad(log_p[label], gate)
            expected += log_p[label].exp().detach() * gradient.square() / 2
    found = measure_sensitivity(model, [site], [batch])
    assert torch.allclose(found.fisher[site.name].float(), expected, rtol=1e-4, atol=1e-7)


def test_batches_and_padding_do_not_matter():
    model = classifier()
    batch = tiny_batch(model)
    sites = find_sites(find_blocks(model))
    alone = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
    unpadded = [{name: tensor[:, : int(one["attention_mask"].sum())] for name, tensor in one.items()} for one in alone]
    whole, single = (measure_sensitivity(model, sites, batches) for batches in ([batch], unpadded))
    for site in sites:
        assert torch.allclose(whole.fisher[site.name], single.fisher[site.name], rtol=1e-4, atol=1e-9)
        assert torch.allclose(
            whole.metric[site.parts[0].name], single.metric[site.parts[0].name], rtol=1e-3, atol=1e-8
        )
    assert all(not norms[batch["attention_mask"] == 0].any() for (norms,) in whole.tokens.values())


def test_the_last_network_matters_through_the_first_token_alone():
    model = classifier()
    batch = tiny_batch(model)
    blocks = find_blocks(model)
    found = measure_sensitivity(model, find_sites(blocks), [batch])
    norms = found.tokens[blocks[-1].ffn.name][0]
    assert (norms[:, 0] > 0).all()
    assert not norms[:, 1:].any()


def test_labels_give_the_gradient_of_each_samples_own_loss():
    model = classifier()
    batch = {**tiny_batch(model), "labels": torch.tensor([2, 0])}
    site = find_sites(find_blocks(model))[0]
    expected = torch.zeros(site.n_units)
    for row in range(2):
        gate = torch.ones(site.n_units, requires_grad=True)
        with gate_outputs({site.parts[0]: gate}):
            loss = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss
        expected += torch.autograd.grad(loss, gate)[0].square() / 2
    found = measure_sensitivity(model, [site], read_batches(model, [batch], True), use_labels=True)
    assert torch.allclose(found.fisher[site.name].float(), expected, rtol=1e-4, atol=1e-7)


def test_flags_come_back():
    model = classifier().train()
    model.classifier.bias.requires_grad_(False)
    measure_sensitivity(model, find_sites(find_blocks(model)), [tiny_batch(model)])
    assert model.training
    assert model.bert.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["classifier.bias"]
