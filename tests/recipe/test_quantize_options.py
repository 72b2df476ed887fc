"""The options of `hf-compress quantize`: shown, parsed for the formats that have them, and refused for the others."""

import logging
import re
from dataclasses import fields

import pytest
from transformers import BitsAndBytesConfig

import hf_compress as hc
from hf_compress.cli.main import Once, parse_quantize
from hf_compress.jobs.job import QuantizeJob
from hf_compress.recipe.format_options import FORMATS, format_settings, needs_texts

pytestmark = pytest.mark.usefixtures("quiet_surroundings")


def test_help_shows_every_option(call):
    code, out, _ = call("quantize", "--help")
    assert code == 0
    options = [fields(number_format.options) for number_format in FORMATS.values()]
    for field in (*fields(QuantizeJob), *sum(options, ())):
        assert f"--{field.name.replace('_', '-')} " in out
    assert out.count("required") == 3
    for name in FORMATS:
        assert name in out


LEAST = "--model m --dataset d --output-dir o".split()


def test_every_option_of_the_job_is_parsed():
    job = {
        "model": "m", "dataset": "d", "output_dir": "o", "dataset_name": "sst2", "text_columns": ["a", "b"],
        "label_column": "y", "eval_split": "dev", "max_length": 64, "metric": "f1", "overwrite": True, "n_texts": 9,
        "eval_batch_size": 8, "use_cpu": True, "max_drop": 0.02, "cost_batch": 4, "seed": 3, "auto": True,
    }  # fmt: skip
    words = []
    for name, value in job.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    assert parse_quantize(words) == (QuantizeJob(**job), {})


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ("--format int8 --exclude a b --embeddings --smooth 0.5", hc.Int8DynamicConfig(("a", "b"), True, 0.5)),
        ("--format bf16", hc.FloatConfig("bf16")),
        ("--format fp16", hc.FloatConfig("fp16")),
        (
            "--format fixed-point --bits 4 --symmetric false --granularity group --group-size 64 --power-of-two"
            " --activations 8 --ranges percentile --percentile 99 --embeddings false --exclude a",
            hc.FixedPointConfig(4, False, "group", 64, True, 8, "percentile", 99, False, ("a",)),
        ),
        ("--format binary --activations 8 --exclude a", hc.BinaryConfig(activations=8, exclude=("a",))),
        (
            "--format llm-int8 --llm-int8-threshold 0 --exclude a",
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=["a"]),
        ),
        (
            "--format nf4 --bnb-4bit-use-double-quant --bnb-4bit-compute-dtype bfloat16",
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype="bfloat16",
            ),
        ),
        ("--format fp4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    ],
)
def test_every_option_of_a_format_is_parsed(words, config):
    [(name, parsed)] = parse_quantize([*LEAST, *words.split()])[1].items()
    assert name == words.split()[1]
    assert type(parsed) is type(config)
    assert format_settings(parsed) == format_settings(config)


def test_options_go_to_the_formats_that_have_them():
    configs = parse_quantize([*LEAST, *"--formats int8 bf16 fixed-point --bits 4 --exclude a".split()])[1]
    assert configs == {
        "int8": hc.Int8DynamicConfig(exclude=("a",)),
        "bf16": hc.FloatConfig("bf16"),
        "fixed-point": hc.FixedPointConfig(bits=4, exclude=("a",)),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "There is no format to quantize to: give --format with one of int8, bf16"),
        ("--format int9", r"'int9' is no format \(did you mean int8\?\): choose from int8, bf16"),
        ("--formats int8 int8", "names a format twice"),
        ("--format int8 --formats nf4", "leave one of them out"),
        ("--format int8 --auto", "--format int8 and --auto are two ways"),
        ("--auto --bits 4", "--auto times formats as they are by default, so --bits cannot"),
        ("--format int8 --bits 4", "--bits is an option of fixed-point and not of int8, which has --exclude, --embed"),
        ("--format bf16 --exclude a", "--exclude is an option of int8.* and not of bf16, which has no options"),
        ("--format fixed-point --bitz 4", r"--bitz is no option \(did you mean --bits\?\). .*quantize --help"),
        ("--format fixed-point --bits 1", "bits=1 are no fixed-point format: give 2 to 16"),
        ("--format fixed-point --granularity row", "invalid choice: 'row'"),
        ("--format int8 --max-drop -1", "max_drop=-1.0 is no loss that could be allowed"),
        ("--format int8 --cost-batch 0", "cost_batch=0 counts texts"),
        ("--auto --formats int8 binary --dataset data.csv", "binary cannot be chosen by its time"),
        ("--format int8 --dataset no.csv", "There is no file or folder no.csv"),
    ],
)
def test_errors_are_one_paragraph(call, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("quantize", *LEAST, *words.split())
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "o").exists()


def test_texts_are_read_for_ranges_alone():
    with_texts = (
        hc.Int8DynamicConfig(smooth=0.5),
        hc.FixedPointConfig(activations=8),
        hc.BinaryConfig(),
    )
    without = (
        hc.Int8DynamicConfig(),
        hc.FixedPointConfig(),
        hc.BinaryConfig(activations=32),
        hc.FloatConfig(),
        BitsAndBytesConfig(load_in_8bit=True),
    )
    assert all(map(needs_texts, with_texts))
    assert not any(map(needs_texts, without))


def test_messages_are_said_once():
    once = Once()
    said = [once.filter(logging.makeLogRecord({"msg": "%s rounded", "args": (name,)})) for name in "aba"]
    assert said == [True, True, False]
