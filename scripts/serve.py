r"""Serves a compressed checkpoint with a plain `pipeline()`: one text per line in, one answer per line out.

    echo "a fine film" | python scripts/serve.py FOLDER

FOLDER is any text classifier that was saved here, or its name on the Hub; lines are cut to the length that it reads.
Only the import of hf_compress differs from what one writes for other models, and stock checkpoints do without it.
"""

import json
import sys

from transformers import pipeline

import hf_compress  # noqa: F401  (lets from_pretrained read compressed checkpoints)


def main() -> None:
    classify = pipeline("text-classification", sys.argv[1])
    # Not every tokenizer knows how much its model reads.
    positions = getattr(classify.model.config, "max_position_embeddings", 512)
    length = min(classify.tokenizer.model_max_length, positions)
    for line in sys.stdin:
        print(json.dumps(classify(line.strip(), truncation=True, max_length=length)[0]), flush=True)


if __name__ == "__main__":
    main()
