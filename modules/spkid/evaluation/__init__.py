"""What a model says of utterances: embeddings, scores, metrics.

The report is in :mod:`spkid.evaluation.report`, which imports Matplotlib.
"""

from spkid.evaluation.embedder import (
    EVALUATIONS,
    UtteranceEmbedder,
    mean_embeddings,
    window_starts,
)
from spkid.evaluation.metrics import (
    Expectation,
    confused_pairs,
    expected_accuracy,
    quantile_edges,
    reliability,
    wilson_interval,
)
from spkid.evaluation.scores import (
    PARTS,
    Evaluation,
    Part,
    by_part,
    expect,
    load_validation,
)

__all__ = [
    "EVALUATIONS",
    "Evaluation",
    "Expectation",
    "PARTS",
    "Part",
    "UtteranceEmbedder",
    "by_part",
    "confused_pairs",
    "expect",
    "expected_accuracy",
    "load_validation",
    "mean_embeddings",
    "quantile_edges",
    "reliability",
    "wilson_interval",
    "window_starts",
]
