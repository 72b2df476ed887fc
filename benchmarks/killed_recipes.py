"""Kills a tiny recipe's run at random moments, continues it, and compares what it leaves with an unbroken run.

    python benchmarks/killed_recipes.py

The recipe fine-tunes a BERT of three layers, cuts its vocabulary, prunes, recovers with the teacher, passes a gate and
quantizes to int8. Each trial starts it in a new folder, sends SIGKILL after a random part of the time that an unbroken
run takes, starts it again and lets it end. Weights must be equal bit for bit, and so must the report, but for times
and memory.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/killed_recipes.json"
sys.path.insert(0, str(ROOT))


def run(folder: str, output: str) -> None:
    """The recipe's run, in a process of its own."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    from hf_compress.pipeline.compress import compress
    from tests.tiny_recipe import tiny_recipe

    compress(tiny_recipe(Path(folder)), output)


def finish(context, folder: Path, output: Path, killed_after: float | None = None) -> tuple[float, bool]:
    """Starts a run and waits for it, or kills it; returns its seconds and whether it was killed on its way."""
    start = time.perf_counter()
    process = context.Process(target=run, args=(str(folder), str(output)))
    process.start()
    process.join(killed_after)
    was_alive = process.is_alive()
    if was_alive:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    elif process.exitcode != 0:
        raise RuntimeError(f"a run ended with exit code {process.exitcode}")
    return time.perf_counter() - start, was_alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tests.tiny_recipe import left_behind, tiny_recipe

    # Processes that begin with everything imported: what is killed is the run, not the import of torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_compress.pipeline.compress", "tests.tiny_recipe"])
    draw, trials = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_recipe(folder)
        finish(context, folder, folder / "first")
        whole, _ = finish(context, folder, folder / "unbroken")
        expected = left_behind(folder / "unbroken")
        for number in range(options.trials):
            output, moment = folder / f"trial-{number}", draw.uniform(0.05, 1.0) * whole
            _, was_killed = finish(context, folder, output, moment)
            found = sorted(path.name for path in output.glob("*")) if output.exists() else []
            finish(context, folder, output)
            trials.append(
                {
                    "killed_after_s": round(moment, 2),
                    "was_killed": was_killed,
                    "was_there": found,
                    "is_same": left_behind(output) == expected,
                }
            )
            print(json.dumps(trials[-1]), flush=True)
    same = sum(trial["is_same"] for trial in trials)
    killed = sum(trial["was_killed"] for trial in trials)
    print(f"{same} of {len(trials)} runs ended like the unbroken one; {killed} were killed on their way.")
    result = {"unbroken_s": round(whole, 2), "same": same, "killed": killed, "trials": trials}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(same < len(trials))


if __name__ == "__main__":
    main()
