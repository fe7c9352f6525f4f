"""A page on which two small networks learn side by side, one with batch normalization.

`batchnorm playground` serves it to this machine's browser. Needs the `playground` extra.
"""

from batchnorm.playground import _extra as _extra
