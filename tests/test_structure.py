"""Rules that hold for the tree as a whole: who imports whom, where architectures are named, what is documented."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hf_compress
from hf_compress.modeling import roles
from hf_compress.modeling.layouts import LAYOUTS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_compress"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in FILES}

# What each layer may import, itself apart. "pruning" allows all of that folder, "pruning.config" that file alone.
BASE = {"checkpoint", "formats", "modeling"}
STEPS = {"distillation", "pruning", "quantization"}
CONFIGS = {f"{step}.config" for step in STEPS} | {
    "distillation.arguments",
    "pruning.unstructured_config",
    "pruning.vocabulary_config",
}
ALLOWED = {
    "modeling": set(),
    "formats": set(),
    "checkpoint": {"formats", "modeling"},
    # A trainer writes its own card.
    "distillation": BASE | {"hub.card_base", "hub.card_page"},
    "pruning": BASE,
    "quantization": BASE,
    "evaluation": BASE,
    "recommend": BASE | {"evaluation", "quantization"},
    "recipe": CONFIGS,
    "report": BASE | {"evaluation"},
    "hub": {"__init__", "recipe", "report"},
    "jobs": BASE | STEPS | {"__init__", "evaluation", "hub", "recipe", "recommend", "report"},
    "pipeline": BASE | STEPS | {"__init__", "evaluation", "hub", "jobs", "recipe", "report"},
    "demo": {"distillation.arguments", "jobs", "modeling.half", "report"},
    "cli": CONFIGS | {"__init__", "demo", "hub", "jobs", "modeling.launch", "pipeline", "recipe", "report"},
    "__init__": {"checkpoint"},  # the public names are served lazily, from strings
}

# Fields of the layout records that name modules; the others name attributes and config keys, which are no secret.
PATHS = {
    "module", "inputs", "output", "extra_inputs", "gated_inputs", "owner", "table", "blocks", "token_embeddings",
    "position_embeddings", "heads", "token_rows", "token_columns", "tail", "read_whole",
    "pooler",
}  # fmt: skip
# `post_norm` does name a module, but one that is called like a class of PyTorch.
NO_PATHS = {
    "post_norm", "passes_on",
    "has_plain_scores", "plain_scores_if", "is_pre_norm",
    "head_dim", "attributes", "kind", "present_if", "head_count", "all_heads_width", "kv_group_size", "fused",
    "gated_if", "width", "in_first_block", "flag", "key", "value", "reason", "attentions", "ffn", "num_layers",
    "num_heads", "cache_num_layers", "ffn_width", "own_config", "own_num_layers", "is_shared", "position_bias",
    "layers_require", "first_stays", "first_stays_if", "stacks", "per_layer", "num_kv_heads", "heads_divide_hidden",
    "pad_token_is_fixed", "requires", "hidden_size", "follows_hidden",
}  # fmt: skip

# One distribution may give several modules, and its name may differ from theirs.
IMPORTED_AS = metadata.packages_distributions()


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def module_of(path: Path) -> str:
    """The dotted name below `hf_compress`: `pruning.scores`; `pruning` for a folder's `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every imported module of a file, those inside functions too, by its full dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("hf_compress.") in MODULES
                yield (full if is_module else node.module), node


def literals(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every string that code uses: strings that stand alone are docstrings."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value, node


def public_definitions(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def module_names() -> set[str]:
    """Names of modules in the layouts that no other code would use by accident: `q_proj`, `fc1`, `encoder.layer`."""
    paths = set()

    def collect(value: object, is_path: bool) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                collect(getattr(value, field.name), field.name in PATHS)
        elif isinstance(value, dict | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item, is_path)
        elif is_path and isinstance(value, str):
            paths.update([value, *value.split(".")])

    collect(LAYOUTS, False)
    # A record's own field may be called like a module: `layout.position_embeddings`.
    return {name for name in paths - PATHS if re.search(r"[a-z]", name) and re.search(r"[._A-Z0-9]", name)}


def test_imports_point_one_way():
    wrong = []
    for path, tree in TREES.items():
        layer = module_of(path).split(".")[0]
        assert layer in ALLOWED, f"{layer} is new: say in ALLOWED of tests/test_structure.py what it may import"
        for name, node in imports(tree):
            if name.split(".")[0] != "hf_compress":
                continue
            target = name.removeprefix("hf_compress").removeprefix(".") or "__init__"
            allowed = ALLOWED[layer] | {layer}
            if not any(target == entry or target.startswith(f"{entry}.") for entry in allowed):
                wrong.append(f"{place(path, node)}: {layer} imports {target}, it may import {sorted(allowed)}")
    assert not wrong, "\n".join(wrong)


def test_third_party_imports_are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["demo"]
    declared = {Requirement(line).name.lower().replace("_", "-") for line in lines}
    missing = []
    for path, tree in TREES.items():
        for name, node in imports(tree):
            top = name.split(".")[0]
            if top == "hf_compress" or top in sys.stdlib_module_names:
                continue
            owners = {owner.lower().replace("_", "-") for owner in IMPORTED_AS.get(top, ())}
            if not owners & declared:
                missing.append(f"{place(path, node)}: {top} is not declared in pyproject.toml")
    assert not missing, "\n".join(missing)


def test_every_field_of_a_layout_is_sorted():
    records = [value for value in vars(roles).values() if dataclasses.is_dataclass(value)]
    fields = {field.name for record in records for field in dataclasses.fields(record)}
    assert fields == PATHS | NO_PATHS, "sort the new fields of modeling/roles.py into PATHS or NO_PATHS"


def test_architectures_are_named_in_layouts_alone():
    names = module_names()
    assert {"q_proj", "c_attn", "encoder.layer", "SelfAttention", "lin1"} <= names
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(names)))})(?!\w)")
    wrong = []
    for path, tree in TREES.items():
        if path == PACKAGE / "modeling" / "layouts.py":
            continue
        hits = [(match[0], node) for text, node in literals(tree) for match in pattern.finditer(text)]
        hits += [
            (node.attr, node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names
        ]
        wrong += [f"{place(path, node)}: {name!r} belongs into modeling/layouts.py" for name, node in hits]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", hf_compress.__all__)
def test_public_names_are_documented(name):
    value = getattr(hf_compress, name)
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"\b{name}\b", readme), f"{name} is public and not in README.md"
    # A dataclass without a docstring gets its signature as one.
    assert value.__doc__, f"{name} has no docstring"
    assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring"
    if inspect.isfunction(value) and inspect.signature(value).parameters:
        assert re.search(r"^\s*Args:$", value.__doc__, re.MULTILINE), f"{name} takes arguments and has no Args section"


def test_public_names_are_few_and_sorted():
    assert list(hf_compress.__all__) == sorted(set(hf_compress.__all__))
    assert set(hf_compress.__all__) <= set(dir(hf_compress))


def test_modules_and_public_definitions_have_docstrings():
    nodes = [(path, node) for path, tree in TREES.items() for node in public_definitions(tree)]
    bare = [f"{place(path, node)}: {node.name}" for path, node in nodes if not ast.get_docstring(node)]
    bare += [str(path.relative_to(ROOT)) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    assert not bare, "without a docstring:\n" + "\n".join(bare)


def test_config_fields_have_help():
    public = [getattr(hf_compress, name) for name in hf_compress.__all__]
    configs = [value for value in public if dataclasses.is_dataclass(value)]
    configs = [config for config in configs if config.__name__.endswith(("Config", "Arguments"))]
    assert configs
    bare = [
        f"{owner.__name__}.{name}"
        for config in configs
        for owner in config.__mro__
        if owner.__module__.startswith("hf_compress")
        for name in inspect.get_annotations(owner)
        if name in config.__dataclass_fields__ and not config.__dataclass_fields__[name].metadata.get("help")
    ]
    assert not bare, 'without metadata={"help": ...}: ' + ", ".join(bare)


def test_import_is_light():
    heavy = ("transformers.trainer", "datasets", "evaluate", "bitsandbytes", "sklearn", "matplotlib")
    code = f"import sys, hf_compress; print(*(name for name in {heavy} if name in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"import hf_compress also imports {done.stdout}"


def test_every_module_imports():
    # The folders of the metrics are scripts for `evaluate.load`, and are imported by its own tests.
    for module in sorted(MODULES - {"__init__"}):
        if not module.startswith("evaluation.metrics."):
            importlib.import_module(f"hf_compress.{module}")


@pytest.mark.parametrize("folder", ["hf_compress", "scripts", "benchmarks", "tests"])
def test_files_and_functions_are_short(folder):
    long = []
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} has no Python files"
    for path in files:
        text = path.read_text()
        lines = text.count("\n")
        if lines > 400:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most 400: split it by topic")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                has_docstring = ast.get_docstring(node) is not None
                n_docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
                lines = node.end_lineno - node.lineno + 1 - n_docstring
                if lines > 80:
                    long.append(f"{place(path, node)}: {node.name} has {lines} lines of code, at most 80")
    assert not long, "\n".join(long)
