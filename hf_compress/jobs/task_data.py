"""The labelled rows of a recipe, checked: texts, pairs of texts, or sentences whose words are labelled."""

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from hf_compress.distillation.augmentation import AugmentationConfig, augment
from hf_compress.evaluation.inference import predict
from hf_compress.jobs.classifiers import head_options, known_metrics
from hf_compress.jobs.data import (
    check_columns,
    check_splits,
    evaluation_split,
    label_ids,
    label_names,
    load_splits,
    tokenize,
)
from hf_compress.jobs.inputs import rows_digest
from hf_compress.jobs.word_labels import (
    OUTSIDE,
    check_labelled_words,
    check_words,
    noisy_sentences,
    tokenize_words,
    word_label_ids,
    word_label_names,
    words_with_tokens,
)
from hf_compress.modeling.tasks import IGNORED, problem_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_compress.recipe.steps import DataConfig

TEXTS, WORDS = "sequence-classification", "token-classification"
# Begins, inside, ends, last, single, unit: the schemes that seqeval reads.
_TAG = re.compile("[BIELSU]-")


class TaskData(NamedTuple):
    """The rows of a recipe as they are in the data set, checked, and what they ask of a model.

    Attributes:
        config (`DataConfig`): Names their columns.
        task (`str`): `TEXTS` or `WORDS`.
        train (`Dataset`): Rows to learn from.
        test (`Dataset`): Rows to measure on.
        test_split (`str`): The split that the latter are of.
        labels (`list[str]` or `None`): Names of the classes, for a model that is fine-tuned on them; `None`: numbers.
        held_out (`Dataset`, *optional*): Rows to choose something on: of validation or dev, where not measured on.
        held_out_split (`str`, *optional*): The split that these are of.
        digest (`str`, *optional*): Of all rows, where they were given and not read from the place that `config` names.
    """

    config: "DataConfig"
    task: str
    train: Dataset
    test: Dataset
    test_split: str
    labels: list[str] | None
    held_out: Dataset | None = None
    held_out_split: str | None = None
    digest: str | None = None

    @property
    def model_class(self) -> type:
        """The class that loads a model for these rows."""
        return AutoModelForTokenClassification if self.task == WORDS else AutoModelForSequenceClassification

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The texts of the rows to learn from, for a vocabulary."""
        columns = [self.train[column] for column in self.config.text_columns]
        return [tuple(words) for words in columns[0]] if self.task == WORDS else list(zip(*columns, strict=True))

    def head_options(self, model: str) -> dict[str, Any]:
        """Arguments of `from_pretrained` for a head that fits the labels.

        Args:
            model (`str`): A folder, or a name on the Hub. If it has a head for these classes, that stays.
        """
        return head_options(model, self.labels, is_per_text=self.task == TEXTS)

    def encode(self, rows: Dataset, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> Dataset:
        """Rows as model inputs, with `labels` as the model numbers them, and `length` in tokens.

        Args:
            rows (`Dataset`): `train`, `test`, or some of them.
            tokenizer (`PreTrainedTokenizerBase`): The model's.
            model (`PreTrainedModel`): Numbers the labels.

        Raises:
            ValueError: if the model has no such label.
        """
        ids = self.label_ids(rows, model)
        if self.task == WORDS:
            return tokenize_words(rows, tokenizer, self.config.text_columns[0], ids, self.config.max_length)
        return tokenize(rows, tokenizer, self.config.text_columns, ids, self.config.max_length)

    def label_ids(self, rows: Dataset, model: "PreTrainedModel") -> list:
        """The labels of rows as a model numbers them: a number, or a list of them for labelled words.

        Raises:
            ValueError: if the model has no such label.
        """
        names = {id(self.test): self.test_split, id(self.held_out): self.held_out_split}
        split = names.get(id(rows)) or "train"
        if self.task == WORDS:
            return word_label_ids(rows, split, self.config.label_column, model.config)
        return label_ids(rows, split, self.config.label_column, model.config)

    def check_held_out(self, model: "PreTrainedModel") -> None:
        """Raises if there are held-out rows and something cannot be chosen on them.

        Args:
            model (`PreTrainedModel`): Numbers the labels.

        Raises:
            ValueError: if a column or a label is missing, or the model has no such label.
        """
        if self.held_out is None:
            return
        columns = [*self.config.text_columns, self.config.label_column]
        missing = [column for column in columns if column not in self.held_out.column_names]
        if missing:
            raise ValueError(
                f"The split {self.held_out_split!r}, on which is chosen what to keep in floating point (max_drop) or "
                f"which steps to propose, has no column {missing[0]!r}; its columns are "
                f"{', '.join(self.held_out.column_names)}. Add the column, leave the split out, or leave max_drop out."
            )
        if self.task == WORDS and len(self.held_out):
            check_labelled_words(self.held_out, self.held_out_split, self.config)
        elif len(self.held_out):
            check_columns(self.held_out, self.held_out_split, self.config.text_columns, self.config.label_column)
        self.label_ids(self.held_out, model)

    def with_noise(self, copies: int, n_rows: int, seed: int, tokenizer: Any, model: "PreTrainedModel") -> Dataset:
        """The encoded rows to learn from, and noisy copies of them, for a teacher to label.

        Args:
            copies (`int`): Copies of each row; 0 for the rows alone.
            n_rows (`int`): Rows in all, in the place of `copies`: all there are, and some of their copies. 0 for none.
            seed (`int`): Of the noise.
            tokenizer (`PreTrainedTokenizerBase`): The model's.
            model (`PreTrainedModel`): Numbers the labels.
        """
        n_missing = n_rows - len(self.train)
        if n_rows and n_missing > 0:
            # So many that there are enough to draw from.
            copies = -(-n_missing // len(self.train))
            rows = self.with_noise(copies, 0, seed, tokenizer, model)
            chosen = random.Random(seed).sample(range(len(self.train), len(rows)), n_missing)
            return rows.select([*range(len(self.train)), *sorted(chosen)])
        if not copies:
            return self.encode(self.train, tokenizer, model)
        columns, config = self.config.text_columns, AugmentationConfig(copies=copies, seed=seed)
        ids = self.label_ids(self.train, model)
        if self.task == WORDS:
            rows, ids = noisy_sentences(self.train, columns[0], ids, config)
            return tokenize_words(rows, tokenizer, columns[0], ids, self.config.max_length)
        labelled = self.train.select_columns(columns).add_column("label", ids)
        noisy = augment(labelled, config, columns, "label")
        return tokenize(noisy, tokenizer, columns, noisy["label"], self.config.max_length)

    def collator(self, tokenizer: "PreTrainedTokenizerBase") -> Callable:
        """What makes a batch of encoded rows, padded to the longest of them."""
        return (DataCollatorForTokenClassification if self.task == WORDS else DataCollatorWithPadding)(tokenizer)

    def outputs(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int = 64,
        rows: Dataset | None = None,
    ) -> "Outputs":
        """What a model says of rows, in a form that does not depend on its tokenizer.

        Args:
            model (`PreTrainedModel`): The model.
            tokenizer (`PreTrainedTokenizerBase`): Its own.
            batch_size (`int`, *optional*, defaults to `64`): Rows per forward.
            rows (`Dataset`, *optional*): By default those to measure on.

        Returns:
            `Outputs`: By row, or by row and word. A word without tokens, as where `max_length` cuts it off, counts
            as "O", or as the first label where there is none of that name.
        """
        given = self.test if rows is None else rows
        ids = self.label_ids(given, model)
        rows = self.encode(given, tokenizer, model)
        # From the shortest to the longest, and back in their order.
        order = np.argsort(rows["length"][:], kind="stable")
        found = predict(model, rows.select(order), data_collator=self.collator(tokenizer), batch_size=batch_size)
        back = np.argsort(order)
        logits = found.logits[back]
        if self.task == TEXTS:
            return Outputs(logits, np.asarray(ids, dtype=np.float32 if self.labels_are_numbers(model) else np.int64))
        words = words_with_tokens(given, tokenizer, self.config.text_columns[0], self.config.max_length)
        outside = next((index for index, name in model.config.id2label.items() if name == OUTSIDE), 0)
        return by_word(logits, found.labels[back], ids, words, outside)

    def labels_are_numbers(self, model: "PreTrainedModel") -> bool:
        """Whether a model gives numbers instead of classes."""
        return self.task == TEXTS and problem_type(model.config) == "regression"

    def kind(self, model: "PreTrainedModel") -> str:
        """What a model's outputs are, as `METRICS` knows them."""
        return WORDS if self.task == WORDS else problem_type(model.config)

    def metric(self, model: "PreTrainedModel") -> str:
        """What quality is measured by.

        Raises:
            ValueError: if the metric that the recipe names does not fit.
        """
        kind = self.kind(model)
        # Of names that do not begin like tags, seqeval would make what it likes.
        has_tags = all(name == OUTSIDE or _TAG.match(str(name)) for name in model.config.id2label.values())
        usual = {"regression": "pearsonr", WORDS: "seqeval" if has_tags else "token_accuracy"}.get(kind, "accuracy")
        metric = self.config.metric or usual
        if metric == "seqeval" and not has_tags:
            raise ValueError(
                f"metric='seqeval' counts entities by tags such as O, B-PER and I-PER, and the model's labels are "
                f"{', '.join(map(str, model.config.id2label.values()))}: set its config.id2label to the tags, or take "
                "metric='token_accuracy'."
            )
        known = known_metrics(kind, model.config.num_labels)
        if metric not in known:
            raise ValueError(f"metric={metric!r} does not fit {kind}: choose one of {', '.join(known)}.")
        return metric


class Outputs(NamedTuple):
    """Outputs and labels.

    Attributes:
        logits (`np.ndarray`): `(rows, classes)` or `(rows, words, classes)`.
        labels (`np.ndarray`): `(rows,)` or `(rows, words)`, -100 where there is no word.
    """

    logits: np.ndarray
    labels: np.ndarray


def read_task(config: "DataConfig", seed: int, splits: DatasetDict | None = None) -> TaskData:
    """Reads and checks the data of a recipe.

    Args:
        config (`DataConfig`): Which.
        seed (`int`): Of the choice of rows, where not all are learned from.
        splits (`DatasetDict`, *optional*): The data, where they are no file and have no name on the Hub.

    Returns:
        `TaskData`: Checked.

    Raises:
        ValueError: if a split, a column or a value does not fit.
    """
    digest = None if splits is None else rows_digest(splits, [*config.text_columns, config.label_column])
    splits = load_splits(config.dataset, config.dataset_name) if splits is None else splits
    test_split = evaluation_split(splits, config.eval_split)
    if _is_labelled_by_word(splits[test_split], config.label_column):
        check_words(splits, test_split, config)
        task, name = WORDS, word_label_names
    else:
        check_splits(splits, config.eval_split, config.text_columns, config.label_column)
        task, name = TEXTS, label_names
    train = splits["train"]
    if config.train_rows is not None and config.train_rows < len(train):
        train = train.select(sorted(random.Random(seed).sample(range(len(train)), config.train_rows)))
    labels = name(splits["train"], config.label_column)
    other = next((name for name in ("validation", "dev") if name in splits and name != test_split), None)
    held_out = None if other is None else splits[other]
    return TaskData(config, task, train, splits[test_split], test_split, labels, held_out, other, digest)


def _is_labelled_by_word(rows: Dataset, column: str) -> bool:
    return column in rows.column_names and len(rows) > 0 and isinstance(rows[0][column], list)


def by_word(
    logits: np.ndarray,
    positions: np.ndarray,
    labels: Sequence[Sequence[int]],
    words: Sequence[Sequence[int]],
    outside: int = 0,
) -> Outputs:
    """Outputs of tokens as outputs of words.

    Args:
        logits (`np.ndarray`): `(rows, tokens, classes)`.
        positions (`np.ndarray`): `(rows, tokens)`, other than -100 at the first token of each word that has one.
        labels (sequence of lists): The labels of each row's words.
        words (sequence of lists): The words of each row that have a token, in order.
        outside (`int`, *optional*, defaults to `0`): The class of a word without tokens: that of "O".

    Returns:
        `Outputs`: `(rows, words, classes)`.
    """
    n_words = max(map(len, labels))
    of_words = np.zeros((len(labels), n_words, logits.shape[-1]), dtype=np.float32)
    of_words[:, :, outside] = 1.0
    all_labels = np.full((len(labels), n_words), IGNORED)
    for row, ids in enumerate(labels):
        of_words[row, words[row]] = logits[row][positions[row] != IGNORED]
        all_labels[row, : len(ids)] = ids
    return Outputs(of_words, all_labels)
