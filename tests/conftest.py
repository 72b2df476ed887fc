"""Tests run offline on a CPU; what they need, they build, and what they leave is removed."""

import atexit
import logging
import os
import shutil
import tempfile

import pytest

_HOME = tempfile.mkdtemp(prefix="hf_compress-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["HF_HOME"] = _HOME
os.environ["HF_HUB_OFFLINE"] = "1"
# The server that some talk to is here, whatever leads elsewhere.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# What makes programs colour their output where nobody looks.
for name in ("HF_DATASETS_CACHE", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads that wait for each other cost more than they gain on models this small.
os.environ["OMP_NUM_THREADS"] = "1"


LEVELS = {name: logging.getLogger(name).level for name in (None, "hf_compress", "bitsandbytes")}


# Files of few and long tests, which would keep one process busy when all others have ended.
LONG = ("test_readme.py", "test_scripts.py", "test_docs.py", "test_pipeline.py")


def pytest_collection_modifyitems(items):
    """The longest files first."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """The command line sets what its process logs; a test is not to depend on those before it."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def quiet_surroundings(tmp_path, monkeypatch):
    """The command line sets what its process shows; here, that is put back."""
    from transformers.utils import logging

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "200")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def call(capsys):
    """Calls the command line; returns its exit code, and what it wrote to stdout and stderr."""
    from hf_compress.cli.main import main

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run
