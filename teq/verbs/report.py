"""`python -m teq report`: render tables and figures from records."""

from teq.report.read import report as main

__all__ = ["main"]
