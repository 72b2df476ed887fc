r"""Serves a compressed checkpoint with a plain `pipeline()`: one text per line in, one answer per line out.

    echo "a fine film" | python scripts/serve.py FOLDER

FOLDER is any model that was saved here, or its name on the Hub. Only the import of hf_compress differs from what one
writes for other models, and stock checkpoints do without it.
"""

import json
import sys

from transformers import pipeline

import hf_compress  # noqa: F401  (lets from_pretrained read compressed checkpoints)


def main() -> None:
    classify = pipeline("text-classification", sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(classify(line.strip())[0]), flush=True)


if __name__ == "__main__":
    main()
