"""The exercises: right answers pass whatever the data, wrong ones never, and are told why."""

import importlib
from pathlib import Path

import pytest

from batchnorm import exercises
from batchnorm.errors import ArgumentError
from batchnorm.exercises.exercise import Text, Wrong
from right_answers import RIGHT
from wrong_answers import WRONG

ALL = exercises.discover()
each = pytest.mark.parametrize("number", ALL)

#: Texts of the exercises that are no hints, but what was expected or came.
NO_HINT = {
    *("NO_GRAPH", "GRAPH", "_OUTPUT_GRAD", "_NO_OUTPUT_GRAD", "_VALUE_ERROR", "_NO_ERROR"),
    *("_MESSAGE", "_EMPTY", "_UNTOUCHED", "_TOUCHED", "_BUFFER", "_NO_BUFFER", "_COUNT_IS"),
}


@pytest.fixture
def graded(tmp_path):
    def grade(number, code, seed=0):
        path = tmp_path / "my.py"
        path.write_text(code)
        return exercises.grade(ALL[number], path, seed)

    return grade


def hints(outcomes):
    return [outcome.wrong.hint for outcome in outcomes if outcome.wrong and outcome.wrong.hint]


def test_they_are_numbered_without_gaps():
    assert list(ALL) == list(range(1, 11))


@each
def test_both_languages_are_there(number):
    exercise = ALL[number]
    texts = [exercise.title, exercise.task, exercise.summary, *(c.name for c in exercise.checks)]
    for text in texts:
        assert any("一" <= letter <= "鿿" for letter in text.zh)
        assert not any("一" <= letter <= "鿿" for letter in text.en)
    assert len(exercise.checks) >= 3
    # What is not prose reads the same in both.
    assert formulas(exercise.task.zh) == formulas(exercise.task.en)


def formulas(task):
    """What stands in code marks, in the order of the alphabet: sentences are built differently."""
    return sorted({" ".join(code.split()) for code in task.split("`")[1::2]})


@each
def test_the_solution_is_right_whatever_the_data(number, graded):
    for seed in range(40):
        outcomes = graded(number, ALL[number].solution, 997 * seed)
        assert [outcome.wrong for outcome in outcomes] == [None] * len(ALL[number].checks)


@pytest.mark.parametrize(("number", "code"), RIGHT)
def test_other_right_answers_pass_whatever_the_data(number, code, graded):
    for seed in range(0, 40000, 1000):
        outcomes = graded(number, code, seed)
        assert not [str(outcome.wrong) for outcome in outcomes if outcome.wrong], seed


@each
def test_data_are_those_of_the_seed(number, graded):
    codes = [code for n, _, code in WRONG if n == number][:3]
    first, again, other = (
        [str(outcome.wrong) for code in codes for outcome in graded(number, code, seed)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert other != first


@each
@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_starting_file_is_python_and_not_an_answer(number, language, graded):
    start = ALL[number].starting_file(language)
    assert ALL[number].title.said(language) in start
    assert ALL[number].summary.said(language) in start
    assert "{" not in start
    outcomes = graded(number, start)
    assert any(outcome.wrong for outcome in outcomes)
    if number != 3:  # which is to be mended
        assert all("not written yet" in outcome.wrong.came.en for outcome in outcomes)


@pytest.mark.parametrize(("number", "hint", "code"), WRONG, ids=[f"{n} {h}" for n, h, _ in WRONG])
def test_wrong_answers_are_refused_and_recognised(number, hint, code, graded):
    for seed in range(0, 12000, 1000):
        outcomes = graded(number, code, seed)
        assert any(outcome.wrong for outcome in outcomes), seed
        if hint is None:
            continue
        said = [found.en for found in hints(outcomes)]
        assert any(hint in text for text in said), (seed, said, [str(o.wrong) for o in outcomes])


@each
def test_three_wrong_answers_each_with_a_hint_of_its_own(number):
    assert len({hint for n, hint, _ in WRONG if n == number and hint}) >= 3


@each
def test_every_hint_is_tried(number, graded):
    (name,) = (path.stem for path in package().glob(f"e{number:02}_*.py"))
    module = vars(importlib.import_module(f"batchnorm.exercises.{name}"))
    every = {key: text for key, text in module.items() if isinstance(text, Text)}
    tried = [hint for n, hint, _ in WRONG if n == number and hint]
    missed = [
        key
        for key, text in every.items()
        if key not in NO_HINT and not any(hint in text.en for hint in tried)
    ]
    assert not missed


def package():
    return Path(exercises.__file__).parent


def test_wrong_says_what_was_expected_and_what_came():
    wrong = Wrong(Text("甲", "a"), Text("乙", "b"))
    assert str(wrong) == "expected a, got b"


def test_what_is_not_there_is_an_error(tmp_path):
    for number in (0, 11, -1):
        with pytest.raises(ArgumentError, match="1 to 10"):
            exercises.find(number)
    with pytest.raises(ArgumentError, match="cannot be read: No such file"):
        exercises.grade(ALL[1], tmp_path / "no.py", 0)
    with pytest.raises(ArgumentError, match="is no file"):
        exercises.grade(ALL[1], tmp_path, 0)
