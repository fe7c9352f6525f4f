"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import functools
import os
import threading
import time

# Seconds between two looks at the parent.
LOOK_EVERY_S = 0.5


@functools.cache  # once in a process's life
def die_with(parent: int) -> None:
    """Make this process end within a second of its parent, which may be killed with no last word.

    Left alone, a worker would wait for minutes, holding its memory, or for ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
