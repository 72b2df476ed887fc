r"""Prune a fine-tuned BERT (or any other text classifier) with unlabelled texts; nothing is trained.

To half of its multiply-accumulates, on a model and texts of your own: a folder with train.csv, of which only the
column text is read, and test.csv with the columns text and label:

    python scripts/prune_bert.py --model ./my-classifier --dataset ./my-texts --budget 0.5 --output-dir ./pruned

To several budgets from one calibration, on pairs of sentences, where whole attentions and feed-forward networks may
go too:

    python scripts/prune_bert.py --model ./my-mrpc-bert --dataset ./mrpc --text-columns sentence1 sentence2 \
        --budgets 0.75 0.5 0.33 --units heads neurons layers --output-dir ./pruned

To half of the time of a forward pass on this machine:

    python scripts/prune_bert.py --model ./my-classifier --dataset ./my-texts --budget 0.5 --cost latency \
        --output-dir ./faster

A figure of the heads and neurons that each layer kept is saved beside the model. `--help` shows every option.
"""

import sys

from hf_compress.cli.main import parse_prune, print_prune_help
from hf_compress.jobs.prune import prune_classifier
from hf_compress.report.report import show_report


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print_prune_help()
        return
    job, config = parse_prune(sys.argv[1:])
    show_report(prune_classifier(job, config), job.output_dir)


if __name__ == "__main__":
    main()
