"""Which files of a folder are the model's."""

import json
from pathlib import Path

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: str | Path) -> list[Path]:
    """The files that `from_pretrained` takes the weights from; others may hold them a second time.

    Args:
        folder (`str` or `Path`): Where a model is saved.

    Returns:
        `list[Path]`: `model.safetensors`, or those that its index names, or all `*.safetensors` if there is neither.
            Some may be missing. Empty if there is no such folder.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        names = json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()
        return sorted({folder / Path(name).name for name in names})
    return sorted(folder.glob("*.safetensors"))
