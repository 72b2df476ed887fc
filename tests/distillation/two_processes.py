"""Run by two processes: each takes half of the rows of one optimizer step; the first writes the gradients down.

python tests/distillation/two_processes.py FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import debug_launcher
from safetensors.torch import save_file

from tests.distillation.tiny import TASKS, GradientRecorder, make_trainer


def main(folder: Path) -> None:
    for task in TASKS:
        for batch_size, accumulation in ((4, 1), (2, 2)):
            recorder = GradientRecorder()
            trainer = make_trainer(
                task,
                folder / "work",
                callbacks=[recorder],
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
            )
            assert trainer.args.world_size == 2
            trainer.train()
            if trainer.is_world_process_zero():
                gradients = {name.removeprefix("module."): value for name, value in recorder.gradients.items()}
                save_file(gradients, folder / f"{task}-{batch_size}x{accumulation}.safetensors")
                logged = trainer.state.log_history[0]
                logs = {name: torch.tensor(float(logged[name])) for name in ("loss", "kd_loss", "task_loss")}
                save_file(logs, folder / f"{task}-log.safetensors")


if __name__ == "__main__":
    debug_launcher(main, (Path(sys.argv[1]),), num_processes=2)
