"""The reader's file: loaded and called so that whatever it does ends in a verdict."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchnorm.exercises.exercise import Text, Wrong

#: Enough of a message to see what it is about: some of torch's are pages.
LONGEST_MESSAGE = 300

#: What the file is called as a module: not `__main__`, so that what stands behind that is not run.
MODULE = "answer"

_RUNS = Text("代码运行到底", "code that runs to its end")
_UNWRITTEN = Text(
    "还没有写：raise NotImplementedError", "not written yet: raise NotImplementedError"
)
_EXIT = Text("程序被 SystemExit 终止", "the program was ended by SystemExit")
_NO_EXIT = Text(
    "去掉 sys.exit() 或 exit()；结果用 return 交回。",
    "Leave sys.exit() or exit() away; hand the result back by return.",
)
_NAMED = Text("文件里定义 {name}", "a file that defines {name}")
_UNNAMED = Text("没有 {name}", "no {name}")
_NOT_CALLABLE = Text("{name} 是 {kind}，不能调用", "{name} is {kind}, which cannot be called")
_MEANT = Text("是不是写成了 {near}？", "Is {near} what was meant?")
_SOMETHING = Text("{name} 返回结果", "{name} to return a result")
_RETURN = Text("每条路径的末尾都要有 return。", "Every way through it must end in a return.")
_KEPT = Text("第 {number} 个参数保持原样", "argument {number} left as it was")
_CHANGED = Text("它被就地改写了", "it was changed in place")
_COPY = Text(
    "写 x = x - mean，不要写 x -= mean 或 x.sub_(mean)：后两种改写调用者的数据。",
    "Write x = x - mean, not x -= mean or x.sub_(mean): those write into the caller's data.",
)


class Answer:
    """What the reader wrote.

    Attributes:
        path: the file.
        line: where what was called last begins.
    """

    def __init__(self, path: Path, source: bytes, names: tuple[str, ...]) -> None:
        """Run the source, which the file holds.

        Raises:
            Wrong: it cannot be run, or does not define the names.
        """
        self.path = path
        self.line: int | None = None
        self._module = self._loaded(source)
        for name in names:
            self._check_name(name)

    def _loaded(self, source: bytes) -> ModuleType:
        module = ModuleType(MODULE)
        module.__file__ = str(self.path)
        # Dataclasses look their module up there; and an answer may import what lies beside it.
        sys.modules[MODULE] = module
        beside = str(self.path.parent)
        if beside not in sys.path:
            sys.path.append(beside)
        try:
            # Not importlib's loader: it keeps bytecode, and two edits in a second look the same.
            code = compile(source, str(self.path), "exec", dont_inherit=True)
            exec(code, module.__dict__)  # noqa: S102
        except (Exception, SystemExit) as error:
            raise self.crash(error) from error
        return module

    def _check_name(self, name: str) -> None:
        found = getattr(self._module, name, None)
        if callable(found):
            return
        expected = _NAMED.filled(name=name)
        if found is not None:
            kind = type(found).__name__
            raise Wrong(expected, _NOT_CALLABLE.filled(name=name, kind=kind))
        own = [key for key, value in vars(self._module).items() if callable(value)]
        near = difflib.get_close_matches(name, own, 1)
        hint = _MEANT.filled(near=near[0]) if near else None
        raise Wrong(expected, _UNNAMED.filled(name=name), hint)

    def call(self, function: str | Callable[..., Any], *arguments: Any, changes: int = 0) -> Any:
        """What the function returns.

        Args:
            function: a name in the file, or what came of calling one.
            arguments: what it is called with.
            changes: how many of the first it is to write into; then it may return nothing.

        Raises:
            Wrong: it raises, returns nothing, or writes into its other arguments.
        """
        before = copied(arguments)
        try:
            found = self._begin(function)(*arguments)
        except (Exception, SystemExit) as error:
            raise self.crash(error) from error
        if found is None and not changes:
            name = function if isinstance(function, str) else type(function).__name__
            raise Wrong(_SOMETHING.filled(name=name), Text.of(None), _RETURN)
        for number, (argument, was) in enumerate(zip(arguments, before, strict=True), start=1):
            if number > changes and not identical(argument, was):
                raise Wrong(_KEPT.filled(number=number), _CHANGED, _COPY)
        return found

    def raised(self, function: str | Callable[..., Any], *arguments: Any) -> BaseException | None:
        """What the function raises, if it does."""
        try:
            self._begin(function)(*arguments)
        except (Exception, SystemExit) as error:
            self.line = self._line(error) or self.line
            return error
        return None

    def _begin(self, function: str | Callable[..., Any]) -> Callable[..., Any]:
        called: Callable[..., Any]
        called = getattr(self._module, function) if isinstance(function, str) else function
        body = getattr(called, "forward", None) or called
        code = getattr(body, "__code__", None)
        if code is not None and code.co_filename == str(self.path):
            self.line = code.co_firstlineno
        return called

    def crash(self, error: BaseException) -> Wrong:
        """What to say of an exception that the answer has led to."""
        line = self._line(error) or self.line
        if isinstance(error, NotImplementedError):
            return Wrong(_RUNS, _UNWRITTEN, line=line)
        if isinstance(error, SystemExit):
            return Wrong(_RUNS, _EXIT, _NO_EXIT, line)
        return Wrong(_RUNS, Text.of(described(error)), line=line)

    def _line(self, error: BaseException) -> int | None:
        """The last of the reader's own lines: torch checks what it is given deep inside."""
        if isinstance(error, SyntaxError) and error.filename == str(self.path):
            return error.lineno
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if frame.filename == str(self.path)]
        return own[-1] if own else None


def described(error: BaseException) -> str:
    """The error as Python would say it, in one line that is not too long."""
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    message = " ".join(said.split())[:LONGEST_MESSAGE]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def copied(value: Any) -> Any:
    """The same with copies of its tensors, to be compared afterwards."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [copied(part) for part in value] if isinstance(value, (tuple, list)) else value


def identical(found: Any, was: Any) -> bool:
    """Whether nothing was changed since it was copied; NaN is NaN."""
    if isinstance(was, list):
        return len(found) == len(was) and all(map(identical, found, was))
    if not isinstance(was, Tensor) or not isinstance(found, Tensor):
        return found is was
    return (found.shape, found.dtype) == (was.shape, was.dtype) and torch.allclose(
        found.detach(), was, rtol=0, atol=0, equal_nan=True
    )
