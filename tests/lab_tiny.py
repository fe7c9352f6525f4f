"""The convergence experiment made tiny: ten runs of a fraction of a second, through the real code."""

import dataclasses

from batchnorm.lab.experiments import convergence

SETTINGS = dataclasses.replace(
    convergence.PROFILES["quick"],
    seeds=2,
    tuning_seeds=1,
    rates=(0.3, 1.0, 3.0),
    steps=300,
    every=10,
)
EXPERIMENT = dataclasses.replace(
    convergence.EXPERIMENT, profiles={**convergence.PROFILES, "tiny": SETTINGS}
)

# The command line with the profile "tiny" added; arguments follow.
COMMAND = """
import sys, lab_tiny
from batchnorm.lab.experiments import convergence
from batchnorm.cli import main
convergence.EXPERIMENT = lab_tiny.EXPERIMENT
sys.argv[0] = "batchnorm"
main()
"""
