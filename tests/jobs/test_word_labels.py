"""Labels and outputs of words stay together, whatever tokenizers make of the words."""

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from hf_compress.jobs.task_data import read_task
from hf_compress.jobs.word_labels import words_with_tokens
from hf_compress.recipe.steps import DataConfig
from tests.tiny_job import save_tiny_bert, tiny_tokenizer
from tests.tiny_recipe import BertForTokenClassification

WORDS = {"words": [["the", "\u200b", "good", "film"]], "tags": [["O", "O", "B-GOOD", "O"]]}


def test_words_that_have_no_token():
    rows = Dataset.from_dict(WORDS)
    assert words_with_tokens(rows, tiny_tokenizer(), "words", 12) == [[0, 2, 3]]
    # Of 4 tokens, the first and the last are special.
    assert words_with_tokens(rows, tiny_tokenizer(), "words", 4) == [[0, 2]]


def test_outputs_of_words_without_tokens(tmp_path):
    config = DataConfig("mine", text_columns=["words"], label_column="tags", max_length=12)
    data = read_task(config, 0, DatasetDict(train=Dataset.from_dict(WORDS), test=Dataset.from_dict(WORDS)))
    names = dict(enumerate(data.labels))
    save_tiny_bert(tmp_path, BertForTokenClassification, id2label=names, label2id={n: i for i, n in names.items()})
    model, tokenizer = BertForTokenClassification.from_pretrained(tmp_path), tiny_tokenizer()
    with torch.no_grad():
        model.classifier.weight.zero_()
    found = data.outputs(model, tokenizer)
    assert found.labels.tolist() == [[0, 0, 1, 0]]
    logits = model.classifier.bias.tolist()
    np.testing.assert_allclose(found.logits[0], [logits, [1.0, 0.0], logits, logits], rtol=1e-6)
