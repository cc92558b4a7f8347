"""Training framework for closed-loop visual reasoning (CLVR)."""

import logging

__version__ = "0.1.0"

# Where it is installed, bitsandbytes says at its import which kernels for CPUs it lacks; none of them is used.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
