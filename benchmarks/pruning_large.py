"""A model of 1.5 billion parameters pruned in place on a CPU: time and peak memory.

    python benchmarks/pruning_large.py

Llama's shape (30 layers, hidden size 2048, 32 heads in 8 groups, 5632 neurons), random weights, bfloat16. Half of the
blocks' multiply-accumulates go, by activations on 32 texts of 128 random tokens, then the model is saved, reloaded and
compared. Prints and stores seconds, the peak resident memory of the process, and the largest difference of the logits.
"""

import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_compress as hc
from hf_compress.checkpoint.widths import read_widths

RESULT = Path("benchmarks/results/pruning_large.json")
N_TEXTS, LENGTH, BATCH = 32, 128, 4


def peak_gb() -> float:
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=30, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=5632, vocab_size=32_000, head_dim=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(1, 32_000, (N_TEXTS, LENGTH))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)]
    found = {"parameters": sum(p.numel() for p in model.parameters()), "loaded_gb": round(peak_gb(), 2)}
    settings = hc.StructuredPruningConfig(budget=0.5, score="activation", repair="none", multiple_of=64)
    start = time.perf_counter()
    hc.prune_(model, settings, batches)
    found |= {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak_gb(), 2)}
    found |= {"parameters_left": sum(p.numel() for p in model.parameters()), "widths": read_widths(model)}
    with torch.inference_mode():
        expected = model(**batches[0]).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        found["reload_difference"] = (reloaded(**batches[0]).logits - expected).abs().max().item()
    found |= {
        "texts": N_TEXTS,
        "length": LENGTH,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "hf_compress": hc.__version__},
    }  # fmt: skip
    print(json.dumps({name: value for name, value in found.items() if name != "widths"}, indent=2))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
