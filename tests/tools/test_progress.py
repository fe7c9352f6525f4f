"""A bar for who asks for one; a function of the user's own; nothing else is printed."""

import io
import sys
from contextlib import redirect_stderr

import pytest
import torch

from batchnorm import BatchNorm, MissingDependencyError, recalibrate
from batchnorm.tools.progress import progress_of

BATCHES = torch.randn(40, 3).split(10)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_a_bar_in_a_terminal(terminal):
    with redirect_stderr(terminal):
        recalibrate(BatchNorm(3), BATCHES, progress=True)
    assert "Recalibrating" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


@pytest.mark.parametrize("progress", [True, False])
def test_silence_elsewhere(capsys, progress):
    recalibrate(BatchNorm(3), BATCHES, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_silence_in_a_terminal_unless_asked_for(terminal):
    with redirect_stderr(terminal):
        recalibrate(BatchNorm(3), BATCHES)
    assert terminal.getvalue() == ""


def test_a_bar_goes_away_with_an_exception(terminal):
    def fail():
        with progress_of("Working", True) as tell:
            tell(1, 2)
            raise ZeroDivisionError

    with redirect_stderr(terminal):
        with pytest.raises(ZeroDivisionError):
            fail()
        with progress_of("Working", True) as tell:  # rich allows one at a time
            tell(1, None)
    assert "1/2" in terminal.getvalue()


def test_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    layer = BatchNorm(3)
    with pytest.raises(MissingDependencyError, match="pip install rich"):
        recalibrate(layer, BATCHES, progress=True)
    assert layer.num_batches_tracked == 0
    recalibrate(layer, BATCHES)
