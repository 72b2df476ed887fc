"""README.md's table of architectures and formats says what the tests of exact reloads run, and nothing else."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_compress.modeling.layouts import LAYOUTS
from hf_compress.quantization.config import FloatConfig
from hf_compress.quantization.quantize import _STEPS
from tests.quantization import test_bitsandbytes, test_float, test_reload

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- table of formats: begin -->", "<!-- table of formats: end -->"

RELOAD = test_reload.test_before_and_after_an_inference
BITSANDBYTES = test_bitsandbytes.test_before_and_after_an_inference
FLOAT = test_float.test_a_cast_model_comes_back_bit_for_bit
CONFIGS = {
    RELOAD: test_reload.CONFIGS,
    BITSANDBYTES: test_bitsandbytes.CONFIGS,
    FLOAT: {name: FloatConfig(name) for name in test_float.DTYPES},
}
# What cannot be read off the parameters.
MODELS = {BITSANDBYTES: "one or the other", FLOAT: "dense"}


def cases(test: Callable) -> list[dict[str, Any]]:
    """All parameters that pytest calls a test with."""
    marks = [mark.args for mark in test.pytestmark if mark.name == "parametrize"]
    values = itertools.product(*(list(choices) for _, choices in marks))
    return [dict(zip([name for name, _ in marks], chosen, strict=True)) for chosen in values]


def label(test: Callable, name: str) -> str:
    if test is BITSANDBYTES:
        return "LLM.int8" if name == "int8" else name.upper()
    return name.replace("_", " ")


def columns() -> dict[str, dict[str, Any]]:
    """By format: its config, the architectures that are tested, and whether models are dense or pruned."""
    found = {}
    for test, configs in CONFIGS.items():
        for name, config in configs.items():
            mine = [case for case in cases(test) if name in (case.get("format_name"), case.get("name"))]
            pruned = {case.get("is_pruned") for case in mine}
            found[label(test, name)] = {
                "config": config,
                "architectures": {case["model_type"] for case in mine},
                "models": "both" if pruned == {True, False} else MODELS[test],
            }
    return found


def table() -> str:
    """The table as Markdown."""
    found = columns()
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for model_type in sorted(LAYOUTS):
        entries = ["exact" if model_type in one["architectures"] else "" for one in found.values()]
        lines.append(f"| {model_type} | {' | '.join(entries)} |")
    lines.append(f"| *dense or pruned* | {' | '.join(one['models'] for one in found.values())} |")
    return "\n".join(lines)


def test_the_readme_has_the_table():
    match = re.search(rf"{BEGIN}\n+(.*?)\n+{END}", README.read_text(), re.DOTALL)
    shown = match[1] if match else None
    assert shown == table(), f"README.md should have these lines:\n\n{BEGIN}\n\n{table()}\n\n{END}"


@pytest.mark.parametrize("name", columns())
def test_every_format_is_tested_on_every_architecture(name):
    assert columns()[name]["architectures"] == set(LAYOUTS)


def test_every_kind_of_config_is_tested():
    assert {type(one["config"]) for one in columns().values()} == set(_STEPS)
