"""What is wrong in a recipe is refused, with its line and what to write instead."""

import pytest

from hf_compress.recipe.recipe import Recipe
from tests.recipe.test_recipe import HEAD, read_steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede: 1", r"line 4: a recipe has no 'sede': did you mean seed\?"),
        ("dataset: e", r"line 4: dataset stands beside data: write it below `data:`"),
        ("seed: x", r"line 4: seed is 'x': give a whole number\."),
        ("seed: -1", r"line 4: .*seed=-1 is out of range"),
        ("measure:\n  n_run: 3", r"line 5: measure has no 'n_run': did you mean n_runs\?"),
        ("measure:\n  batch_sizes: [8, x]", r"line 5: an item of batch_sizes of measure is 'x': give a whole number"),
        ("measure:\n\n  batch_sizes: [0]", r"line 6: measure: batch_sizes=\[0\]: give one size or more"),
        ("measure: 3", r"line 4: measure is 3: write `name: value` lines below it"),
    ],
)
def test_refused_beside_the_steps(text, message, tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(f"{HEAD}{text}\nsteps:\n  - prune\n")
    with pytest.raises(ValueError, match=f"^{file}, {message}"):
        Recipe.from_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ndata: d\nsteps: [prune]", r"line 2: data is 'd': write `name: value`"),
        ("model: m\ndata:\n  datset: d\nsteps: [prune]", r"line 3: data has no 'datset': did you mean dataset"),
        ("model: m\ndata:\n  dataset: d\n  max_length: 0\nsteps: [prune]", r"line 4: data: max_length=0"),
        ("model: 3\ndata:\n  dataset: d\nsteps: [prune]", r"line 1: model is 3: give a text, such as '3' in quotes"),
        (HEAD, r"a recipe needs a list of steps"),
        (HEAD + "steps: []", r"line 4: a recipe needs a list of steps"),
        (HEAD + "steps:\n  prune:\n    budget: 0.2", r"line 4: a recipe needs a list of steps"),
    ],
)
def test_refused_as_a_whole(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(text)


# The first step stands in line 5, its first setting in line 6.
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("  - prun:\n      budget: 0.2", r"line 5: there is no step 'prun': did you mean prune\?"),
        ("  - prune\n  - xyz", r"line 6: there is no step 'xyz': give one of finetune, student, "),
        ("  - prune:\n    budget: 0.2", r"line 6: budget stands beside prune .* indent its line by two spaces more"),
        ("  - prune:\n    quantize:", r"line 6: quantize stands beside prune .* begin its line with `- quantize:`"),
        ("  - 3", r"line 5: a step is 3: write its name with a colon"),
        ("  -", r"line 5: a step is empty"),
        ("  - [prune]", r"line 5: a step is a list"),
        ("  - {}", r"line 5: a step is a mapping"),
        ("  - prune: 0.2", r"line 5: prune is 0.2: write `name: value` lines below it"),
        ("  - prune:\n      budgt: 0.2", r"line 6: prune has no 'budgt': did you mean budget\?"),
        ("  - prune:\n      Use-Label: true", r"line 6: prune has no 'Use-Label': did you mean use_labels\?"),
        ("  - prune:\n      xyz: 1", r"line 6: prune has no 'xyz': give one of budget, cost, units"),
        ("  - prune:\n      seed: 1\n      budget: half", r"line 7: budget of prune is 'half': give a number\."),
        ("  - prune:\n      budget: true", r"budget of prune is true: give a number\."),
        ("  - prune:\n      budget:", r"budget of prune is empty: give a number\."),
        ("  - prune:\n      budget: 1e999", r"budget of prune is inf: give a number\."),
        (f"  - prune:\n      budget: {10**400}", r"line 6: budget of prune is 1000.*: give a number\."),
        (f"  - prune:\n      budget: {'9' * 5000}", r"line 6: 99.* is too long for a number"),
        ("  - prune:\n      steps: 1.5", r"steps of prune is 1.5: give a whole number\."),
        ("  - prune:\n      steps: true", r"steps of prune is true: give a whole number\."),
        ("  - prune:\n      use_labels: yes", r"use_labels of prune is 'yes': give true or false\."),
        ("  - prune:\n      use_labels: 1", r"use_labels of prune is 1: give true or false\."),
        ("  - prune:\n      units: heads", r"units of prune is 'heads': give a list, .*, such as \[heads\]\."),
        ("  - prune:\n      units: [heads, 1]", r"an item of units of prune is 1: give a text, such as '1' in quotes"),
        ("  - prune:\n      cost: mac", r"line 6: cost of prune is 'mac': did you mean macs\?"),
        ("  - prune:\n      n_texts: 3\n      budget: 2", r"line 7: prune: budget=2.0 is no share"),
        (
            "  - sparsify:\n      pattern: [4, 1, 2]",
            r"pattern of sparsify is a list: give a text or a list of 2",
        ),
        ("  - sparsify:\n      allocation: {a: b}", r"'a' in allocation of sparsify is 'b': give a number"),
        ("  - student:", r"line 5: student: layers='spread' needs num_layers"),
        ("  - student:\n      layers: 3", r"layers of student is 3: give spread or first or last or a list"),
        ("  - push:", r"line 5: push needs `repo_id:`"),
        ("  - quantize:\n      bits: 4", r"line 5: quantize needs a format: give one of int8, "),
        ("  - quantize:\n      format: int-8", r"line 6: format of quantize is 'int-8': did you mean int8"),
        ("  - quantize:\n      format: [int8]", r"line 6: format of quantize is a list: give one of int8, "),
        (
            "  - quantize:\n      bits: 4\n      format: int8",
            r"line 6: bits is an option of fixed-point",
        ),
        (
            "  - quantize:\n      format: fixed-point\n      bit: 4",
            r"line 7: quantize has no 'bit': did you mean bits\?",
        ),
        ("  - quantize:\n      format: fixed-point\n      bits: 1", r"line 7: quantize: bits=1 are no fixed-point"),
        ("  - quantize:\n      format: int8\n      options: {}", r"line 7: quantize has no 'options': give one of"),
        (
            "  - finetune:\n      arguments:\n        adam_beta1: 0.9\n        learning_rate: 1",
            r"line 8: finetune: arguments has learning_rate, which the step has too",
        ),
        (
            "  - finetune:\n      arguments:\n        seed: 1",
            r"line 7: finetune: arguments has seed, which",
        ),
    ],
)
def test_refused_with_the_line_and_the_remedy(lines, message):
    with pytest.raises(ValueError, match=message):
        read_steps(*lines.splitlines())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("        - kind: hidden", r"line 9: kind of an item of terms of distil is 'hidden': did you mean hidden_mse"),
        ("        - weight: 1", r"line 9: an item of terms of distil needs `kind:`"),
        (
            "        - kind: pkd\n          wieght: 1",
            r"line 10: an item of .* has no 'wieght': did you mean weight",
        ),
        ("        - kind: pkd\n          weight: -1", r"line 10: .*weight of pkd=-1.0 must be 0 or above"),
        ("        - kind: pkd\n          layers: [[1, a]]", r"an item of layers of .* is 'a': give a whole number"),
        ("        - pkd", r"line 9: an item of terms of distil is 'pkd': give a mapping of its fields"),
        ("      stages:\n        - epochs: 1\n        - alpha: 2", r"line 11: an item of stages of distil: alpha=2.0"),
    ],
)
def test_refused_in_terms_and_stages(lines, message):
    terms = [] if "stages" in lines else ["      terms:"]
    with pytest.raises(ValueError, match=message):
        read_steps("  - student:", "      num_layers: 3", "  - distil:", *terms or [""], *lines.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nmodel: n", r"line 2: model was given in line 1 already: leave one of them out"),
        ("steps:\n  - prune:\n      a: 1\n      b: 2\n      a: 3", r"line 5: a was given in line 3 already"),
        ("a: !!python/object/apply:os.system [ls]\n", r"line 1: tags \(!\) are not read"),
        ("a: 1\nb: !!str 3", r"line 2: tags \(!\) are not read"),
        ("a: &x [1]\nb: *x", r"line 1: anchors \(&\) and aliases \(\*\) are not read"),
        ("b: 1\na: *x", r"line 2: anchors \(&\) and aliases \(\*\) are not read"),
        ("a: " + "[" * 50 + "\n", r"line 1: lists and mappings are nested more than 20 deep"),
        ("? [a]\n: 1", r"line 1: a key is a list or a mapping"),
        ("<<: {model: m}\nb: 1", r"line 1: a recipe has no '<<'"),
        ("a: [\n", r"line 2: expected"),
        ("\n\tmodel: m\n", r"line 2: found character '\\t'"),
        ("a: 1\n---\nb: 1", r"expected a single document"),
        ("a: \x00\n", r"is no YAML: unacceptable character"),
        ("- prune\n- recover", r"is no mapping"),
        ("\n# nothing\n", r"is no mapping"),
        ("a: 1\n" * 200_001, r"has more than 1 MB"),
    ],
)
def test_yaml_that_is_not_read(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(text)


def test_files_that_are_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*none.yaml: give the path"):
        Recipe.from_yaml(str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes("model: ä\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.yaml is no text in UTF-8"):
        Recipe.from_yaml(tmp_path / "latin.yaml")
    (tmp_path / "marked.yaml").write_bytes(("\ufeff" + HEAD + "steps:\n  - prune\n").encode())
    assert Recipe.from_yaml(tmp_path / "marked.yaml") == read_steps("  - prune")
