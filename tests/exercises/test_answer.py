"""Answers that do not even compute: each ends in a message with the reader's own line."""

import contextlib
import io

import pytest
import torch

from batchnorm import exercises

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
