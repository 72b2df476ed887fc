"""Run as a program: two processes build one cache, each for itself, sharing the work, or one before the other.

python tests/distillation/two_builders.py apart|together|in-turn FOLDER
"""

import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

from accelerate import debug_launcher

from hf_compress.distillation import answers, cache
from hf_compress.modeling.launch import process_state
from tests.distillation import tiny
from tests.distillation.tiny import tiny_model, tiny_rows


def build(folder: str) -> None:
    cache.BLOCK_ROWS = 8
    rows = [row for _ in range(40) for row in tiny_rows("single-label")]
    for n, row in enumerate(rows):
        row["input_ids"] = [random.Random(n).randrange(1, tiny.VOCABULARY) for _ in row["input_ids"]]
    teacher = tiny_model("single-label", 2, seed=2)
    built, ask = [], answers.Answers.ask

    def watched(self, rows, batch_size, first_row=0):
        if len(rows) > 1:  # a single one is asked about to estimate the size
            built.append(first_row)
        return ask(self, rows, batch_size, first_row)

    answers.Answers.ask = watched
    cache.TeacherCache.build(folder, teacher, rows, data_collator=tiny.PadCollator())
    Path(f"{Path(folder).parent}/built-by-{os.getpid()}.json").write_text(json.dumps(built))


def build_in_turn(folder: str) -> None:
    cache._PATIENCE = 0.1
    with process_state().main_process_first():
        build(folder)


if __name__ == "__main__":
    mode, folder = sys.argv[1:]
    if mode == "together":
        debug_launcher(build, (folder,), num_processes=2)
    elif mode == "in-turn":
        debug_launcher(build_in_turn, (folder,), num_processes=2)
    else:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=build, args=(folder,)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        sys.exit(max(process.exitcode for process in processes))
