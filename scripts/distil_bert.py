r"""Distil a fine-tuned BERT (or any other text classifier) into a student with fewer layers.

On a model and texts of your own, a folder with train.csv and test.csv that have the columns text and label:

    python scripts/distil_bert.py --model ./my-classifier --dataset ./my-texts --student-layers 3 \
        --output-dir ./student

On pairs of sentences, and with the student trained without its teacher beside it:

    python scripts/distil_bert.py --model ./my-mrpc-bert --dataset ./mrpc --text-columns sentence1 sentence2 \
        --student-layers 6 --baseline --num-train-epochs 5 --learning-rate 1e-4 --output-dir ./student

On a model that was not fine-tuned yet, from the Hub, two processes:

    accelerate launch --num_processes 2 scripts/distil_bert.py --model google-bert/bert-base-uncased \
        --teacher-epochs 3 --dataset nyu-mll/glue --dataset-name sst2 --text-columns sentence --student-layers 6 \
        --output-dir ./student --bf16

A stopped run continues with the same command. `--help` shows the usual options, `--help-all` every one.
"""

import sys

from hf_compress.cli.main import parse_distill, print_distill_help
from hf_compress.jobs.distill import distill
from hf_compress.modeling.launch import leave_processes
from hf_compress.report.report import show_report


def main() -> None:
    if {"-h", "--help", "--help-all"} & set(sys.argv):
        print_distill_help(everything="--help-all" in sys.argv)
        return
    job, args = parse_distill(sys.argv[1:])
    report = distill(job, args)
    if args.process_index == 0:
        show_report(report, args.output_dir)
    leave_processes()


if __name__ == "__main__":
    main()
