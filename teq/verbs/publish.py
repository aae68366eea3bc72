"""`python -m teq publish`: copy the records of an experiment to results/ and render them."""

from teq.report.read import publish as main

__all__ = ["main"]
