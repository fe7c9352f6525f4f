"""How fast the layer is, against torch eager and torch.compile, measured side by side.

    from batchnorm import bench
    content = bench.run("quick")
    content["geomean"]

One suite, every contender in the same processes and the same rounds; the numbers are medians of
paired ratios, and there is none for a result that is wrong. `cases` says what is measured, `peers`
against what, `check` what counts as right, `measure` how calls are timed, `estimate` how their
ratios become one with an interval; `runner` runs all that and `merge` puts it together. Measuring
needs torch only; figures need the `lab` extra.
"""

from batchnorm.bench.cases import SUITES as SUITES
from batchnorm.bench.results import prepare as prepare
from batchnorm.bench.results import refused as refused
from batchnorm.bench.results import save as save
from batchnorm.bench.runner import Interrupted as Interrupted
from batchnorm.bench.runner import MeasuringError as MeasuringError
from batchnorm.bench.runner import Progress as Progress
from batchnorm.bench.runner import run as run
