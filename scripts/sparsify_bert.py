r"""Make weights of a fine-tuned BERT (or any other text classifier) 0, with unlabelled texts; nothing is trained.

Half of the weights inside its blocks, on a model and texts of your own: a folder with train.csv, of which only the
column text is read, and test.csv with the columns text and label:

    python scripts/sparsify_bert.py --model ./my-classifier --dataset ./my-texts --sparsity 0.5 --output-dir ./sparse

To several sparsities, on pairs of sentences, in eight rounds with inputs read anew, where blocks with many outliers
keep more:

    python scripts/sparsify_bert.py --model ./my-mrpc-bert --dataset ./mrpc --text-columns sentence1 sentence2 \
        --sparsities 0.6 0.7 0.8 --steps 8 --allocation owl --output-dir ./sparse

Two of each four weights that lie side by side, by magnitude and input:

    python scripts/sparsify_bert.py --model ./my-classifier --dataset ./my-texts --pattern 2:4 --score wanda \
        --output-dir ./sparse

The zeros are not stored, so the files are smaller; the model has its old shape and is about as fast. A figure of the
sparsity and the output error of each layer is saved beside it. `--help` shows every option.
"""

import sys

from hf_compress.cli.main import UNSTRUCTURED, parse_prune, print_prune_help
from hf_compress.jobs.prune import prune_classifier
from hf_compress.report.report import show_report


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print_prune_help()
        return
    job, config = parse_prune([UNSTRUCTURED, *sys.argv[1:]])
    show_report(prune_classifier(job, config), job.output_dir)


if __name__ == "__main__":
    main()
