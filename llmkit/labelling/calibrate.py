"""Log-probabilities of label strings to a probability for each label.

A model prefers some labels whatever it is asked: frequent words, short strings. Two cures, both in the log domain, where
they only subtract a bias [labels] from the scores:

``contextual``  the scores of an input without content, such as "N/A" (Zhao et al., 2021: Calibrate before use; with
                ``W = diag(p_cf)^-1`` and ``b = 0``). With scores that are sums it is the domain-conditional PMI of
                Holtzman et al., 2021: Surface form competition.
``batch``       the mean probability of each label over a sample of real rows (Zhou et al., 2023: Batch calibration).
                It takes for granted that no label is much rarer in the sample than another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def log_softmax(scores: NDArray[Any]) -> Scores:
    """Natural logarithms of probabilities that sum to 1 over the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    made: Scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return made


def normalised(sums: NDArray[Any], lengths: NDArray[Any], how: str) -> Scores:
    """Scores [rows, labels] from the sums of the tokens' log-probabilities and the labels' ``lengths`` [labels] in tokens.

    ``sum`` keeps them: the probability that the model gives the whole string. ``mean`` divides by the length, so that a
    long label is not less likely for being long (Brown et al., 2020: Language models are few-shot learners).
    """
    sums = np.asarray(sums, dtype=np.float64)
    return sums / np.asarray(lengths, dtype=np.float64) if how == "mean" else sums


def bias_of(scores: Scores) -> Scores:
    """The bias [labels] of labels: the logarithm of their mean probability over the inputs ``scores`` [inputs, labels]."""
    logs = log_softmax(scores)
    top = logs.max(0)
    made: Scores = top + np.log(np.exp(logs - top).mean(0))
    return made


def probabilities(scores: Scores, bias: Scores | None = None, temperature: float = 1.0) -> Scores:
    """Probabilities [rows, labels]: scores less ``bias``, divided by ``temperature``, made to sum to 1."""
    logs = log_softmax(scores)
    made: Scores = np.exp(log_softmax((logs if bias is None else logs - bias) / temperature))
    return made
