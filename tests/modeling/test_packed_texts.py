"""Texts that are packed into one row, and padding of decoders: what is measured of a text depends on no other."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

import hf_compress as hc
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.tasks import IGNORED
from hf_compress.pruning.calibration import activation_scores
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import tiny_batch, tiny_model


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 40, (1, length), generator=generator) for length in (7, 9)]


def test_packed_texts_do_not_read_each_other():
    model = tiny_model("llama", attention="sdpa")
    rows = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids in texts()]
    alone = hc.score_retention(model, model, rows, "perplexity", batch_size=1, n_bootstrap=2)
    packing = DataCollatorWithFlattening(return_position_ids=True)
    packed = hc.score_retention(model, model, rows, "perplexity", batch_size=2, n_bootstrap=2, data_collator=packing)
    assert packed.compressed == pytest.approx(alone.compressed, rel=1e-5)


def test_scores_of_units_keep_packed_texts_apart():
    model = tiny_model("llama", attention="sdpa")
    first, second = texts()
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    packed = [{"input_ids": torch.cat([first, second], 1), "position_ids": positions}]
    apart = [{"input_ids": first}, {"input_ids": second}]
    blocks = find_blocks(model)
    sites = find_sites(blocks)
    found = [activation_scores(model, blocks, sites, some) for some in (packed, apart)]
    for name, scores in found[0].items():
        assert torch.allclose(scores, found[1][name], rtol=1e-4)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_padding_of_labels_is_no_text(model_type, with_inputs):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    labels = torch.randint(3, 40, (len(batch["input_ids"]), 5), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([labels, torch.full((len(labels), 20), IGNORED)], 1)
    scales = []
    for some in (labels, padded):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": some}
        if with_inputs:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=some)
        quantized = hc.quantize(model, hc.FixedPointConfig(bits=8, activations=8), [inputs])
        scales.append({name: value for name, value in quantized.named_buffers() if name.endswith("input_scale")})
    for name, value in scales[0].items():
        assert torch.allclose(value, scales[1][name], rtol=1e-4), name
