"""A folder belongs to one run at a time, and to nobody once that run has ended, however it ended."""

import os
import signal
import subprocess
import sys

import pytest

from hf_compress.jobs.lock import LOCK_FILE, alone_in, is_taken

HOLD = "import sys, time; from pathlib import Path; from hf_compress.jobs.lock import alone_in\n"
HOLD += "with alone_in(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"


def test_a_second_run_is_refused_until_the_first_was_killed(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="Another run is at work in the output folder .*run: wait"), alone_in(folder):
        pass
    assert (folder / LOCK_FILE).exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with alone_in(folder):
        assert not is_taken(folder)


@pytest.mark.parametrize("was_there", [False, True])
def test_what_wrote_nothing_leaves_nothing(tmp_path, was_there):
    folder = tmp_path / "deep" / "run"
    if was_there:
        folder.mkdir(parents=True)
    with pytest.raises(KeyError), alone_in(folder):
        raise KeyError
    assert folder.exists() == was_there
    assert not was_there or not list(folder.iterdir())


def test_files_stay_and_count(tmp_path):
    folder = tmp_path / "run"
    with alone_in(folder):
        (folder / "notes.txt").write_text("mine")
        assert is_taken(folder)
        assert not is_taken(folder, folder / "notes.txt")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert not is_taken(tmp_path / "elsewhere")


def test_other_processes_of_a_run_hold_nothing(tmp_path):
    with alone_in(tmp_path), alone_in(tmp_path, is_main=False):
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file: give a new"), alone_in(file):
        pass
    assert file.read_text() == "mine"
