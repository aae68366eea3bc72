from teq.data.texts import PERPLEXITY, Calibration, calibration, find, provenance, task_rows, windows

__all__ = ["PERPLEXITY", "Calibration", "calibration", "find", "provenance", "task_rows", "windows"]
