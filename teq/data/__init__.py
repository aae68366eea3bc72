from teq.data.sources import source
from teq.data.texts import PERPLEXITY, Calibration, calibration, provenance, task_rows, windows

__all__ = ["PERPLEXITY", "Calibration", "calibration", "provenance", "source", "task_rows", "windows"]
