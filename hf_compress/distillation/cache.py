"""A teacher's answers, computed once: built in blocks, mapped into memory, and found by what an example holds."""

import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_compress.distillation import cache_files as files
from hf_compress.distillation.answers import LABELS, Answers, answer_masks, key_columns
from hf_compress.distillation.cache_keys import KEY_BYTES, example_keys, fingerprint
from hf_compress.modeling.launch import process_state
from hf_compress.modeling.tasks import LANGUAGE_MODELS, forward_columns, task_of, unwrap

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "top-k"]
BLOCK_ROWS, BLOCK_BYTES = 4096, 2**28
# Of one token in a cache of the likeliest classes; with the keys, below 300.
_TOP_K_BYTES = 288
_SAMPLE_ROWS = 256
# Seconds without a new block, besides twice the time of an own one, after which others are taken to be idle.
_PATIENCE = 5.0
# With a tenth of the mass in the tail the gradient still has a cosine of 0.999 to the exact one; with most, 0.85.
LARGEST_TAIL = 0.2


class TeacherCache:
    """The answers of a teacher to the examples of a data set. Build it with `build`, or open a finished one.

    An example is named by a hash of all that the teacher is fed, so shuffling, accumulation, several processes and a
    resumed training cannot give it another one's answers. An example that is not in the cache raises.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = files.read_settings(self.folder)
        meta = files.read_json(self.folder / files.META_FILE)
        paths = [files.block_path(self.folder, number) for number in range(len(meta["block_bytes"]))]
        self.num_bytes = sum(meta["block_bytes"])
        self._blocks = [files.map_block(path, size) for path, size in zip(paths, meta["block_bytes"], strict=True)]
        self._places: dict[bytes, tuple[int, int]] = {}
        for number, block in enumerate(self._blocks):
            raw = block["keys"].tobytes()
            for row in range(len(block["keys"])):
                self._places.setdefault(raw[row * KEY_BYTES : (row + 1) * KEY_BYTES], (number, row))

    def __reduce__(self):
        # Workers map the files anew instead of receiving their content.
        return TeacherCache, (self.folder,)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def precision(self) -> Precision:
        """`"fp32"`, `"fp16"` or `"top-k"`."""
        return self.settings.precision

    @property
    def temperature(self) -> float:
        """At which the likeliest classes' probabilities are stored."""
        return self.settings.temperature

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of what is stored beside the outputs."""
        return self.settings.signals

    @classmethod
    def open(cls, folder: str | Path, teacher: nn.Module) -> "TeacherCache":
        """Opens a finished cache.

        Args:
            folder (`str` or `Path`): Where it is.
            teacher (`nn.Module`): Whose answers it is to hold.

        Returns:
            `TeacherCache`: Nothing of it is read into memory but the names of the examples.

        Raises:
            ValueError: if there is none, it is unfinished, cut off, of another version, or of another teacher.
        """
        cache = cls(folder)
        cache.check_teacher(teacher)
        return cache

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raises if the answers are not this teacher's.

        Args:
            teacher (`nn.Module`): The teacher.

        Raises:
            ValueError: if its class, config or any of its weights differ.
        """
        found = fingerprint(teacher)
        if found != self.settings.fingerprint:
            raise ValueError(
                f"The cache in {self.folder} is of another teacher: its fingerprint is {self.settings.fingerprint}, "
                f"and that of this {type(unwrap(teacher)).__name__} is {found}. Weights, config or dtype differ: load "
                "the teacher that the cache was built with, or build another cache."
            )

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: nn.Module,
        dataset: Iterable[Mapping[str, Any]],
        *,
        processing_class: Any = None,
        data_collator: Callable[[list], dict[str, torch.Tensor]] | None = None,
        batch_size: int = 64,
        precision: Precision = "fp32",
        top_k: int | None = None,
        temperature: float = 1.0,
        signals: Iterable[str] = (),
        autocast_dtype: torch.dtype | None = None,
        pooling: str = "mean",
    ) -> "TeacherCache":
        """Asks a teacher about every row of a data set, and stores what it says.

        A build that was stopped continues; a finished cache with the same settings is opened. Under `accelerate
        launch` the processes share the work; under `main_process_first`, the first one does it all.

        Args:
            folder (`str` or `Path`): Where the cache is to be; made if missing.
            teacher (`nn.Module`): On the device where it is to run.
            dataset (iterable of rows): Tokenized rows, in an order that does not change from call to call.
            processing_class (*optional*): Tokenizer that pads.
            data_collator (`Callable`, *optional*): Makes a batch of rows, instead of `processing_class`.
            batch_size (`int`, *optional*, defaults to `64`): Rows per forward.
            precision (`str`, *optional*, defaults to `"fp32"`): `"fp32"`, `"fp16"`, or for language models `"top-k"`:
                the likeliest classes and their probabilities.
            top_k (`int`, *optional*): How many; by default as many as fit in 300 bytes per token.
            temperature (`float`, *optional*, defaults to `1.0`): Of the training, for `"top-k"`.
            signals (iterable of `str`, *optional*): Hidden states to store too: `"hidden.encoder.3"` is what layer 3
                passes on.
            autocast_dtype (`torch.dtype`, *optional*): In which the teacher runs.
            pooling (`str`, *optional*, defaults to `"mean"`): How a text's embedding is made, `"mean"` or `"cls"`.

        Returns:
            `TeacherCache`: Opened.

        Raises:
            ValueError: if the teacher gives NaN, the data set is empty, or the folder holds something else.
            OSError: if the disk is full, or would be.
        """
        folder, names = Path(folder), tuple(sorted(signals))
        task = task_of(teacher)
        n_classes = unwrap(teacher).config.vocab_size if task in LANGUAGE_MODELS else 0
        _check_arguments(task, precision, top_k, temperature, names, n_classes)
        settings = files.Settings(
            fingerprint=fingerprint(teacher),
            task=task,
            precision=precision,
            top_k=(top_k or default_top_k(n_classes)) if precision == "top-k" else 0,
            temperature=temperature,
            signals=names,
            autocast=str(autocast_dtype or torch.float32).removeprefix("torch."),
            columns=tuple(sorted(forward_columns(teacher) - LABELS)),
            pooling=pooling,
            rows="",
            block_rows=BLOCK_ROWS,
        )
        answers = Answers(teacher, settings, processing_class, data_collator, autocast_dtype)
        sample = _sample(dataset)
        if files.read_json(folder / files.META_FILE) is None:
            answers.check_padding(sample)
        per_row = answers.bytes_per_row(sample)
        n_rows = len(dataset) if hasattr(dataset, "__len__") else None
        block_rows = int(min(max(BLOCK_BYTES // per_row, 1), BLOCK_ROWS))
        settings = replace(settings, rows=f"{answers.digest(sample)} of {n_rows}", block_rows=block_rows)
        files.begin(folder, settings)
        if files.read_json(folder / files.META_FILE) is None:
            _report_size(folder, per_row, n_rows)
            n_blocks = _build_blocks(folder, answers, dataset, batch_size, block_rows)
            if answers.tail_mass > LARGEST_TAIL:
                logger.warning(
                    "The %d likeliest of %d tokens hold %.0f %% of the teacher's probability at temperature %g, too "
                    "little to imitate it by: store more of them (top_k), use a lower temperature, or "
                    "precision='fp16', or let the teacher run along.",
                    settings.top_k,
                    n_classes,
                    100 * (1 - answers.tail_mass),
                    temperature,
                )
            files.finish(folder, n_blocks)
        return cls(folder)

    def look_up(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the teacher says of a batch.

        Args:
            batch (`Mapping`): A collated batch on the CPU.

        Returns:
            `dict[str, torch.Tensor]`: float32 tensors named `cached_<signal>`, padded with 0 as the batch is.

        Raises:
            ValueError: if an example is not in the cache.
        """
        keys = example_keys(*key_columns(self.settings, batch))
        try:
            places = [self._places[key] for key in keys]
        except KeyError:
            missing = sum(key not in self._places for key in keys)
            raise ValueError(
                f"{missing} of {len(keys)} examples of a batch are not in the cache {self.folder} ({len(self)} "
                "examples): it was built from other rows, with another tokenizer or maximal length, or the collator "
                "adds columns or changes texts at random. Build the cache with the collator and the rows of the "
                "training, prepared once and for all, or train without it."
            ) from None
        masks = answer_masks(self.settings, batch)
        return {f"cached_{name}": self._gather(name, places, mask) for name, mask in masks.items()}

    def _gather(self, name: str, places: list[tuple[int, int]], mask: torch.Tensor | None) -> torch.Tensor:
        dtype = np.int64 if name == "top_indices" else np.float32
        if mask is None:
            return torch.from_numpy(self._whole_rows(name, places).astype(dtype))
        parts = []
        for block, row in places:
            start, stop = self._blocks[block][f"{name}.offsets"][row : row + 2]
            parts.append(self._blocks[block][name][start:stop])
        values = torch.from_numpy(np.concatenate(parts).astype(dtype))
        padded = values.new_zeros((*mask.shape, *values.shape[1:]))
        padded[mask] = values
        return padded

    def _whole_rows(self, name: str, places: list[tuple[int, int]]) -> np.ndarray:
        numbers = {block for block, _ in places}
        if len(numbers) == 1:
            return self._blocks[numbers.pop()][name][[row for _, row in places]]
        return np.stack([self._blocks[block][name][row] for block, row in places])


def default_top_k(n_classes: int) -> int:
    """How many of the likeliest classes fit in 300 bytes per token.

    Args:
        n_classes (`int`): Tokens of the vocabulary.

    Returns:
        `int`: 72 where an id takes two bytes, 48 where it takes four; never more than there are.
    """
    return min(n_classes, _TOP_K_BYTES // (4 if n_classes <= 2**16 else 6))


def _check_arguments(
    task: str, precision: str, top_k: int | None, temperature: float, signals: tuple, n_classes: int
) -> None:
    if precision not in Precision.__args__:
        raise ValueError(f"precision={precision!r} is unknown: give one of {', '.join(Precision.__args__)}.")
    if precision == "top-k" and task not in LANGUAGE_MODELS:
        raise ValueError(
            f"precision='top-k' keeps the likeliest tokens of a language model, and the task is {task}: its few "
            "classes are stored whole, give 'fp32' or 'fp16'."
        )
    if top_k is not None and (precision != "top-k" or not 1 <= top_k <= n_classes):
        raise ValueError(
            f"top_k={top_k} with precision={precision!r} and {n_classes} tokens: give 1 or more of them, with "
            "precision='top-k' only."
        )
    if temperature <= 0 or (precision != "top-k" and temperature != 1.0):
        raise ValueError(
            f"temperature={temperature} with precision={precision!r}: only 'top-k' depends on it, and it is above 0."
        )
    wrong = [name for name in signals if not name.startswith("hidden.")]
    if wrong:
        raise ValueError(
            f"signals={wrong} cannot be cached: only hidden states can, named as 'hidden.encoder.3'. Outputs are "
            "always stored, queries, keys and values never."
        )


def _sample(dataset: Iterable) -> list:
    rows = iter(dataset)
    if rows is dataset:
        raise TypeError(
            f"The data are a {type(dataset).__name__}, which can be read only once: give a Dataset, an "
            "IterableDataset or a list of rows."
        )
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        # From all of it: noisy copies come after rows that they share with others.
        number = min(_SAMPLE_ROWS, len(dataset))
        sample = [dataset[index * len(dataset) // number] for index in range(number)]
    else:
        sample = list(itertools.islice(rows, _SAMPLE_ROWS))
    if not sample:
        raise ValueError("The data set has 0 rows, so there is nothing to ask the teacher: give data with rows.")
    return sample


def _report_size(folder: Path, per_row: float, n_rows: int | None) -> None:
    """Says how large the cache will be, before anything is computed."""
    if n_rows is None:
        logger.info("The teacher's answers take about %s bytes per row.", f"{per_row:,.0f}")
        return
    total, free = per_row * n_rows, shutil.disk_usage(folder).free
    logger.info("The teacher's answers to %d rows will take about %s bytes.", n_rows, f"{total:,.0f}")
    written = sum(path.stat().st_size for path in folder.glob("block-*.safetensors"))
    if total - written > free:
        raise OSError(
            f"The cache will take about {total - written:,.0f} more bytes ({per_row:,.0f} for each of {n_rows:,} "
            f"rows), and the disk of {folder} has {free:,} free: choose precision='fp16' or 'top-k', fewer signals, "
            "or another disk."
        )


def _build_blocks(folder: Path, answers: Answers, dataset: Iterable, batch_size: int, block_rows: int) -> int:
    rank, n_processes = _rank()
    n_rows = len(dataset) if hasattr(dataset, "__len__") else None
    number, slowest = -1, 0.0

    def build(number: int, rows: list[Mapping[str, Any]]) -> None:
        if not files.block_path(folder, number).exists():
            arrays = answers.ask(rows, batch_size, first_row=number * block_rows)
            files.write_block(folder, number, arrays)

    with tqdm(total=n_rows, desc="Asking the teacher", unit="row", disable=rank != 0) as bar:
        for number, rows in enumerate(_in_blocks(dataset, block_rows)):
            if number % n_processes == rank:
                start = time.monotonic()
                build(number, rows)
                slowest = max(slowest, time.monotonic() - start)
            bar.update(len(rows))
    paths = [files.block_path(folder, one) for one in range(number + 1)]
    if not _have_come(paths, _PATIENCE + 2 * slowest):
        # Nobody is at work on the others: under `main_process_first` the other processes wait for this one.
        for one, rows in enumerate(_in_blocks(dataset, block_rows)):
            build(one, rows)
    return number + 1


def _have_come(paths: list[Path], patience: float) -> bool:
    """Waits for the blocks of other processes, as long as one appears every so often; whether all are there."""
    n_missing, last = len(paths), time.monotonic()
    while n_missing and time.monotonic() - last < patience:
        n_found = sum(not path.exists() for path in paths)
        if n_found == n_missing:
            time.sleep(0.05)
        else:
            n_missing, last = n_found, time.monotonic()
    return not n_missing


def _in_blocks(dataset: Iterable, block_rows: int) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(dataset)
    while block := list(itertools.islice(rows, block_rows)):
        yield block


def _rank() -> tuple[int, int]:
    """Number of this process and of all, where they were launched together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    state = process_state()
    return state.process_index, state.num_processes
