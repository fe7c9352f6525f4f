"""Settings that are worth a look; `texts` says at what. A test holds that what it says is so."""

from __future__ import annotations

from collections.abc import Mapping

from batchnorm.playground.settings import Settings

#: The first is what the page begins with.
PRESETS: Mapping[str, Settings] = {
    "sigmoid": Settings(),
    "small": Settings(activation="ReLU", init="0.01", rate=0.1),
    "fast": Settings(activation="ReLU", init="He", rate=2.0),
    "shallow": Settings(depth=1, activation="ReLU", init="He", rate=0.5, steps=300),
    "deep": Settings(depth=20, activation="ReLU", init="He", rate=0.01, steps=200),
    "tiny": Settings(depth=3, activation="ReLU", init="He", rate=0.05, batch=2, steps=1000),
}
