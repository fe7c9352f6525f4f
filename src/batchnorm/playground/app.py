"""The page: what stands where, and what its buttons do."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from batchnorm.lab.data import load
from batchnorm.playground import drawing
from batchnorm.playground.presets import PRESETS
from batchnorm.playground.settings import CHOICES, RANGES, SettingError, Settings
from batchnorm.playground.texts import (
    LANGUAGES,
    TEXTS,
    Words,
    choices,
    paragraph,
    progress,
    refusal,
)
from batchnorm.playground.training import Snapshot, train

#: Seconds of training between two frames: drawing one takes a third as long.
PAUSE = 0.5

#: In the order of the page. The learning rate has two: a slider over decades, which writes into the
#: box that counts.
CONTROLS = ("depth", "width", "activation", "init", "rate", "exponent", "batch", "steps", "seed")
INPUTS = tuple(name for name in CONTROLS if name != "exponent")
SLIDERS = ("depth", "width", "batch", "steps")

BUTTONS = ("start", "stop", "reset")

FIRST = next(iter(PRESETS))

CSS = Path(__file__).with_name("page.css")


@dataclass
class Run:
    """One training run of a tab."""

    settings: Settings
    history: list[Snapshot] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    state: str = "running"


class Playground:
    """What the page's events call. A tab has one run at a time, and takes it along when it goes."""

    def __init__(self) -> None:
        self.data = load("digits")
        self.runs: dict[str, Run] = {}

    def start(self, request: gr.Request, language: str, *values: Any) -> Iterator[list[Any]]:
        """Train, and yield what changes on the page; with impossible values, say so instead."""
        words = TEXTS[language]
        try:
            settings = Settings.read(dict(zip(INPUTS, values, strict=True)))
        except SettingError as error:
            refused = paragraph([refusal(words, error)], "refused")
            yield [refused, gr.skip(), *_enabled(running=False)]
            return
        self.stop(request)
        run = self.runs[str(request.session_hash)] = Run(settings)
        shown = -math.inf
        for shot in train(settings, self.data, run.stopped.is_set):
            run.history.append(shot)
            if time.monotonic() - shown > PAUSE:
                yield [*_shown(run, words), *_enabled(running=True)]
                shown = time.monotonic()
        run.state = _end(run)
        yield [*_shown(run, words), *_enabled(running=False)]

    def stop(self, request: gr.Request) -> None:
        """End the tab's training before its next step."""
        if run := self.runs.get(str(request.session_hash)):
            run.stopped.set()

    def leave(self, request: gr.Request) -> None:
        """Forget a tab that was closed."""
        self.stop(request)
        self.runs.pop(str(request.session_hash), None)

    def reset(self, request: gr.Request, language: str) -> list[Any]:
        """Return the page as it was at the beginning."""
        self.leave(request)
        return [*_shown(None, TEXTS[language]), FIRST, *_preset(FIRST, language)]

    def speak(self, request: gr.Request, language: str, preset: str | None) -> list[Any]:
        """Return everything on the page in another language."""
        words = TEXTS[language]
        return [
            _heading(words),
            gr.update(label=words["language"]),
            gr.update(label=words["example"], choices=_presets(words)),
            _hint(preset, words),
            *(
                gr.update(label=words[name], **_choices(name, words))
                for name in CONTROLS
            ),
            *(gr.update(value=words[name]) for name in BUTTONS),
            *_shown(self.runs.get(str(request.session_hash)), words),
        ]  # fmt: skip

    def page(self, language: str) -> gr.Blocks:
        """Return the page, in a language to begin with."""
        words, first = TEXTS[language], PRESETS[FIRST]
        page = gr.Blocks(analytics_enabled=False, title=words["title"], fill_width=True)
        with page:
            heading = gr.HTML(_heading(words))
            with gr.Row():
                preset = gr.Dropdown(
                    _presets(words),
                    value=FIRST,
                    label=words["example"],
                    elem_id="example",
                    scale=2,
                    min_width=240,
                )
                spoken = gr.Radio(
                    [(name, code) for code, name in LANGUAGES.items()],
                    value=language,
                    label=words["language"],
                    elem_id="language",
                    min_width=240,
                )
            hint = gr.HTML(_hint(FIRST, words), elem_id="hint")
            with gr.Row():
                buttons = [_button(name, words) for name in BUTTONS]
            ready, _ = _shown(None, words)
            status = gr.HTML(ready, elem_id="status")
            with gr.Row():
                with gr.Column(scale=1, min_width=240, elem_id="controls"):
                    controls = {name: _control(name, words, first) for name in CONTROLS}
                with gr.Column(scale=4, min_width=320):
                    pictures = gr.HTML(elem_id="pictures")
            frame = [status, pictures]
            self._connect(heading, preset, hint, spoken, buttons, controls, frame)
            page.unload(self.leave)
        return page

    def _connect(
        self,
        heading: gr.HTML,
        preset: gr.Dropdown,
        hint: gr.HTML,
        spoken: gr.Radio,
        buttons: list[gr.Button],
        controls: dict[str, Any],
        frame: list[gr.HTML],
    ) -> None:
        start, stop, reset = buttons
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        at_once = {"queue": False, **quiet}
        start.click(
            self.start,
            [spoken, *(controls[name] for name in INPUTS)],
            [*frame, *buttons, spoken],
            preprocess=False,  # what Gradio says of a bad value, it says in English
            concurrency_limit=None,  # a tab must not wait until another one has trained
            **quiet,
        )
        stop.click(self.stop, **at_once)
        chosen = [preset, hint, *controls.values()]
        reset.click(self.reset, spoken, [*frame, *chosen], **at_once)
        preset.input(_preset, [preset, spoken], chosen[1:], **at_once)
        spoken.input(
            self.speak,
            [spoken, preset],
            [heading, spoken, *chosen, *buttons, *frame],
            js="(spoken, preset) => { document.documentElement.lang = spoken; "
            "return [spoken, preset] }",
            **at_once,
        )
        controls["exponent"].input(
            js="power => String(Number((10 ** power).toPrecision(2)))",
            inputs=controls["exponent"],
            outputs=controls["rate"],
            **quiet,
        )
        for control in controls.values():
            # What is said of an example is said of its settings only.
            control.input(js="() => [null, '']", outputs=[preset, hint], **quiet)


def _end(run: Run) -> str:
    if run.stopped.is_set():
        return "stopped"
    return "done" if run.history[-1].step == run.settings.steps else "ended"


def _shown(run: Run | None, words: Words) -> list[str]:
    """Return status and pictures."""
    if run is None:
        return [paragraph([words["ready"]], "ready"), ""]
    if not run.history:
        return [paragraph([words["none"]], "stopped"), ""]
    sentences = progress(words, run.state, run.settings, run.history[-1])
    return [
        paragraph(sentences, run.state),
        f'<div class="pictures">{drawing.draw(run.history, run.settings, words)}</div>',
    ]


def _enabled(*, running: bool) -> list[Any]:
    """Start, Stop, Reset and the language: in the middle of a run, nothing but Stop."""
    return [gr.update(interactive=on) for on in (not running, running, not running, not running)]


def _heading(words: Words) -> str:
    return f"<h1>{words['title']}</h1><p>{words['intro']}</p>"


def _hint(preset: str | None, words: Words) -> str:
    return words[f"look.{preset}"] if preset else ""


def _presets(words: Words) -> list[tuple[str, str]]:
    return [(words[f"preset.{name}"], name) for name in PRESETS]


def _preset(preset: str | None, language: str) -> list[Any]:
    """Return the hint and the controls' values; leave all as it is when the box is left empty."""
    if preset is None:
        return [gr.skip()] * (1 + len(CONTROLS))
    return [_hint(preset, TEXTS[language]), *_values(PRESETS[preset]).values()]


def _values(settings: Settings) -> dict[str, Any]:
    """Return what each control shows."""
    values = asdict(settings)
    values |= {"rate": f"{settings.rate:g}", "exponent": math.log10(settings.rate)}
    return {name: values[name] for name in CONTROLS}


def _choices(name: str, words: Words) -> dict[str, Any]:
    if name not in CHOICES:
        return {}
    return {"choices": [(called, key) for key, called in choices(words, name).items()]}


def _button(name: str, words: Words) -> gr.Button:
    return gr.Button(
        words[name],
        elem_id=name,
        min_width=80,
        interactive=name != "stop",
        variant="primary" if name == "start" else "secondary",
    )


def _control(name: str, words: Words, first: Settings) -> Any:
    common = {"value": _values(first)[name], "label": words[name], "elem_id": name}
    if name in CHOICES:
        return gr.Dropdown(**_choices(name, words), **common)
    if name == "rate":
        return gr.Textbox(**common)
    if name == "exponent":
        low, high = math.log10(RANGES["rate"].low), math.log10(RANGES["rate"].high)
        return gr.Slider(low, high, step=0.1, buttons=[], **common)
    limits = RANGES[name]
    if name in SLIDERS:
        return gr.Slider(limits.low, limits.high, step=1, buttons=[], **common)
    return gr.Number(**common)
