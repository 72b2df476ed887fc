"""Run as a program: trainings that prune single weights in two processes, then in one, and how far apart they are.

python tests/pruning/two_processes.py FOLDER
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import debug_launcher
from accelerate.state import PartialState

import hf_compress as hc
from tests.modeling.tiny import tiny_batch
from tests.pruning.weight_training import Stop, StopAt, config, make_trainer, model_of, zeros

SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1})
CASES = ("magnitude", "sparsegpt", "resumed movement")


def run(name: str, folder: Path, size: int) -> dict[str, torch.Tensor]:
    """The weights after four steps of eight rows."""
    score = name.split()[-1]
    values = {
        "model_type": "gpt2",
        "max_steps": 4,
        "per_device_train_batch_size": size,
        "train_sampling_strategy": "sequential",
        "optimizer_cls_and_kwargs": SGD,
    }

    def trainer(**more: Any):
        model = model_of("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        callback = hc.PruningCallback(config(score=score, scope="layer"), [tiny_batch(model)], n_updates=2, end=0.8)
        callbacks = [callback, *more.pop("callbacks", [])]
        return make_trainer(folder / name.replace(" ", "_") / str(size), callbacks, model=model, **values, **more)

    if name.startswith("resumed") and size == 4:
        saves = {"save_strategy": "steps", "save_steps": 1}
        try:
            trainer(callbacks=[StopAt(2)], **saves).train()
        except Stop:
            pass
        dist.barrier()
        whole = trainer(**saves)
        whole.train(resume_from_checkpoint=True)
    else:
        whole = trainer()
        whole.train()
    return {
        key: value.detach().clone() for key, value in whole.accelerator.unwrap_model(whole.model).named_parameters()
    }


def in_two(folder: Path) -> None:
    """The part of both processes."""
    # Trainer collects garbage, which copies all that the processes still share.
    gc.freeze()
    torch.save({name: run(name, folder, 4) for name in CASES}, folder / f"{PartialState().process_index}.pt")


def compare(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference."""
    return max((first[name] - second[name]).abs().max().item() for name in first)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    debug_launcher(in_two, (folder,), num_processes=2)
    both = [torch.load(folder / f"{index}.pt") for index in range(2)]
    names = {f"{name}.weight" for name in zeros(model_of("gpt2"))}
    found = {}
    for case in CASES:
        alone = run(case, folder, 8)
        found[case] = {
            "between_processes": compare(both[0][case], both[1][case]),
            "masks": sum(((both[0][case][name] == 0) != (alone[name] == 0)).sum().item() for name in names),
            "weights": compare(both[0][case], alone),
        }
    (folder / "found.json").write_text(json.dumps(found, indent=1))
