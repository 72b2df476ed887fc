"""Texts are written as a whole or not at all, and in UTF-8 wherever the program runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.report.files import write_whole

ROOT = Path(__file__).parent.parent.parent


def test_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "report.md"
    write_whole(file, "before")
    write_whole(file, "after")
    assert file.read_text() == "after"
    assert list(tmp_path.iterdir()) == [file]


def test_file_stays_where_writing_fails(tmp_path):
    file = tmp_path / "report.md"
    write_whole(file, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "half a pair: \ud800")
    assert file.read_text() == "before"


def test_locale_does_not_matter(tmp_path):
    code = "from pathlib import Path; from hf_compress.report.files import write_whole; "
    code += "write_whole(Path('names.txt'), '\\u4e2d\\u00fc')"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | locale | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "names.txt").read_text(encoding="utf-8") == "中ü"
