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
from spkid.evaluation.trials import (
    DetCurve,
    OpenSet,
    all_trials,
    as_norm,
    det_curve,
    detection_and_identification_rate,
    equal_error_rate,
    min_dcf,
    unit_vectors,
)

__all__ = [
    "DetCurve",
    "EVALUATIONS",
    "Evaluation",
    "Expectation",
    "OpenSet",
    "PARTS",
    "Part",
    "UtteranceEmbedder",
    "all_trials",
    "as_norm",
    "by_part",
    "confused_pairs",
    "det_curve",
    "detection_and_identification_rate",
    "equal_error_rate",
    "expect",
    "expected_accuracy",
    "load_validation",
    "mean_embeddings",
    "min_dcf",
    "quantile_edges",
    "reliability",
    "unit_vectors",
    "wilson_interval",
    "window_starts",
]
