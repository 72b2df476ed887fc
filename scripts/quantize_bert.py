r"""Quantize a fine-tuned BERT (or any other text classifier), and measure it beside the float model.

To 8-bit weights and activations, on a model and texts of your own: a folder or file whose split to measure on has the
columns text and label, for instance test.csv:

    python scripts/quantize_bert.py --model ./my-classifier --dataset ./my-texts --format int8 --output-dir ./int8

To 4 bits with bitsandbytes, on pairs of sentences; the pruned model of another script is as good a model:

    python scripts/quantize_bert.py --model ./pruned/pruned --dataset ./mrpc --text-columns sentence1 sentence2 \
        --format nf4 --output-dir ./nf4

The output folder is a checkpoint that `from_pretrained` loads after `import hf_compress`. All figures are of what was
saved and loaded again. `--help` shows every option.
"""

import argparse

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, DataCollatorWithPadding

from hf_compress import measure_cost, score_retention
from hf_compress.classifiers import choose_metric, load_classifier
from hf_compress.data import check_columns, check_tokenizer, evaluation_split, label_ids, load_splits, tokenize
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize

FORMATS = {
    "int8": Int8DynamicConfig(),
    "int8-embeddings": Int8DynamicConfig(embeddings=True),
    "llm-int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}
COST_BATCH = 32


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--dataset", required=True, help="a folder, a file, or a name on the Hub")
    parser.add_argument("--dataset-name", help="configuration of a Hub data set")
    parser.add_argument("--text-columns", nargs="+", default=["text"], help="one column of texts, or two for pairs")
    parser.add_argument("--label-column", default="label", help="names, ids or numbers")
    parser.add_argument("--eval-split", help="split to measure on; by default validation, dev or test")
    parser.add_argument("--max-length", type=int, default=128, help="tokens per text at most")
    parser.add_argument("--format", choices=FORMATS, default="int8", help="of the weights; nf4 and fp4 have 4 bits")
    parser.add_argument("--output-dir", required=True, help="folder for the quantized model")
    return parser.parse_args()


def main() -> None:
    args = parse()
    splits = load_splits(args.dataset, args.dataset_name)
    split = evaluation_split(splits, args.eval_split)
    check_columns(splits[split], split, args.text_columns, args.label_column)
    model, tokenizer = load_classifier(args.model), AutoTokenizer.from_pretrained(args.model)
    check_tokenizer(tokenizer, model)
    labels = label_ids(splits[split], split, args.label_column, model.config)
    rows = tokenize(splits[split], tokenizer, args.text_columns, labels, args.max_length)

    quantize(model, FORMATS[args.format]).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)

    small = AutoModelForSequenceClassification.from_pretrained(args.output_dir).to(model.device)
    kept = score_retention(model, small, rows, choose_metric(None, model), processing_class=tokenizer)
    sample = rows.select(range(min(COST_BATCH, len(rows)))).remove_columns(["labels", "length"])
    batch = dict(DataCollatorWithPadding(tokenizer)(list(sample)))
    table = Table("model", kept.metric, "MB", f"ms for {len(sample)} rows")
    for name, each, value in (("float", model, kept.teacher), (args.format, small, kept.compressed)):
        cost = measure_cost(each, batch, path=args.output_dir if each is small else None)
        figures = (value, cost.bytes_on_disk / 1e6, 1000 * cost.latency.median_s)
        table.add_row(name, *(f"{figure:.3f}" for figure in figures))
    console = Console()
    console.print(table)
    low, high = kept.retention_interval
    console.print(f"Retention {kept.retention:.4f}, {kept.confidence:.0%} interval {low:.4f} to {high:.4f}.")


if __name__ == "__main__":
    main()
