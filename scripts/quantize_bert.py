r"""Quantize a fine-tuned BERT (or any other text classifier), and measure it beside the float one, without training.

To 8-bit weights and activations, on a model and texts of your own: a folder with test.csv, for instance, that has the
columns text and label:

    python scripts/quantize_bert.py --model ./my-classifier --dataset ./my-texts --format int8 --output-dir ./int8

To several formats, in one table, on pairs of sentences; the pruned model of another script is as good a model:

    python scripts/quantize_bert.py --model ./pruned/pruned --dataset ./mrpc --text-columns sentence1 sentence2 \
        --formats int8 bf16 nf4 --output-dir ./formats

To 4 bits in groups, with modules left in floating point until at most a point of accuracy is lost on held-out rows:

    python scripts/quantize_bert.py --model ./my-classifier --dataset ./my-texts --format fixed-point --bits 4 \
        --granularity group --max-drop 0.01 --output-dir ./small

The output folder has a checkpoint for each format, which `from_pretrained` loads after `import hf_compress`, figures,
and the report. `--help` shows every option.
"""

import sys

from hf_compress.cli.main import parse_quantize, print_quantize_help
from hf_compress.jobs.quantize import quantize_classifier
from hf_compress.report.report import show_report


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print_quantize_help()
        return
    job, configs = parse_quantize(sys.argv[1:])
    show_report(quantize_classifier(job, configs), job.output_dir)


if __name__ == "__main__":
    main()
