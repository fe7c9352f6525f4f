"""The convergence experiment made tiny: ten runs of a fraction of a second, by the real code."""

import dataclasses
import os
import signal
import time
from pathlib import Path

from batchnorm.lab.experiments import convergence

# Where a process of its own finds this module, beside all that this process finds.
PATH = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))

SETTINGS = dataclasses.replace(
    convergence.PROFILES["quick"],
    seeds=2,
    tuning_seeds=1,
    rates=(0.3, 1.0, 3.0),
    steps=200,
    every=10,
)


def run(trial, data):
    """Do the real run, in no less time than the environment asks for."""
    time.sleep(float(os.environ.get("LAB_TINY_PAUSE_S", "0")))
    return convergence.run(trial, data)


EXPERIMENT = dataclasses.replace(
    convergence.EXPERIMENT, profiles={**convergence.PROFILES, "tiny": SETTINGS}, run=run
)


def whose(trial, data):
    """Do the real run, and tell which process did it."""
    return dataclasses.replace(convergence.run(trial, data), timing={"process": os.getpid()})


def die(trial, data):
    """Do what the system does to a process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


# The command line with the profile "tiny" added; arguments follow.
COMMAND = """
import sys, lab_tiny
from batchnorm.lab.experiments import convergence
from batchnorm.cli import main
convergence.EXPERIMENT = lab_tiny.EXPERIMENT
sys.argv[0] = "batchnorm"
main()
"""
