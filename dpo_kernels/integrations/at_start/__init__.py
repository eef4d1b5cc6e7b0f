"""The folder that `dpo-kernels run` puts on PYTHONPATH: Python imports its sitecustomize itself.

The names are `sitecustomize`'s too, which runs where this package may not be.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
OPTIONS = "DPO_KERNELS_RUN"  # JSON: the options of `dpo-kernels run`
REPORT = "DPO_KERNELS_RUN_REPORT"  # a file that is read when the command has ended
