"""What two processes find out about themselves, for `two_processes.py`: each function gives numbers or messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from hf_compress import TermConfig
from tests.distillation.tiny import PadCollator, make_trainer, tiny_model, tiny_rows

FACTS: dict[str, Callable[[Path], Any]] = {}


def fact(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    FACTS[function.__name__] = function
    return function
