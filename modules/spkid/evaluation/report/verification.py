"""The report's section on pairs of utterances, and on strangers."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtri
from threadpoolctl import threadpool_limits

from spkid.evaluation.report.blocks import (
    Drawing,
    Table,
    curve,
    figure,
    percent,
    percent_ticks,
)
from spkid.evaluation.scores import PARTS, Evaluation
from spkid.evaluation.trials import (
    all_trials,
    det_curve,
    detection_and_identification_rate,
    equal_error_rate,
    min_dcf,
    unit_vectors,
)

P_TARGET = 0.01
MAX_PAIRS = 2_000_000  # of one speaker, and of two; seconds
GREY = PARTS["train"].colour
FPIRS = np.array([0.01, 0.05])
# The DET axes' ticks, and their lowest and highest false alarms and misses.
TICKS = np.array([0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7])
LOWEST, HIGHEST = np.array([0.0001, 0.0005]), np.array([0.6, 0.95])
# Each by whether a speaker's sessions can be told apart.
SESSIONS = {
    True: "Two utterances of one speaker count where one is of a new session "
    "and the other of a session that was trained on.",
    False: "Two utterances of one speaker may be of one session, which helps: "
    "expect more errors on new recordings.",
}
MODELS = {
    True: "held-out utterances of known sessions",
    False: "other held-out utterances",
}
SCORED_BY = (
    "A speaker's model is the mean direction of the speaker's {}; a score is "
    "the cosine of an utterance with it. More utterances make better models."
)
LEFT_OUT = (
    "Each utterance is scored again without its speaker's model, as a "
    "stranger's. The network was trained on these voices: expect real "
    "strangers to be accepted more often."
)


def cosines(scored: Evaluation, enrolled: np.ndarray) -> np.ndarray:
    """Scores of utterances with speakers, from the embeddings alone.

    Arguments
    ---------
    scored : Evaluation
        n utterances of known speakers.
    enrolled : np.ndarray [n]
        Booleans: those whose mean direction is their speaker's model. An
        utterance is left out of the one that it is scored with.

    Returns
    -------
    np.ndarray [n, speakers]
        Cosines; -inf where a speaker has no utterance.

    Example
    -------
    >>> nobody = Evaluation.concatenate([], ["ann", "bob"])
    >>> cosines(nobody, np.zeros(0, bool)).shape
    (0, 2)
    """
    vectors, n_speakers = unit_vectors(scored.embedding), len(scored.speakers)
    sums = np.zeros((n_speakers, vectors.shape[1]), np.float32)
    np.add.at(sums, scored.target[enrolled], vectors[enrolled])
    counts = np.bincount(scored.target[enrolled], minlength=n_speakers)
    scores = vectors @ unit_vectors(sums).T
    scores[:, counts == 0] = -np.inf
    others = sums[scored.target] - vectors * enrolled[:, None]
    own = (vectors * unit_vectors(others)).sum(axis=1)
    own[counts[scored.target] == enrolled] = -np.inf  # there is no other
    scores[np.arange(len(scored)), scored.target] = own
    return scores


def short(rate: float) -> str:
    """A round rate, 0 … 1, in per cent.

    Example
    -------
    >>> short(0.005).replace("\N{NO-BREAK SPACE}", " ")
    '0.5 %'
    """
    return f"{100 * rate:g}\N{NO-BREAK SPACE}%"


def pairs(
    positive: np.ndarray, negative: np.ndarray, part: str
) -> tuple[Drawing, list[list[str]]]:
    """The DET curve of pairs of one speaker and of two, and its figures."""
    rate = equal_error_rate(positive, negative)[0]
    cost, threshold = min_dcf(positive, negative, P_TARGET)
    points = det_curve(positive, negative).thinned()
    marked = {
        "EER": ("o", (rate, rate)),
        "minDCF": (
            "D",
            ((negative > threshold).mean(), (positive <= threshold).mean()),
        ),
    }

    def draw(canvas):
        axes = canvas.subplots()
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, dashes=(4, 3))
        look = curve(part, 30)
        rates = np.stack([points.false_alarm, points.miss], axis=1)
        axes.plot(*ndtri(rates.clip(LOWEST, 0.9999)).T, **look)
        look |= {"linestyle": "", "markersize": 6, "clip_on": False}
        for name, (marker, place) in marked.items():
            look |= {"marker": marker, "label": name}
            axes.plot(*ndtri(np.clip(place, LOWEST, HIGHEST))[:, None], **look)
        labels = [short(value) for value in TICKS]
        axes.set_xticks(ndtri(TICKS), labels, fontsize=7.5)
        axes.set_yticks(ndtri(TICKS), labels, fontsize=7.5)
        axes.set(xlabel="false alarms (two speakers, accepted)")
        axes.set(ylabel="misses (one speaker, rejected)")
        (left, bottom), (right, top) = ndtri(LOWEST), ndtri(HIGHEST)
        axes.set(xlim=(left, right), ylim=(bottom, top))
        axes.grid(axis="x")

    caption = (
        "DET curve: both error rates by threshold, on probit axes; lower is "
        "better. On the dashed line they are equal."
    )
    numbers = (
        f"pairs: {len(positive):,} of one speaker, {len(negative):,} of two"
    )
    share = percent(cost / P_TARGET)
    alt = f"{caption} The table has its figures."
    return figure(draw, alt, caption, height=4), [
        ["Equal error rate (EER)", f"{100 * rate:.2f} %", numbers],
        [
            f"minDCF at {short(P_TARGET)} target pairs",
            *(f"{cost:.5f}", f"{share} of the cost of rejecting all"),
        ],
    ]


def strangers(
    scores: np.ndarray, targets: np.ndarray, part: str
) -> tuple[Drawing, list[list[str]]]:
    """How many speakers are named while how many strangers are accepted.

    Arguments
    ---------
    scores : np.ndarray [n, speakers]
        Of each utterance with each speaker; -inf where none is enrolled.
    targets : np.ndarray [n]
        Who speaks. Each utterance is scored as a stranger's, too: without its
        speaker's column.
    part : str
        The utterances' part, a key of ``PARTS``.

    Returns
    -------
    tuple
        A figure, and rows of a table.
    """
    without = scores.copy()
    np.put_along_axis(without, targets[:, None], -np.inf, axis=1)
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    known = np.isfinite(own[:, 0])
    found = scores[known], targets[known], without
    x = np.geomspace(0.001, 1, 300)
    y = detection_and_identification_rate(*found, x).rate
    at = detection_and_identification_rate(*found, FPIRS)

    def draw(canvas):
        axes = canvas.subplots()
        look = curve(part, 30)
        axes.plot(x, y, drawstyle="steps-post", **look)
        axes.plot(FPIRS, at.rate, "o", color=look["color"], markersize=6)
        ticks = [0.001, 0.01, 0.05, 0.2, 1]
        axes.set(xscale="log", xlim=(0.001, 1), ylim=(-0.02, 1.02))
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="strangers accepted (FPIR)", ylabel="named (DIR)")
        percent_ticks(axes)

    caption = (
        "Detection and identification rate (DIR): utterances accepted and "
        "given their speaker's name, by the share of strangers' accepted, the "
        "false-positive identification rate (FPIR); higher is better."
    )
    alt = f"{caption} Those at 1 and 5 % are marked; the table has them."
    rows = [
        [
            f"DIR at FPIR {short(asked)}",
            f"{percent(rate)} of {known.sum():,}",
            f"{accepted * len(without):,.0f} of {len(without):,} strangers "
            "accepted",
        ]
        for asked, accepted, rate in zip(FPIRS, at.fpir, at.rate, strict=True)
    ]
    return figure(draw, alt, caption, height=4), rows


def verification(
    scored: Evaluation, scores: np.ndarray | None = None, scored_by: str = ""
) -> dict[str, Any] | None:
    """Verification of pairs, and identification among strangers.

    Arguments
    ---------
    scored : Evaluation
        n utterances of known speakers; the held-out ones count.
    scores : np.ndarray [n, speakers], optional
        Of each utterance with each enrolled speaker, in the order of
        ``scored.speakers``; else :func:`cosines` with the mean embeddings of
        the held-out utterances.
    scored_by : str
        A sentence that says what ``scores`` are.

    Returns
    -------
    dict, optional
        None where no two speakers, or no two utterances of one, are held out.
    """
    part = "new" if (scored.part == "new").any() else "random"
    both = np.intersect1d(
        scored.of_part(part).target, scored.of_part("known").target
    )
    across = len(both) > 1
    held = np.isin(scored.part, (part, "known") if across else part)
    one = scored.select(held)
    with threadpool_limits(1):  # several threads would add in any order
        sessions = one.part if across else None
        positive, negative = all_trials(
            one.embedding, one.target, sessions, MAX_PAIRS
        )
        if not len(positive) or not len(negative):
            return None
        if scores is None:
            scored_by = SCORED_BY.format(MODELS[across])
            scores = cosines(one, (one.part == "known") | (not across))
        else:
            scores = scores[held]
    at = one.part == part
    det, rows = pairs(positive, negative, part)
    named, more = strangers(scores[at], one.target[at], part)
    return {
        "figures": [det, named],
        "table": Table(
            f"Verification and identification, {PARTS[part].name}",
            ["measure", "value", "details"],
            rows + more,
            "text",
        ),
        "texts": [SESSIONS[across], scored_by, LEFT_OUT],
    }
