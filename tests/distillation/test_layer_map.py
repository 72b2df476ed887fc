import pytest

from hf_compress.distillation.layer_map import describe, map_layers


@pytest.mark.parametrize(
    ("layers", "n_student", "n_teacher", "expected"),
    [
        ("uniform", 3, 6, [(1, 2), (2, 4), (3, 6)]),
        ("uniform", 4, 6, [(1, 1), (2, 3), (3, 4), (4, 6)]),
        ("uniform", 6, 3, [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)]),
        ("last", 3, 6, [(1, 4), (2, 5), (3, 6)]),
        ("skip", 3, 6, [(1, 2), (2, 4)]),
        ([[1, 2], [2, 2]], 2, 6, [(1, 2), (2, 2)]),
        ([(-1, -1), (1, -6)], 2, 6, [(2, 6), (1, 1)]),
    ],
)
def test_pairs_of_layers(layers, n_student, n_teacher, expected):
    assert map_layers(layers, n_student, n_teacher) == expected


@pytest.mark.parametrize("layers", ["uniform", "last"])
@pytest.mark.parametrize(("n_student", "n_teacher"), [(1, 1), (1, 12), (5, 12), (12, 12)])
def test_rules_map_each_layer_of_the_student_once_and_the_last_to_the_last(layers, n_student, n_teacher):
    students, teachers = zip(*map_layers(layers, n_student, n_teacher), strict=True)
    assert list(students) == list(range(1, n_student + 1))
    assert len(set(teachers)) == n_student
    assert teachers[-1] == n_teacher


def test_embeddings_are_number_0_only_where_they_are_allowed():
    assert map_layers([[0, 0], [1, 2]], 1, 2, allow_embeddings=True) == [(0, 0), (1, 2)]
    with pytest.raises(ValueError, match="Layer 0 of the student .* Give 1 to 3"):
        map_layers([[0, 1]], 3, 6)


@pytest.mark.parametrize("allow_embeddings", [False, True])
@pytest.mark.parametrize("pair", [[4, 1], [1, 7], [-4, 1], [1, -7]])
def test_a_layer_that_does_not_exist_is_named(pair, allow_embeddings):
    number, model = (pair[0], "student") if abs(pair[0]) > 1 else (pair[1], "teacher")
    with pytest.raises(ValueError, match=f"Layer {number} of the {model}"):
        map_layers([pair], 3, 6, allow_embeddings)


@pytest.mark.parametrize("layers", [[1, 2], [[1]], [[1, 2, 3]], [[1, "2"]], [[1, 2.0]], [["1", "2"]], [[True, 1]], 3])
def test_malformed_pairs_are_refused(layers):
    with pytest.raises(ValueError, match="no list of pairs"):
        map_layers(layers, 3, 6)


def test_a_pair_may_not_count_twice():
    with pytest.raises(ValueError, match="3<-6 more than once"):
        map_layers([[3, 6], [-1, -1]], 3, 6)


@pytest.mark.parametrize(
    ("layers", "n_student", "n_teacher", "message"),
    [
        ("skip", 1, 6, 'use "uniform"'),
        ([], 3, 6, "maps no layer"),
        ("last", 7, 6, "which has only 6"),
        ("first", 3, 6, "'uniform', 'last', 'skip'"),
    ],
)
def test_maps_that_cannot_be_made_are_refused(layers, n_student, n_teacher, message):
    with pytest.raises(ValueError, match=message):
        map_layers(layers, n_student, n_teacher)


def test_a_map_in_words():
    assert describe(map_layers("uniform", 3, 6)) == "1<-2, 2<-4, 3<-6"
