"""The pages of docs/: their Python runs, their commands and recipes are parsed, their links and tables are right.

`python -m tests.test_docs` writes the tables of fields anew.
"""

import dataclasses
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import hf_compress
from hf_compress.cli import main as cli
from hf_compress.cli.run import RunJob
from hf_compress.distillation.arguments import DistillationArguments, StageConfig, TermConfig
from hf_compress.distillation.augmentation import AugmentationConfig
from hf_compress.evaluation.retention import METRICS
from hf_compress.modeling.layouts import LAYOUTS
from hf_compress.recipe.format_options import FORMATS
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import STEPS, DataConfig, MeasureConfig, TrainingStep
from tests.tiny_job import save_tiny_bert, tiny_texts, write_rows

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(<!-- fields: ([\w-]+) -->\n)(.*?)(<!-- end of fields -->)", re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
LONGEST = 119


# Tables of fields


def _own(kind: type, base: type) -> list[dataclasses.Field]:
    """The fields of a class that its base lacks or has another default for."""
    known = {one.name: one for one in dataclasses.fields(base)}
    return [one for one in dataclasses.fields(kind) if _default(one) != (_default(known.get(one.name)))]


def _default(one: dataclasses.Field | None) -> Any:
    if one is None:
        return None, None
    if one.default_factory is not dataclasses.MISSING:
        return one.name, one.default_factory()
    return one.name, one.default


def _fields(name: str) -> list[dataclasses.Field]:
    """The fields that a table shows, by what its page calls it."""
    given = {
        "data": DataConfig,
        "measure": MeasureConfig,
        "training": TrainingStep,
        "term": TermConfig,
        "stage": StageConfig,
        "augmentation": AugmentationConfig,
        "run": RunJob,
    }
    if name == "distillation-arguments":
        return _own(DistillationArguments, DistillationArguments.__base__)
    if name.startswith("format-"):
        return list(dataclasses.fields(FORMATS[name.removeprefix("format-")].options))
    if name == "recover":
        return _own(STEPS["recover"], STEPS["distil"])
    kind = STEPS[name] if name in STEPS else given[name]
    if kind is STEPS["quantize"]:
        # In a file, the options stand beside the format.
        return [one for one in dataclasses.fields(kind) if one.name != "options"]
    is_training = name in STEPS and issubclass(kind, TrainingStep)
    return _own(kind, TrainingStep) if is_training else list(dataclasses.fields(kind))


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        fields = ((one.name, one, getattr(value, one.name)) for one in dataclasses.fields(value))
        return "{" + ", ".join(f"{name}: {_shown(v)}" for name, one, v in fields if v != _default(one)[1]) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)


def table(name: str) -> str:
    """A table as Markdown, with a blank line around it."""
    if name == "metrics":
        rows = [(kind, ", ".join(metrics)) for kind, metrics in METRICS.items()]
        lines = ["| task | metrics |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join(["", *lines, "", ""])
    if name == "architectures":
        return "\n" + textwrap.fill(f"{', '.join(sorted(LAYOUTS))}.", LONGEST, break_on_hyphens=False) + "\n\n"
    lines = [f"| {'option' if name == 'run' else 'key'} | default | meaning |", "|---|---|---|"]
    for one in _fields(name):
        default = _default(one)[1]
        meaning = " ".join(one.metadata["help"].split()).replace("|", "\\|")
        key = cli.option(one.name) if name == "run" else one.name
        is_required = default is dataclasses.MISSING
        shown = "required" if is_required else f"`{_shown(default)}`"
        lines.append(f"| `{key}` | {shown} | {meaning} |")
    return "\n".join(["", *lines, "", ""])


def with_tables(text: str) -> str:
    """A page with its tables of fields as they are in the code."""
    return TABLE.sub(lambda found: found[1] + table(found[2]) + found[4], text)


# What is on a page


def blocks(text: str, language: str) -> Iterator[str]:
    """The code blocks of one language, but for those that are marked as not to run."""
    for info, code in BLOCK.findall(text):
        if info.strip() == language:
            yield code


def program(text: str) -> str:
    """The Python blocks of a page as one program, with the line numbers of the page."""
    lines, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line.removeprefix("```").strip() if language is None else None
            line = ""
        lines.append(line if language == "python" else "")
    return "\n".join(lines) + "\n"


def prose(text: str) -> str:
    """A page without its code."""
    return BLOCK.sub("", text)


def commands(text: str) -> Iterator[str]:
    """The command lines of a page, continued lines joined."""
    for code in blocks(text, "bash"):
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def anchors(text: str) -> set[str]:
    """What links to parts of a page may name."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def every(found: Any) -> list[tuple[str, str]]:
    """What all pages have of something, each with the name of its page."""
    return [(page.name, one) for page in PAGES for one in found(page.read_text())]


@pytest.fixture
def my_files(tmp_path, monkeypatch, quiet_surroundings):
    """The folder in which the pages begin: a classifier, an encoder and labelled texts."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64}
    save_tiny_bert(tmp_path / "my-classifier", **sizes)
    for split, n_rows, seed in (("train", 96, 1), ("validation", 16, 2), ("test", 16, 3)):
        write_rows(tmp_path / "reviews" / f"{split}.csv", tiny_texts(n_rows, seed))
    monkeypatch.chdir(tmp_path)


def run_page(page: Path, names: dict[str, Any]) -> None:
    """Runs the Python of a page; tracebacks have the line numbers of the page."""
    exec(compile(program(page.read_text()), str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page, my_files):
    names: dict[str, Any] = {}
    if page.name == "README.md":
        run_page(page, names)
    elif any(blocks(page.read_text(), "python")):
        run_page(DOCS / "README.md", names)
        run_page(page, names)


def test_languages_are_known():
    known = {"python", "python no-run", "bash", "yaml", "json", "text"}
    found = {info.strip() for page in PAGES for info, _ in BLOCK.findall(page.read_text())}
    assert found <= known, f"nothing checks blocks of {sorted(found - known)}"


@pytest.mark.parametrize(("page", "line"), every(commands))
def test_commands_are_parsed(page, line, monkeypatch, call):
    words = shlex.split(line, comments=True)
    if words[0] == "accelerate":
        assert "hf_compress.cli" in words
        words = ["hf-compress", *words[words.index("hf_compress.cli") + 1 :]]
    assert words[0] == "hf-compress", f"nothing checks this: {line}"
    command, options = words[1], words[2:]
    parsers = {
        "distill": cli.parse_distill,
        "prune": cli.parse_prune,
        "quantize": cli.parse_quantize,
        "run": cli.parse_run,
    }
    if command in parsers:
        parsers[command](options)
    elif command == "plan":
        asked = []
        monkeypatch.setattr("hf_compress.cli.plan.plan_recipe", lambda *job: asked.append(job))
        assert call(*words[1:])[0] == 0
        assert asked
    elif command.startswith("--"):
        assert call(command)[0] == 0
    else:
        known = get_command(cli.app).commands
        assert command in known, f"there is no command {command}: {line}"
        known[command].make_context(command, options)


@pytest.mark.parametrize(("page", "text"), every(lambda text: blocks(text, "yaml")))
def test_recipes_are_read(page, text):
    content = yaml.safe_load(text)
    assert "steps" in content, f"nothing checks this YAML of {page}"
    given = {} if "model" in content else {"model": "model"}
    given |= {} if "data" in content else {"dataset": "data"}
    recipe = Recipe.from_yaml(text, **given)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(("page", "text"), every(lambda text: blocks(text, "json")))
def test_json_is_read(page, text):
    json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page.name} links to {target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_index_names_the_page(page):
    index = (DOCS / "README.md").read_text()
    assert page.name == "README.md" or f"({page.name})" in index, f"docs/README.md does not link to {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page):
    text = page.read_text()
    assert with_tables(text) == text, "a field, a default or a help has changed: run python -m tests.test_docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page):
    # A row of a table cannot be broken.
    lines = enumerate(page.read_text().splitlines(), start=1)
    long = [number for number, line in lines if len(line) > LONGEST and not line.startswith("|")]
    assert not long, f"{page.name} has lines of more than {LONGEST} characters: {long}"


def test_all_that_is_public_is_described():
    text = "\n".join(page.read_text() for page in PAGES)
    names = [*hf_compress.__all__, *STEPS, *FORMATS, *get_command(cli.app).commands]
    missing = [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]
    assert not missing, f"no page of docs/ mentions {missing}"
    tables = {found[1] for found in TABLE.findall(text)}
    lacking = [name for name in STEPS if name not in tables]
    assert not lacking, f"docs/recipes.md has no table of the steps {lacking}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
