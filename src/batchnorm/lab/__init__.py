"""The claims made for batch normalization, each an experiment that runs at home and may fail.

    from batchnorm import lab
    results = lab.run("convergence", "out", jobs=2)
    results.content["findings"]["verdict"]["outcome"]

`run` trains, judges and writes the report. `batchnorm.lab.experiments` says how to add a claim.
Needs the `lab` extra.
"""

from batchnorm.lab import _extra as _extra
from batchnorm.lab import minutes as minutes
from batchnorm.lab.experiments import discover as discover
from batchnorm.lab.experiments import find as find
from batchnorm.lab.study import RUNS as RUNS
from batchnorm.lab.study import default_directory as default_directory
from batchnorm.lab.study import run as run
from batchnorm.lab.study import write_report as write_report
