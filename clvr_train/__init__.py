"""Training framework for closed-loop visual reasoning (CLVR)."""

__version__ = "0.1.0"
