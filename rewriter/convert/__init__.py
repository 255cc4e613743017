"""Checkpoints in and out: what the command line reads and writes.

from rewriter.convert import load
model = load("./faster")        # a folder that `rewriter convert` wrote: the checkpoint with its plan applied
"""

from rewriter.convert.calibration import read_calibration
from rewriter.convert.output import check_output, load, write
from rewriter.convert.target import Loaded, load_target

__all__ = ["Loaded", "check_output", "load", "load_target", "read_calibration", "write"]
