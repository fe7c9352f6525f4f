"""Answers that do not even compute: each ends in a message with the reader's own line."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from batchnorm import exercises
from batchnorm.errors import ArgumentError
from batchnorm.exercises.answer import copied, identical
from wrong_answers import made

FORWARD = exercises.find(1)
RIGHT = FORWARD.solution


@pytest.fixture
def refused(tmp_path):
    """The first refusal: what was expected, what came, the hint, the line."""

    def grade(code, number=1):
        path = tmp_path / "my.py"
        path.write_bytes(code if isinstance(code, bytes) else code.encode())
        outcomes = exercises.grade(exercises.find(number), path, 0)
        outcome = next(outcome for outcome in outcomes if outcome.wrong)
        wrong = outcome.wrong
        return wrong.expected.en, wrong.came.en, wrong.hint.en if wrong.hint else "", outcome.line

    return grade


@pytest.mark.parametrize(
    ("body", "came", "line"),
    [
        ("def forward(x, gamma, beta, eps=1e-5):\n    return x +\n", "SyntaxError: invalid", 2),
        ("def forward(x, gamma, beta, eps=1e-5):\nreturn x\n", "IndentationError: expected", 2),
        (b"def forward(x, gamma, beta, eps=1e-5):\n    return '\xff'\n", "SyntaxError: ", 2),
        (b"def forward(x):\0\n    pass\n", "SyntaxError: source code", None),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing", 1),
        ("x = 1\n\nprint(x / 0)\n", "ZeroDivisionError: division by zero", 3),
        ("import sys\nsys.exit(0)\n", "ended by SystemExit", 2),
        ("def forward(x, gamma, beta, eps=1e-5):\n\n    return x.mead(0)\n", "no attribute", 3),
        ("def forward(x, gamma, beta, eps=1e-5):\n    exit()\n", "ended by SystemExit", 2),
        ("def forward(x, gamma, beta, eps=1e-5):\n    return forward(x, gamma, beta)\n",
         "RecursionError: maximum", 2),
        # Their line, though torch raised; and that of the function where no line of theirs did.
        ("def forward(x, gamma, beta, eps=1e-5):\n    y = x\n    return y @ y\n", "mat1", 3),
        ("def g(x):\n    return x @ x\n\ndef forward(x, gamma, beta, eps=1):\n    return g(x)\n",
         "mat1", 2),
        ("\ndef forward(x):\n    return x\n", "TypeError: forward() takes 1 positional", 2),
        ("def forward(x, gamma, beta, eps=1e-5):\n    x - 1\n", "None", 1),
        ("def forward(x, gamma, beta, eps=1e-5):\n    return 3.0\n", "float: 3.0", 1),
        ("def forward(x, gamma, beta, eps=1e-5):\n    return x.tolist()\n", "list: [[", 1),
        ("def forward(x, gamma, beta, eps=1e-5):\n    return x.T\n", "(2, 6)", 1),
        ("def forward(x, gamma, beta, eps=1e-5):\n    return x.to_sparse()\n", "", 1),
        ("def forward(x, gamma, beta, eps=1e-5):\n    x -= x.mean(0)\n    return x\n",
         "changed in place", 1),
    ],
)  # fmt: skip
def test_the_message_and_the_line(body, came, line, refused):
    expected, found, _, where = refused(body)
    assert expected
    assert came in found
    assert where == line


IN_PLACE = [
    (2, exercises.find(2).solution + "    x.zero_()\n", (3, 3, 3)),
    (6, made(6, ("    return", "    a[1].zero_()\n    return")), (1, 1, 1, 1)),
    (6, made(6, ("    return", "    b[2].add_(1)\n    return")), (2, 2, 2, 2)),
    (7, made(7, ("torch.square(batch - own)", "torch.square(batch.sub_(own))")), (1, 1, 1)),
    (7, "import torch\ndef pooled(batches):\n    for b in batches:\n        b.zero_()\n"
     "    return torch.zeros(3).double(), torch.zeros(3).double()\n", (1, 1, 1)),
    (7, "import torch\ndef pooled(batches):\n    every = []\n    while batches:\n"
     "        every.append(batches.pop())\n"
     "    return torch.cat(every).mean(0), torch.cat(every).var(0)\n", (1, 1, 1)),
    (7, made(7, ("    return", "    batches[:1] = [None]\n    return")), (1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("number", "code", "arguments"), IN_PLACE)
def test_nothing_is_written_into_the_arguments(number, code, arguments, tmp_path):
    """Inside lists and tuples as well, and where others are to be written into."""
    (tmp_path / "my.py").write_text(code)
    outcomes = exercises.grade(exercises.find(number), tmp_path / "my.py", 0)
    assert [outcome.wrong and outcome.wrong.expected.en for outcome in outcomes] == [
        f"argument {argument} left as it was" for argument in arguments
    ]


def test_what_is_left_as_it_was():
    nan, inf, zero = (torch.tensor([1.0, value]) for value in (torch.nan, torch.inf, 0.0))
    mask = torch.tensor([True, False])
    for value in (nan, inf, zero, mask, (3, nan), [nan, (inf, mask)], [], None, 0.1):
        assert identical(value, copied(value))
    for value, other in ((nan, zero), (zero, nan), (nan, nan.double()), (mask, ~mask)):
        assert not identical(value, copied(other))
        assert not identical([mask, value], copied([mask, other]))
    assert not identical(zero, copied(zero[None]))
    assert not identical([zero, zero], copied([zero]))


def hint_by_check(number, code, path):
    path.write_text(code)
    outcomes = exercises.grade(exercises.find(number), path, 0)
    return [(o.wrong.hint.en if o.wrong.hint else "") if o.wrong else None for o in outcomes]


@pytest.mark.parametrize("number", [5, 6, 7, 10])
@pytest.mark.parametrize("body", ["raise NotImplementedError", "raise ValueError('bug')"])
def test_a_hint_is_for_what_it_explains(number, body, tmp_path):
    """Not for an answer that fails with the easy data, too."""
    code = exercises.find(number).start.replace("raise NotImplementedError", body)
    assert not any(hint_by_check(number, code, tmp_path / "my.py"))


def test_a_hint_of_a_hard_check_is_not_that_of_an_easy_one(tmp_path):
    path = tmp_path / "my.py"
    keepdim = made(5, (".mean(0)).mean(0)", ".mean(0)).mean(0, keepdim=True)"))
    assert hint_by_check(5, keepdim, path) == ["", "", "", ""]
    no_between = hint_by_check(6, made(6, (" + a[0] * share * d**2", "")), path)
    assert all("M_a + M_b alone" in hint for hint in (no_between[0], no_between[3]))
    no_second = hint_by_check(6, made(6, ("a[2] + b[2]", "a[2]")), path)
    assert "billion" not in no_second[3]


@pytest.mark.parametrize(
    ("first", "every"),
    [
        ("n = len(batches)", "every = torch.cat([*batches])"),
        ("m = [b.mean(0) for b in batches]", "every = torch.cat([*batches])"),
        # What is empty gives NaN, as a batch of one sample does.
        (
            "mean = sum(torch.stack([b.sum(0), 0 * b[0] + len(b)]) for b in batches)",
            "every = torch.cat([torch.zeros(0, 3).double(), *batches])\n"
            "    return mean[0] / mean[1], every.var(0)",
        ),
    ],
)
def test_what_is_read_twice(first, every, tmp_path):
    code = f"""
import torch
def pooled(batches):
    {first}
    {every}
    return every.mean(0), every.var(0)
"""
    hints = hint_by_check(7, code, tmp_path / "my.py")
    assert hints[:2] == [None, None]
    assert "can be read once" in hints[2]


def test_what_is_expected_is_not_made_of_what_was_written_into(tmp_path):
    code = made(
        7,
        (
            "    count,",
            "    if not isinstance(batches, list):\n"
            "        return tuple(0 * b.zero_()[0] for b in batches)[:2]\n    count,",
        ),
    )
    assert [hint is None for hint in hint_by_check(7, code, tmp_path / "my.py")] == [
        True, True, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "hinted"),
    [
        ("dx = grad_outpt", False),
        ("raise RuntimeError('gradients')", False),
        ("x.requires_grad_().sum().backward()", True),
        ("torch.autograd.grad(x, x, dy)", True),
    ],
)
def test_autograd_is_spoken_of_where_it_was_asked(line, hinted, tmp_path):
    code = f"import torch\ndef backward(dy, x, gamma, eps=1e-5):\n    {line}\n"
    assert [bool(hint) for hint in hint_by_check(10, code, tmp_path / "my.py")] == [hinted] * 3


def test_names(refused):
    assert refused("def foward(x): pass\n") == (
        "a file that defines forward", "no forward", "Is foward what was meant?", None
    )  # fmt: skip
    assert refused("")[1] == "no forward"
    assert refused("forward = 3\n")[1] == "forward is int, which cannot be called"


def test_the_dtype(refused):
    code = RIGHT.replace("mean = x.mean(0)", "x = x.double()\n    mean = x.mean(0)")
    expected, came, hint, _ = refused(code)
    assert (expected, came) == ("y in torch.float32", "torch.float64")
    assert "x.dtype" in hint
    # Far from zero as well, where whatever is not recognised is put down to rounding.
    wide = "def variance(x):\n    return x.double().var(0, correction=0).to({dtype})\n"
    late = "import torch\n" + wide.format(dtype="torch.float64 if x.mean() > 1e3 else x.dtype")
    assert "x.dtype" in refused(late, 5)[2]


def test_digits_are_as_many_as_tell_two_numbers_apart(refused):
    code = exercises.find(6).solution.replace("a[1] + share", "(1 + 1e-7) * a[1] + share")
    expected, came, *_ = refused(code, 6)
    assert expected.split(" = ")[1] != came.split(" (")[0]


def test_how_many_results(refused):
    code = exercises.find(10).solution.replace("dx, (dy * x_hat).sum(0), dy.sum(0)", "dx, dx")
    assert refused(code, 10)[:2] == ("3 results: dx, dgamma, dbeta", "tuple (2)")


def test_odd_layers_are_refused_too(refused):
    code = "class BatchNorm:\n    def __init__(self, features):\n        pass\n"
    assert "not callable" in refused(code, 3)[1]
    bare = "from torch import nn\n\nclass BatchNorm(nn.Identity):\n    pass\n"
    assert refused(bare, 3)[0].startswith("y[")


def test_what_an_answer_does_stays_with_it(tmp_path, capsys, recwarn):
    """Prints are kept for the report, warnings are not shown, autograd is on again."""
    path = tmp_path / "my.py"
    noise = "import warnings\nprint('read')\nwarnings.warn('w')\ntorch.set_grad_enabled(False)\n"
    body = RIGHT.replace("    mean =", "    print(x.shape)\n    warnings.warn('w')\n    mean =")
    path.write_text(body.replace("import torch\n", "import torch\n" + noise, 1))
    outcomes = exercises.grade(FORWARD, path, 0)
    assert [outcome.wrong for outcome in outcomes] == [None] * 3
    assert outcomes[0].printed.startswith("read\ntorch.Size([")
    assert outcomes[1].printed.startswith("torch.Size([")
    assert torch.is_grad_enabled()
    assert capsys.readouterr() == ("", "")
    assert not recwarn.list


def test_the_default_dtype_stays_with_it_too(tmp_path):
    code = exercises.find(2).solution
    setting = "import torch\ntorch.set_default_dtype(torch.float64)\n"
    (tmp_path / "my.py").write_text(code.replace("import torch\n", setting, 1))
    outcomes = exercises.grade(exercises.find(2), tmp_path / "my.py", 0)
    assert torch.get_default_dtype() == torch.float32
    assert [outcome.wrong for outcome in outcomes] == [None] * 3


def test_the_line_is_that_of_python_and_of_what_was_read(tmp_path):
    """Form feeds and U+2028 begin no line; the file may be gone by the time of the report."""
    path = tmp_path / "my.py"
    code = "import os\n\f\n# \u2028\nos.remove(__file__)\n1 / 0\n"
    path.write_text(code, encoding="utf-8")
    (outcome,) = exercises.grade(FORWARD, path, 0)
    assert (outcome.line, outcome.source) == (5, "1 / 0")
    path.write_text("")
    (outcome,) = exercises.grade(FORWARD, path, 0)
    assert (outcome.line, outcome.source) == (None, "")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read")
def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ArgumentError, match="/proc/self/mem, which cannot be read: Input/output"):
        exercises.grade(FORWARD, Path("/proc/self/mem"), 0)


def test_an_edited_file_is_read_again(tmp_path):
    """Two edits in a second, of the same length: nothing may be cached."""
    path = tmp_path / "my.py"
    for code, right in ((RIGHT, True), (RIGHT.replace("mean(0)", "mean(1)"), False)):
        path.write_text(code)
        outcomes = exercises.grade(FORWARD, path, 0)
        assert all(outcome.wrong is None for outcome in outcomes) == right
    assert [entry.name for entry in tmp_path.iterdir()] == ["my.py"]


def test_an_answer_may_have_dataclasses_neighbours_and_a_main_part(tmp_path):
    (tmp_path / "of_before.py").write_text(RIGHT)
    (tmp_path / "my.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from of_before import forward\n\n@dataclass\nclass Point:\n    x: int = 0\n\n"
        "if __name__ == '__main__':\n    raise ValueError\n"
    )
    outcomes = exercises.grade(FORWARD, tmp_path / "my.py", 0)
    assert all(outcome.wrong is None for outcome in outcomes)


def test_an_answer_is_compiled_by_its_own_rules(tmp_path):
    """Not with the `from __future__` of the module that compiles it."""
    (tmp_path / "my.py").write_text(
        RIGHT + "\ndef f(x: int): ...\nassert f.__annotations__ == {'x': int}\n"
    )
    outcomes = exercises.grade(FORWARD, tmp_path / "my.py", 0)
    assert all(outcome.wrong is None for outcome in outcomes)


def test_ctrl_c_is_not_a_wrong_answer(tmp_path):
    path = tmp_path / "my.py"
    path.write_text("raise KeyboardInterrupt\n")
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(KeyboardInterrupt):
        exercises.grade(FORWARD, path, 0)
