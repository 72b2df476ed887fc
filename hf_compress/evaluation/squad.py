"""Exact match and F1 of answers as text (Rajpurkar et al. 2016, *SQuAD*, section 6.1)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, without English articles, single spaces.

    Args:
        text (`str`): An answer.

    Returns:
        `str`: What is compared.
    """
    without_punctuation = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers after normalisation, else 0.

    Args:
        prediction (`str`): The predicted answer.
        answers (`Sequence[str]`): The accepted answers; none if the right one is empty, as in SQuAD 2.

    Returns:
        `float`: 0 or 1.
    """
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers or [""]})


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, for the accepted answer that fits best.

    Args:
        prediction (`str`): The predicted answer.
        answers (`Sequence[str]`): The accepted answers; none if the right one is empty, as in SQuAD 2.

    Returns:
        `float`: Between 0 and 1.
    """
    if not answers:
        return exact_match(prediction, answers)
    return max(_token_f1(normalize_answer(prediction).split(), normalize_answer(a).split()) for a in answers)


def _token_f1(predicted: list[str], expected: list[str]) -> float:
    n_common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * n_common / (len(predicted) + len(expected)) if n_common else 0.0
