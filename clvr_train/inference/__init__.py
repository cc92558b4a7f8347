"""Closed-loop inference. `ClosedLoop` is the door for use from Python."""

from clvr_train.inference.loop import ClosedLoop

__all__ = ["ClosedLoop"]
