"""Evaluation: perplexity on token windows, and multiple-choice or cloze tasks."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Metric:
    """The outcome of one evaluation: plain numbers, the arrays their uncertainty is computed from, and its
    inputs.
    """

    values: dict[str, float]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
