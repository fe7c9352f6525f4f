"""What the page's events do, called as the page calls them."""

import pytest

pytest.importorskip("gradio")

import gradio as gr

from batchnorm.playground.app import INPUTS, Playground
from batchnorm.playground.settings import Settings

SMALL = Settings(depth=1, width=8, steps=5000)


@pytest.fixture(scope="module")
def playground():
    return Playground()


def started(playground, tab, settings=SMALL):
    """A training of a tab with its first frame; and its run."""
    request = gr.Request(session_hash=tab)
    training = playground.start(request, "en", *(getattr(settings, name) for name in INPUTS))
    frame = next(training)
    assert "Step 0 of 5000." in frame[0]
    return request, training, playground.runs[tab]


def interactive(frame):
    return [update["interactive"] for update in frame[2:]]


def test_stop_ends_the_training_of_its_tab_alone(playground):
    one, first, run = started(playground, "one")
    other, second, untouched = started(playground, "other")
    playground.stop(one)
    last = list(first)[-1]
    assert "Stopped at step 0 of 5000." in last[0]
    # Start, Stop, Reset, language.
    assert interactive(last) == [True, False, True, True]
    assert run.state == "stopped"
    assert len(run.history) == 1
    assert interactive(next(second)) == [False, True, False, False]
    assert untouched.history[-1].step > 0
    playground.leave(one)
    playground.leave(other)
    assert playground.runs == {}
    assert "Stopped at step" in list(second)[-1][0]


def test_another_start_ends_the_first(playground):
    request, first, run = started(playground, "one")
    _, second, again = started(playground, "one")
    assert again is not run
    assert "Stopped at step 0 of 5000." in list(first)[-1][0]
    assert playground.runs["one"] is again
    assert again.state == "running"
    playground.leave(request)
    list(second)


def test_a_refused_start_leaves_a_run_as_it_is(playground):
    request, training, run = started(playground, "one")
    values = ["abc" if name == "rate" else getattr(SMALL, name) for name in INPUTS]
    (frame,) = playground.start(request, "zh", *values)
    assert "学习率：应为 0.0001 到 100 之间的数，得到的是“abc”。" in frame[0]
    assert playground.runs["one"] is run
    assert not run.stopped.is_set()
    playground.leave(request)
    list(training)
