import dataclasses

from batchnorm.lab.experiments import explosion as e
from lab_rehearsal import rehearse


def test_r():
    rehearse(e.EXPERIMENT, dataclasses.replace(e.PROFILES["quick"], seeds=2, width=32))
