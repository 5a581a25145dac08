#!/usr/bin/env python3
"""Speed of the metrics of trials; the last line is JSON, in seconds.

python benchmarks/metrics_speed.py --trials 10000000
"""

import argparse
import json
import resource
import time

import numpy as np

from spkid.evaluation import det_curve, equal_error_rate, min_dcf


def main() -> None:
    """Times each metric on normal scores, one in a hundred positive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000_000)
    trials = parser.parse_args().trials
    generator = np.random.default_rng(0)
    positive = generator.normal(2, 1, trials // 100).astype(np.float32)
    negative = generator.normal(0, 1, trials - len(positive))
    figures: dict[str, float] = {"trials": trials}
    for metric in (equal_error_rate, min_dcf, det_curve):
        start = time.perf_counter()
        metric(positive, negative.astype(np.float32))
        figures[metric.__name__] = round(time.perf_counter() - start, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(figures | {"peak_mib": peak // 1024}))


if __name__ == "__main__":
    main()
