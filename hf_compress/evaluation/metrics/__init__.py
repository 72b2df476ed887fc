"""The metrics that ship with `hf_compress`, as modules of `evaluate` that load without a network."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HIGHER_IS_BETTER: dict[str, bool] = {
    "accuracy": True,
    "f1": True,
    "matthews_correlation": True,
    "pearsonr": True,
    "perplexity": False,
    "retention": True,
    "seqeval": True,
    "spearmanr": True,
    "squad": True,
}
"""Direction of each shipped metric. Where it is `False`, retention is `teacher / compressed`."""

_FOLDER = Path(__file__).parent


def metric_path(name: str) -> Path:
    """Folder of a shipped metric, for `evaluate.load(str(path))`.

    Args:
        name (`str`): A key of `HIGHER_IS_BETTER`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if no metric of that name ships.
    """
    if name not in HIGHER_IS_BETTER:
        raise ValueError(f"No metric {name!r} ships with hf_compress. Choose one of {', '.join(HIGHER_IS_BETTER)}.")
    return _FOLDER / name


def load_metric(name: str, *, timeout: float = 5.0) -> Any:
    """Loads a metric: a shipped one by name, any other from a path or from the Hub.

    A shipped name always means the shipped metric, so that scores do not depend on the network; inputs and outputs
    are named as those of the Hub's metric (perplexity excepted, which there runs a model). Any other name is left
    to `evaluate.load`, which runs code from the Hub. Without a network that falls back on what was downloaded before.

    Args:
        name (`str`): A key of `HIGHER_IS_BETTER`, a path, or a name on the Hub such as `"bleu"`.
        timeout (`float`, *optional*, defaults to `5.0`): Seconds to wait for the Hub's first answer.

    Returns:
        `evaluate.EvaluationModule`: Call its `compute(predictions=..., references=...)`.

    Raises:
        ValueError: if the name is neither shipped nor a path, and the Hub has no such metric or cannot be reached.
    """
    import evaluate

    if name in HIGHER_IS_BETTER:
        # In memory, because processes that load the same metric would else share a file.
        return evaluate.load(str(metric_path(name)), keep_in_memory=True)
    if Path(name).exists():
        return evaluate.load(name)
    is_online = _hub_answers(timeout)
    try:
        if is_online:
            return evaluate.load(name)
        with _offline(evaluate.config):
            return evaluate.load(name)
    except FileNotFoundError as error:
        reason = "the Hub has none of that name" if is_online else "the Hub cannot be reached"
        raise ValueError(
            f"No metric {name!r}: it is no path, does not ship with hf_compress, and {reason}. "
            f"Shipped are {', '.join(HIGHER_IS_BETTER)}; `load_metric` of one of these needs no network."
        ) from error


def _hub_answers(timeout: float) -> bool:
    """Whether the Hub answers in time; in a thread, because looking up a host's name knows no timeout."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    answered = threading.Event()

    def probe() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not a kind one
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


@contextmanager
def _offline(config: Any) -> Iterator[None]:
    """Keeps `evaluate` from the network: it tries three addresses with ten seconds each before it reads its cache."""
    was_offline = config.HF_EVALUATE_OFFLINE
    config.HF_EVALUATE_OFFLINE = True
    try:
        yield
    finally:
        config.HF_EVALUATE_OFFLINE = was_offline
