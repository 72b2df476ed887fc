"""A labelled text data set for a model: loaded, checked before anything trains, and tokenized."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def load_splits(dataset: str, name: str | None = None) -> "DatasetDict":
    """Loads a data set from the Hub, a folder or a file.

    Args:
        dataset (`str`): A name on the Hub, or the path of a folder with one file per split (`train.parquet`,
            `test.csv` ...), or of one file, which becomes the split `train`. Parquet, csv, tsv, json and jsonl.
        name (`str`, *optional*): The configuration of a Hub data set, `"sst2"` of `"glue"`.

    Returns:
        `DatasetDict`: One `Dataset` per split.

    Raises:
        ValueError: if a path holds no such file, or nothing is known by that name.
    """
    import datasets

    path = Path(dataset)
    if path.is_file():
        return _load_files({"train": [path]})
    if path.is_dir():
        files: dict[str, list[Path]] = {}
        for file in sorted(path.iterdir()):
            if file.suffix in _FORMATS:
                files.setdefault(file.name.split(".")[0].split("-")[0], []).append(file)
        if not files:
            raise ValueError(
                f"The folder {path} holds no file of {', '.join(_FORMATS)}: save the splits as such files."
            )
        return _load_files(files)
    if path.suffix in _FORMATS or dataset.startswith((".", "/", "~")):
        raise ValueError(f"There is no file or folder {dataset}: check the path (the working folder is {Path.cwd()}).")
    try:
        return datasets.load_dataset(dataset, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{dataset!r} is no file or folder here, and could not be loaded from the Hub: {error}. "
            "Give a path of parquet, csv or json files, or the full name of a data set on the Hub."
        ) from error


def _load_files(files: dict[str, list[Path]]) -> "DatasetDict":
    import datasets

    suffixes = {file.suffix for group in files.values() for file in group}
    formats = {_FORMATS.get(suffix, suffix) for suffix in suffixes}
    if len(formats) != 1 or not formats <= set(_FORMATS.values()):
        raise ValueError(
            f"Files of {', '.join(sorted(suffixes))} cannot be read as one data set: "
            f"all splits must be of one format out of {', '.join(_FORMATS)}."
        )
    options = {"sep": "\t"} if suffixes == {".tsv"} else {}
    data_files = {split: [str(file) for file in group] for split, group in files.items()}
    return datasets.load_dataset(formats.pop(), data_files=data_files, **options)


def evaluation_split(splits: "DatasetDict", name: str | None = None) -> str:
    """The split to measure on.

    Args:
        splits (`DatasetDict`): The data set.
        name (`str`, *optional*): The split's name; by default `validation`, `dev` or `test`, the first there is.

    Returns:
        `str`: A name in `splits`.

    Raises:
        ValueError: if there is no such split.
    """
    candidates = [name] if name is not None else ["validation", "dev", "test"]
    for candidate in candidates:
        if candidate in splits:
            return candidate
    raise ValueError(
        f"The data set has the splits {', '.join(splits)}, but none named {' or '.join(candidates)} to measure on: "
        "name one with --eval-split, or add a file such as test.parquet. What a model was trained on cannot test it."
    )


def check_columns(dataset: "Dataset", split: str, text_columns: Sequence[str], label_column: str) -> None:
    """Raises if a split cannot be learned from: it is empty, a column is missing, or texts are no texts.

    Args:
        dataset (`Dataset`): The split.
        split (`str`): Its name, for the message.
        text_columns (sequence of `str`): One column of texts, or two for pairs.
        label_column (`str`): The column of labels.

    Raises:
        ValueError: with what is wrong and what there is.
    """
    if len(dataset) == 0:
        raise ValueError(f"The split {split!r} is empty: nothing can be learned or measured on 0 rows.")
    if not 1 <= len(text_columns) <= 2 or len(set(text_columns)) != len(text_columns):
        raise ValueError(
            f"text_columns={list(text_columns)}: name one column of texts, or two different ones for pairs."
        )
    for column in (*text_columns, label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"The split {split!r} has no column {column!r}; its columns are {', '.join(dataset.column_names)}. "
                "Name the right ones with --text-columns and --label-column."
            )
    for column in text_columns:
        wrong = [i for i, text in enumerate(dataset[column]) if not isinstance(text, str)]
        if wrong:
            raise ValueError(
                f"Column {column!r} of the split {split!r} holds no text in {len(wrong)} of {len(dataset)} rows, "
                f"the first at row {wrong[0]}: {dataset[wrong[0]][column]!r}. Remove these rows or pick another column."
            )


def label_names(dataset: "Dataset", label_column: str) -> list[str] | None:
    """The names of a column's classes, in the order of their ids.

    Args:
        dataset (`Dataset`): A checked split.
        label_column (`str`): The column of labels.

    Returns:
        `list[str]` or `None`: `None` for float labels, that is, regression. Integers without names are named by
        their number.
    """
    from datasets import ClassLabel

    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(dataset[label_column])
    if any(isinstance(value, float) for value in values):
        return None
    if all(isinstance(value, int) for value in values):
        return [str(i) for i in range(max(values) + 1)]
    return sorted(str(value) for value in values)


def label_ids(
    dataset: "Dataset", split: str, label_column: str, config: "PreTrainedConfig"
) -> list[int] | list[float]:
    """The labels of a split as the model numbers them, matched by name where both sides have names.

    Args:
        dataset (`Dataset`): A checked split.
        split (`str`): Its name, for the message.
        label_column (`str`): The column of labels: names, ids, or numbers for a model with one output.
        config (`PreTrainedConfig`): The model's config, with `num_labels` and `label2id`.

    Returns:
        `list[int]` or `list[float]`: One label per row.

    Raises:
        ValueError: if a label is none of the model's.
    """
    from datasets import ClassLabel

    values = list(dataset[label_column])
    if config.num_labels == 1:
        return [float(value) for value in values]
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel) and set(feature.names) == set(config.label2id):
        values = [feature.names[value] if value >= 0 else value for value in values]
    by_name = {str(name): index for name, index in config.label2id.items()}
    numbers = range(config.num_labels)
    ids = [by_name.get(v) if isinstance(v, str) else v if type(v) is int and v in numbers else None for v in values]
    if None in ids:
        row = ids.index(None)
        hint = (
            "An unlabelled split has -1 everywhere: measure on another one."
            if values[row] == -1
            else ("Rename the labels of the data, or give a model that was trained on them.")
        )
        raise ValueError(
            f"Label {values[row]!r} of row {row} of the split {split!r} is none of the model's labels "
            f"{', '.join(f'{i}={config.id2label[i]}' for i in numbers)}. {hint}"
        )
    return ids


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Raises if a tokenizer cannot feed a model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        model (`PreTrainedModel`): The model.

    Raises:
        ValueError: if it can produce ids that the model has no embedding for, or cannot pad.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has ids up to {largest}, but the model embeds only {rows} tokens: "
            "they do not belong together. Load both from the same folder, or call model.resize_token_embeddings."
        )
    if tokenizer.pad_token_id is None or model.config.pad_token_id is None:
        raise ValueError(
            f"Padding is undefined (tokenizer {tokenizer.pad_token_id}, model config {model.config.pad_token_id}): set "
            "tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id, and save both."
        )


def tokenize(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    text_columns: Sequence[str],
    labels: Sequence[Any],
    max_length: int,
) -> "Dataset":
    """Turns texts into model inputs; texts longer than `max_length` are cut.

    Args:
        dataset (`Dataset`): A checked split.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text_columns (sequence of `str`): One column of texts, or two for pairs.
        labels (sequence): One label per row.
        max_length (`int`): Tokens per row at most, special tokens included.

    Returns:
        `Dataset`: The tokenizer's columns, `labels`, and `length` in tokens, for batches of similar lengths.
    """

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(*(rows[column] for column in text_columns), truncation=True, max_length=max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    encoded = dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")
    return encoded.add_column("labels", list(labels))
