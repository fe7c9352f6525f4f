"""What an exercise is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Generator

from batchnorm.errors import BatchNormError

if TYPE_CHECKING:
    from batchnorm.exercises.answer import Answer

Language = Literal["zh", "en"]


class Text(NamedTuple):
    """The same in Chinese and in English."""

    zh: str
    en: str

    def said(self, language: Language) -> str:
        """In one of them."""
        return self.zh if language == "zh" else self.en

    def filled(self, **values: object) -> Text:
        """Fill the gaps of both with the same values."""
        return Text(self.zh.format(**values), self.en.format(**values))

    @classmethod
    def of(cls, text: object) -> Text:
        """What reads the same in both: a number, a formula, what Python says."""
        return cls(str(text), str(text))


class Wrong(BatchNormError):  # noqa: N818 (a verdict on an answer)
    """What a check refuses an answer for.

    Attributes:
        expected: what was expected.
        came: what came instead.
        hint: what the mistake looks like, where it was recognised.
        line: the reader's line that it comes from, where it is known.
    """

    def __init__(
        self, expected: Text, came: Text, hint: Text | None = None, line: int | None = None
    ) -> None:
        super().__init__(f"expected {expected.en}, got {came.en}")
        self.expected = expected
        self.came = came
        self.hint = hint
        self.line = line


class Check(NamedTuple):
    """What an answer is tried with; `run` raises Wrong.

    The generator makes its data: other data at each run, but for a reader who repeats one.
    """

    name: Text
    run: Callable[[Answer, Generator], None]


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """A task, and how to tell whether it was done.

    Attributes:
        number: what the command calls it by.
        title: in a few words.
        chapter: the file of the article's chapter that it rests on.
        task: what to do, in Markdown.
        names: what the answer must define.
        summary: the docstring of what is to be written.
        start: the file to start from; `{summary}` stands where the docstring goes.
        checks: in the order in which a reader should mend what they find.
        solution: a right answer.
    """

    number: int
    title: Text
    chapter: str
    task: Text
    names: tuple[str, ...]
    summary: Text
    start: str
    checks: tuple[Check, ...]
    solution: str

    def heading(self, language: Language) -> str:
        """Its number and title, as Markdown and Python both take it."""
        heading = Text("# 练习 {number}：{title}", "# Exercise {number}: {title}").said(language)
        return heading.format(number=self.number, title=self.title.said(language))

    def starting_file(self, language: Language) -> str:
        """What `--start` writes."""
        body = self.start.replace("{summary}", self.summary.said(language))
        return f"{self.heading(language)}\n{body}"
