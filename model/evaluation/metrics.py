"""Ranking and calibration metrics of the tables: AUC, Recall@k, Dev, eCTR, eRPM."""

from __future__ import annotations

import numpy as np


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve by the rank statistic, ties counted half; NaN when one class is absent."""
    from scipy.stats import rankdata  # a second of import that most stages of training do without

    labels, scores = np.asarray(labels, bool).ravel(), np.asarray(scores, np.float64).ravel()
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    return float((rankdata(scores)[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def deviation(predicted: np.ndarray, clicks: np.ndarray) -> float:
    """Dev = |1 - mean pCTR / CTR| on exposed ads (paper Table 3, footnote 6); NaN without clicks."""
    rate = float(np.mean(clicks)) if len(clicks) else 0.0
    return abs(1.0 - float(np.mean(predicted)) / rate) if rate > 0 else float("nan")


def calibration_bins(labels: np.ndarray, scores: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean prediction, click rate and size of `bins` parts of equal size, by rising prediction (fewer where there are fewer entries)."""
    parts = [part for part in np.array_split(np.argsort(scores, kind="stable"), bins) if len(part)]
    mean = [[float(np.mean(values[part])) for part in parts] for values in (np.asarray(scores, np.float64), np.asarray(labels, np.float64))]
    return np.array(mean[0]), np.array(mean[1]), np.array([len(part) for part in parts])


def log_loss(labels: np.ndarray, probability: np.ndarray) -> float:
    """Mean binary cross-entropy in nats."""
    p = np.clip(np.asarray(probability, np.float64), 1e-12, 1 - 1e-12)
    y = np.asarray(labels, np.float64)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def recall_at(scores_RN: np.ndarray, targets: list[np.ndarray], k: int = 50) -> np.ndarray:
    """Per request with targets: share of its target columns among the k best scores. Ties and NaN fall against the target, so
    a constant score earns nothing. Requests without targets give NaN."""
    result = np.full(len(targets), np.nan)
    for row, target in enumerate(targets):
        if len(target):
            scores = scores_RN[row]
            result[row] = np.mean([np.count_nonzero(~(scores < scores[t])) <= k for t in target])
    return result


def mean_and_interval(values: np.ndarray, users: np.ndarray, level: float = 1.959963984540054, over: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean over requests (or sum of `values` over sum of `over`) with an interval clustered by user (ratio of per-user sums, delta method)."""
    values = np.asarray(values, np.float64)
    _, index = np.unique(users, return_inverse=True)
    total, count = np.bincount(index, values), np.bincount(index, over).astype(np.float64)
    n = len(total)
    if not count.sum() > 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(total.sum() / count.sum())
    if n < 2:
        return mean, float("nan"), float("nan")
    with np.errstate(invalid="ignore"):  # a value that is not finite has no interval
        half = level * float(np.std((total - mean * count) / count.mean(), ddof=1)) / np.sqrt(n)
    return mean, mean - half, mean + half
