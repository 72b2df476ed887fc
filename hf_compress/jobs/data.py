"""A labelled text data set for a model: loaded, checked before anything trains, and tokenized."""

import copy
import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress.modeling.tasks import names_of_labels, problem_type

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# "train-0.csv", "train-00000-of-00002.parquet": parts of a split.
_SHARD = re.compile(r"-\d+(-of-\d+)?$")
# Suffix -> the loader of `datasets` and its options.
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


def load_splits(dataset: str, name: str | None = None) -> "DatasetDict":
    """Loads a data set from the Hub, a folder or a file.

    Args:
        dataset (`str`): A name on the Hub, or the path of a folder with one file per split (`train.parquet`,
            `test.csv` ...) or several (`train-0.csv`, `train-1.csv`), of a folder by `DatasetDict.save_to_disk`, or
            of one file, which becomes the split `train`. Parquet, csv, tsv, json and jsonl.
        name (`str`, *optional*): The configuration of a Hub data set, `"sst2"` of `"glue"`.

    Returns:
        `DatasetDict`: One `Dataset` per split.

    Raises:
        ValueError: if a path holds no such file or one that cannot be read, or nothing is known by that name.
    """
    import datasets

    path = Path(dataset).expanduser()
    if path.is_file():
        return _load_files({"train": [path]})
    if (path / "dataset_dict.json").is_file():
        # What is made of the rows is stored beside them, where that may be.
        return datasets.DatasetDict.load_from_disk(path, keep_in_memory=not os.access(path, os.W_OK))
    if path.is_dir():
        files: dict[str, list[Path]] = {}
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            raise ValueError(
                f"The folder {path} is one saved Dataset, without splits: save a DatasetDict there that has train and "
                "test, or one file for each of them."
            )
        for file in sorted(path.iterdir()):
            # A Mac writes `._train.csv` beside `train.csv`.
            if file.suffix.lower() in _FORMATS and not file.name.startswith("."):
                # `datasets` takes no dashes in the names of splits.
                split = _SHARD.sub("", file.name.split(".")[0]).replace("-", "_")
                files.setdefault(split, []).append(file)
        if not files:
            raise ValueError(
                f"The folder {path} holds no file of {', '.join(_FORMATS)}: save the splits as such files, "
                "for instance train.csv and test.csv."
            )
        return _load_files(files)
    if path.suffix.lower() in _FORMATS or dataset.startswith((".", "/", "~")):
        raise ValueError(f"There is no file or folder {dataset}: check the path (the working folder is {Path.cwd()}).")
    try:
        return datasets.load_dataset(dataset, name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{dataset!r} is no file or folder here, and could not be loaded from the Hub: {error}. "
            "Give a path of parquet, csv or json files, or the full name of a data set on the Hub."
        ) from error


def _load_files(files: dict[str, list[Path]]) -> "DatasetDict":
    import datasets

    suffixes = {file.suffix.lower() for group in files.values() for file in group}
    formats = [_FORMATS.get(suffix) for suffix in suffixes]
    if None in formats or any(other != formats[0] for other in formats):
        names = ", ".join(sorted(file.name for group in files.values() for file in group))
        raise ValueError(
            f"The files {names} cannot be read as one data set: "
            f"all splits must be of one format out of {', '.join(_FORMATS)}. Give the path of a file or folder of one."
        )
    loader, options = formats[0]
    splits = datasets.DatasetDict()
    for split, group in files.items():
        paths = [str(file) for file in group]
        # One by one, because a test file without labels would not fit the columns of the others.
        try:
            # A path may hold what would be a pattern.
            sources = {split: [glob.escape(path) for path in paths]}
            splits[split] = datasets.load_dataset(loader, data_files=sources, split=split, **options)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(
                f"{', '.join(paths)} cannot be read as {loader}, or has no rows: "
                f"{str(error.__cause__ or error).strip()}. Correct the file, or take it out of the folder."
            ) from error
        if options.get("sep") == "\t":
            _check_no_tabs(splits[split], paths)
    return splits


def _check_no_tabs(rows: "Dataset", paths: list[str]) -> None:
    """Raises where a quotation mark that is never closed has made one text of several rows."""
    for name, feature in rows.features.items():
        if getattr(feature, "dtype", None) in ("string", "large_string") and any(
            "\t" in (text or "") for text in rows[name]
        ):
            raise ValueError(
                f"{', '.join(paths)}: a quotation mark at the beginning of a text in column {name!r} joins rows. Put "
                "texts with quotation marks into quotation marks, those inside doubled, or save the file as parquet."
            )


def evaluation_split(splits: "DatasetDict", name: str | None = None) -> str:
    """The split to measure on.

    Args:
        splits (`DatasetDict`): The data set.
        name (`str`, *optional*): The split's name; by default `validation`, `dev` or `test`, the first there is.

    Returns:
        `str`: A name in `splits`.

    Raises:
        ValueError: if there is no such split, or it is `train`.
    """
    candidates = [name] if name is not None else ["validation", "dev", "test"]
    for candidate in candidates:
        if candidate in splits and candidate != "train":
            return candidate
    raise ValueError(
        f"The data set has the splits {', '.join(splits)}, and {' or '.join(candidates)} cannot be measured on: "
        "name another split with --eval-split, or add a file such as test.csv. What a model was trained on, `train`, "
        "cannot test it."
    )


def check_splits(
    splits: "DatasetDict", eval_split: str | None, text_columns: Sequence[str], label_column: str, trains: bool = True
) -> str:
    """Raises if a data set has no split to learn from or none to measure on, or these do not have what they need.

    Args:
        splits (`DatasetDict`): The data set.
        eval_split (`str`, *optional*): As for `evaluation_split`.
        text_columns (sequence of `str`): One column of texts, or two for pairs.
        label_column (`str`): The column of labels.
        trains (`bool`, *optional*, defaults to `True`): Whether the split `train` needs labels too.

    Returns:
        `str`: The split to measure on.

    Raises:
        ValueError: with what is wrong and what there is.
    """
    test_split = evaluation_split(splits, eval_split)
    if "train" not in splits:
        raise ValueError(f"The data set has no split 'train' to learn from, only {', '.join(splits)}.")
    check_columns(splits["train"], "train", text_columns, label_column if trains else None)
    check_columns(splits[test_split], test_split, text_columns, label_column)
    return test_split


def check_columns(dataset: "Dataset", split: str, text_columns: Sequence[str], label_column: str | None) -> None:
    """Raises if a split cannot be learned from: it is empty, a column is missing, or texts or labels are none.

    Args:
        dataset (`Dataset`): The split.
        split (`str`): Its name, for the message.
        text_columns (sequence of `str`): One column of texts, or two for pairs.
        label_column (`str` or `None`): The column of labels; `None` where none are needed.

    Raises:
        ValueError: with what is wrong and what there is.
    """
    if len(dataset) == 0:
        raise ValueError(f"The split {split!r} has 0 rows, from which nothing can be learned: give data with rows.")
    if not 1 <= len(text_columns) <= 2 or len(set(text_columns)) != len(text_columns):
        raise ValueError(
            f"text_columns={list(text_columns)}: name one column of texts, or two different ones for pairs."
        )
    columns = [*text_columns] if label_column is None else [*text_columns, label_column]
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(
                f"The split {split!r} has no column {column!r}; its columns are {', '.join(dataset.column_names)}. "
                "Name the right ones with --text-columns and --label-column."
            )
    for column in columns:
        what = "name and no number" if column == label_column else "text"
        types = str | int | float if column == label_column else str
        values = list(dataset[column])
        # NaN is the one value that differs from itself.
        wrong = [i for i, value in enumerate(values) if not isinstance(value, types) or value != value]
        if wrong:
            raise ValueError(
                f"Column {column!r} of the split {split!r} holds no {what} in {len(wrong)} of {len(values)} rows, the "
                f"first at row {wrong[0]}: {values[wrong[0]]!r}. Remove these rows, or pick another column or another "
                "--eval-split. In csv, empty cells and the words NA, NULL and None count as missing."
            )


def label_names(dataset: "Dataset", label_column: str) -> list[str] | None:
    """The classes that a model without a trained head is to learn, in the order of their ids.

    Args:
        dataset (`Dataset`): A checked split.
        label_column (`str`): The column of labels.

    Returns:
        `list[str]` or `None`: `None` for float labels, that is, regression. Integers without names are named by
        their number.

    Raises:
        ValueError: if there are fewer than two classes, negative ids, or names among numbers.
    """
    from datasets import ClassLabel

    feature = dataset.features[label_column]
    values = set(dataset[label_column])
    n_names = sum(isinstance(value, str) for value in values)
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif n_names == len(values):
        names = sorted(values)
    elif n_names:
        raise ValueError(f"Column {label_column!r} mixes names and numbers: write all labels in one of these ways.")
    elif any(isinstance(value, float) for value in values):
        logger.info("The labels are floats: the model learns them as a regression.")
        return None
    elif min(values) < 0:
        raise ValueError(
            f"Column {label_column!r} has the label {min(values)}, but ids of classes count from 0. Remove rows "
            "without a label, if it means that; else write names for classes, or floats for a regression."
        )
    else:
        names = [str(i) for i in range(max(values) + 1)]
    if len(names) < 2:
        raise ValueError(
            f"Column {label_column!r} has the classes {names}, which leaves nothing to tell apart: "
            "pick another column, or give data with two classes or more."
        )
    return names


def label_ids(
    dataset: "Dataset", split: str, label_column: str, config: "PreTrainedConfig"
) -> list[int] | list[float]:
    """The labels of a split as the model numbers them, matched by name where both sides have names.

    Args:
        dataset (`Dataset`): A checked split.
        split (`str`): Its name, for the message.
        label_column (`str`): The column of labels: names, ids, or numbers for a model with one output.
        config (`PreTrainedConfig`): The model's config, with `num_labels` and `id2label`.

    Returns:
        `list[int]` or `list[float]`: One label per row.

    Raises:
        ValueError: if a label is none of the model's, or the model gives several answers to a text.
    """
    values = list(dataset[label_column])
    kind = problem_type(config)
    is_regression = kind == "regression"
    if kind == "multi_label_classification" or (is_regression and config.num_labels > 1):
        raise ValueError(
            f"The model gives {config.num_labels} answers to a text ({kind}), but column {label_column!r} holds one "
            "label per text. Use hf_compress.DistillationTrainer on tokenized rows with lists of labels."
        )
    if is_regression:
        ids = [None if isinstance(value, str) else float(value) for value in values]
        known = "the model has one output and learns numbers"
    else:
        values = _matched_names(values, dataset.features[label_column], config)
        by_name = {str(name): index for index, name in config.id2label.items()}
        # Numbers of a csv file with a gap arrive as floats: 1.0 is the id 1.
        numbers = ids_of_numbers(config)
        ids = [by_name.get(value) if isinstance(value, str) else numbers.get(float(value)) for value in values]
        known = f"the model's labels are {', '.join(f'{i}={config.id2label[i]}' for i in range(config.num_labels))}"
    if None in ids:
        row = ids.index(None)
        hint = "Rename the labels of the data, or give a model that was trained on them."
        if values[row] == -1:
            hint = "An unlabelled split has -1 everywhere: measure on another one with --eval-split."
        raise ValueError(f"Label {values[row]!r} of row {row} of the split {split!r} is unknown: {known}. {hint}")
    return ids


def ids_of_numbers(config: "PreTrainedConfig") -> dict[float, int]:
    """What a label means that is a number: the class of that name where all names are numbers, else the id.

    Stars from 1 to 5 are names, which a csv file gives back as numbers.

    Args:
        config (`PreTrainedConfig`): The model's config.

    Returns:
        `dict[float, int]`: Ids of classes.
    """
    try:
        return {float(name): i for i, name in enumerate(names_of_labels(config))}
    except ValueError:
        return {float(i): i for i in range(config.num_labels)}


def class_names(labels: Sequence[str], config: "PreTrainedConfig") -> list[str]:
    """The classes of a model that is fine-tuned, in the order of their ids.

    Args:
        labels (sequence of `str`): Those of the data, as `label_names` gives them.
        config (`PreTrainedConfig`): The model's config.

    Returns:
        `list[str]`: As the model has them, if it was trained for the same ones, or if the data have their numbers
            alone: its head then starts from what it knows. Otherwise those of the data.
    """
    own = [str(name) for name in names_of_labels(config)]
    is_named = own != [f"LABEL_{i}" for i in range(len(own))]
    are_numbers = list(labels) == [str(i) for i in range(len(own))]
    return own if set(own) == set(labels) or (is_named and are_numbers) else list(labels)


def _matched_names(values: list, feature: Any, config: "PreTrainedConfig") -> list:
    """The values of a `ClassLabel` by name, unless model and data share no name: then numbers have to do."""
    from datasets import ClassLabel

    if not isinstance(feature, ClassLabel):
        return values
    if set(feature.names) & set(config.id2label.values()):
        return [feature.names[value] if value >= 0 else value for value in values]
    names = names_of_labels(config)
    if names != [f"LABEL_{i}" for i in range(len(names))]:
        message = "The classes of the data, %s, and of the model, %s, share no name and are matched by number: "
        logger.warning(message + "check the order, or set id2label in the model's config.json.", feature.names, names)
    return [names[value] if 0 <= value < len(names) else value for value in values]


def tokenize(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    text_columns: Sequence[str],
    labels: Sequence[Any] | None,
    max_length: int,
) -> "Dataset":
    """Turns texts into model inputs; texts longer than `max_length` are cut.

    Args:
        dataset (`Dataset`): A checked split.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text_columns (sequence of `str`): One column of texts, or two for pairs.
        labels (sequence or `None`): One label per row; `None` for texts without labels.
        max_length (`int`): Tokens per row at most, special tokens included.

    Returns:
        `Dataset`: The tokenizer's columns, `labels` where given, and `length` in tokens, for batches of similar
            lengths.

    Raises:
        ValueError: if `max_length` leaves no room for a token of each text, or a text has no token.
    """
    n_special = tokenizer.num_special_tokens_to_add(pair=len(text_columns) == 2)
    if max_length < n_special + len(text_columns):
        raise ValueError(
            f"max_length={max_length} leaves no room for the text beside {n_special} special tokens: "
            f"give --max-length {n_special + len(text_columns)} or more."
        )
    # Other columns are dropped first: the user's own `length` or `input_ids` would lend its type to the new one.
    texts = dataset.select_columns(list(text_columns))
    # A tokenizer remembers the last truncation, and would be saved with it.
    tokenizer = copy.deepcopy(tokenizer)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(*(rows[column] for column in text_columns), truncation=True, max_length=max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    encoded = texts.map(encode, batched=True, remove_columns=texts.column_names, desc="Tokenizing")
    lengths = encoded["length"][:]
    if 0 in lengths:
        row = lengths.index(0)
        raise ValueError(
            f"Row {row} has no tokens: {', '.join(repr(texts[row][column]) for column in text_columns)}. Remove empty "
            "texts; this tokenizer puts no token of its own around them."
        )
    return encoded if labels is None else encoded.add_column("labels", list(labels))
