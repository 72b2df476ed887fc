"""The README is run: its Python as one program from top to bottom, its commands against the options that exist."""

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",  # or long options are cut off in the help
    "NO_COLOR": "1",
    "TERM": "dumb",
}


def blocks(*languages: str) -> str:
    """The code blocks of some languages, every other line left blank, so that tracebacks show its line numbers."""
    lines, language = [], None
    for line in README.splitlines():
        if line.startswith("```"):
            language = line.removeprefix("```").strip() if language is None else None
            line = ""
        lines.append(line if language in languages else "")
    return "\n".join(lines) + "\n"


def commands() -> list[str]:
    """The shell lines of the README, continued lines joined, without prompts and comments."""
    joined = re.sub(r"\\\n\s*", " ", blocks("bash", "sh", "shell", "console"))
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = commands()


@functools.cache
def help_of(*words: str) -> str:
    """The help of a command, which must exist. That of hf-compress is read in this process, which takes no start."""
    if words[0] == "hf-compress":
        shown = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
            for name in ("COLUMNS", "NO_COLOR", "TERM"):
                patch.setenv(name, ENVIRONMENT[name])
            with pytest.raises(SystemExit) as stopped:
                main([*words[1:], "--help"])
        assert not stopped.value.code, shown.getvalue()
        return shown.getvalue()
    done = subprocess.run(
        [sys.executable, *words, "--help"], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_options(command: str, words: list[str], *program: str) -> None:
    for word in words:
        option = word.split("=")[0]
        if option.startswith("--"):
            assert re.search(rf"(?<!\S){option}(?![\w-])", help_of(*program)), f"{option} is unknown: {command}"


def test_python_runs(tmp_path):
    code = blocks("python")
    assert code.strip(), "README.md has no python blocks"
    script = tmp_path / "README.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"the line numbers are README.md's\n{done.stderr}"


def test_commands_are_found():
    assert any(command.startswith("hf-compress ") for command in COMMANDS), "README.md shows no hf-compress command"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    words = shlex.split(command, comments=True)
    if words[0] == "hf-compress":
        program = words[:1] if words[1].startswith("-") else words[:2]
        check_options(command, words[1:], *program)
        assert help_of(*program)
    elif words[0] in ("python", "python3") and words[1].endswith(".py"):
        check_options(command, words[2:], words[1])
        assert help_of(words[1])
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"the Makefile has no target {words[1]}: {command}"
    else:
        assert words[0] in ("pip", "git", "cd", "source", "python", "python3"), f"nothing checks this: {command}"
