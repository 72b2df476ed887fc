"""The command of docs/recipes.md for several processes, as it stands there."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_job import save_tiny_bert, tiny_texts, write_rows

ROOT = Path(__file__).parents[2]
RECIPE = """
model: classifier
data: {dataset: texts, max_length: 12}
measure: {batch_sizes: [2], n_runs: 1}
steps:
  - vocabulary: {max_size: 36, characters: corpus}
"""


def test_steps_without_training_are_done_by_the_first_process(tmp_path):
    save_tiny_bert(tmp_path / "classifier")
    for split, seed in (("train", 1), ("test", 2)):
        write_rows(tmp_path / "texts" / f"{split}.csv", tiny_texts(16, seed))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launch, str(ROOT / "scripts/accelerate_configs/cpu_ddp.yaml"), "-m", "hf_compress.cli", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for step in ("made", "found again"):
        done = subprocess.run(
            [*command, "recipe.yaml", "--output-dir", "out", "--json"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{step}: {done.stderr}"
        # The other process has nothing to say.
        assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
