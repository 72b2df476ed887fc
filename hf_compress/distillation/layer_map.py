"""Which layer of the teacher teaches which layer of the student."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

LayerRule = Literal["uniform", "last", "skip"]
LayerMap = LayerRule | Sequence[Sequence[int]]


def map_layers(
    layers: LayerMap, n_student: int, n_teacher: int, allow_embeddings: bool = False
) -> list[tuple[int, int]]:
    """Pairs of layers, numbered from 1 as in `hidden_states`, where 0 is the embeddings' output.

    Args:
        layers (`str` or sequence of pairs): The pairs `(student layer, teacher layer)`, where -1 is the last layer; or
            a rule. `"uniform"`: layer m learns from `m * n_teacher / n_student`, rounded down (TinyBERT, Jiao et al.,
            2020, arXiv:1909.10351, section 3.1). `"last"`: the student's layers learn from as many last ones of the
            teacher. `"skip"`: as `"uniform"`, but the last layer learns from the teacher's outputs alone (PKD-skip,
            Sun et al., 2019, arXiv:1908.09355, section 3.2).
        n_student (`int`): Layers of the student.
        n_teacher (`int`): Layers of the teacher.
        allow_embeddings (`bool`, *optional*, defaults to `False`): Whether a pair may name number 0.

    Returns:
        `list[tuple[int, int]]`: Pairs of numbers from 0 or 1 to the number of layers, in the order given.

    Raises:
        ValueError: if there is no such rule, a pair is malformed, out of range or given twice, or no pair is left.
    """
    if not isinstance(layers, str):
        return _check_pairs(layers, n_student, n_teacher, allow_embeddings)
    if layers not in get_args(LayerRule):
        raise ValueError(
            f"layers={layers!r} is no rule for mapping layers: give one of {list(get_args(LayerRule))}, or pairs "
            "such as [[1, 2], [2, 4]]."
        )
    if layers == "last":
        if n_student > n_teacher:
            raise ValueError(
                f'layers="last" gives each of the student\'s {n_student} layers its own of the teacher, which has '
                f'only {n_teacher}: use "uniform", or give pairs.'
            )
        return [(m, n_teacher - n_student + m) for m in range(1, n_student + 1)]
    # A student deeper than its teacher has first layers that would round down to the embeddings.
    pairs = [(m, max(1, m * n_teacher // n_student)) for m in range(1, n_student + 1)]
    if layers == "skip":
        if n_student == 1:
            raise ValueError(
                'layers="skip" leaves out the last layer, and the student has no other: use "uniform", or give pairs.'
            )
        return pairs[:-1]
    return pairs


def describe(pairs: Sequence[tuple[int, int]]) -> str:
    """A map of layers in words: `"1<-2, 2<-4, 3<-6"`.

    Args:
        pairs (sequence of pairs): As `map_layers` gives them.

    Returns:
        `str`: Of each pair the student's layer, then the teacher's.
    """
    return ", ".join(f"{student}<-{teacher}" for student, teacher in pairs)


def _check_pairs(pairs: Any, n_student: int, n_teacher: int, allow_embeddings: bool) -> list[tuple[int, int]]:
    if not isinstance(pairs, Sequence) or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(
            f"layers={pairs!r} is no list of pairs of whole numbers: give a layer of the student and one of the "
            "teacher for each, such as [[1, 2], [2, 4]]."
        )
    if not pairs:
        raise ValueError(f'layers={pairs!r} maps no layer, so nothing would be learned: give pairs, or use "uniform".')
    found = [
        (
            _number(student, n_student, "student", allow_embeddings),
            _number(teacher, n_teacher, "teacher", allow_embeddings),
        )
        for student, teacher in pairs
    ]
    twice = sorted({pair for pair in found if found.count(pair) > 1})
    if twice:
        raise ValueError(
            f"layers={[list(pair) for pair in pairs]} holds {describe(twice)} more than once, which would count it "
            "double: name each pair once, and raise the weight instead."
        )
    return found


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
    )


def _number(layer: int, total: int, model: str, allow_embeddings: bool) -> int:
    first = 0 if allow_embeddings else 1
    number = layer + total + 1 if layer < 0 else layer
    # Counted from the end, the embeddings have no number: -1 - total is a mistake, not a way to say 0.
    if not first <= number <= total or (layer < 0 and number == 0):
        reason = " The embeddings' output, 0, is not mapped here." if layer == 0 and not allow_embeddings else ""
        raise ValueError(
            f"Layer {layer} of the {model} does not exist among its {total} layers.{reason} "
            f"Give {first} to {total}, or -1 to -{total} from the end."
        )
    return number
