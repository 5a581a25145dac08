"""The sections of a report that are drawn from the scored utterances."""

from __future__ import annotations

import colorsys
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from spkid.evaluation.metrics import (
    confused_pairs,
    quantile_edges,
    reliability,
    wilson_interval,
)
from spkid.evaluation.report.blocks import (
    Table,
    curve,
    figure,
    percent,
    percent_ticks,
)
from spkid.evaluation.scores import PARTS, Evaluation
from spkid.evaluation.trials import unit_vectors

GREY = PARTS["train"].colour
MAX_POINTS = 1000  # of the embedding map; t-SNE takes seconds for them
MAX_COLOURS = 20


def split_parts(scored: Evaluation) -> dict[str, Evaluation]:
    """The utterances of each part, the most telling first; none is empty."""
    parts = {key: scored.of_part(key) for key in PARTS}
    return {key: part for key, part in parts.items() if len(part)}


def span(low: float, high: float, digits: int = 0) -> str:
    """From where to where, with an en dash."""
    return f"{low:.{digits}f}\N{EN DASH}{high:.{digits}f}"


def by_length(scored: Evaluation) -> dict[str, Any]:
    """Accuracy of short and long utterances, with intervals."""
    n_bins = int(np.clip(len(scored) // 30, 1, 6))
    edges = quantile_edges(scored.frames, n_bins)
    labels = [
        span(low / 100, (high - 1) / 100, digits=1)
        for low, high in pairwise(edges)
    ]
    head, rows = ["seconds"], [[label] for label in labels]
    points = {}
    for part, one in split_parts(scored).items():
        head.append(PARTS[part].name)
        points[part] = np.full((len(labels), 3), np.nan)
        bins = np.digitize(one.frames, edges[1:-1])
        for i, row in enumerate(rows):
            right = one.right[bins == i]
            row.append("none")
            if len(right):
                row[-1] = f"{percent(right.mean())} of {len(right)}"
                ends = wilson_interval(right.sum(), len(right))
                points[part][i] = right.mean(), *ends

    def draw(canvas):
        axes = canvas.subplots()
        for k, (part, values) in enumerate(points.items()):
            accuracy, low, high = values.T
            x = np.arange(len(labels)) + 0.14 * (k - (len(points) - 1) / 2)
            look = curve(part, len(labels))
            axes.vlines(x, low, high, color=look["color"], alpha=0.6)
            axes.plot(x, accuracy, linestyle="", **look)
        axes.set_xticks(range(len(labels)), labels, fontsize=7.5)
        axes.set(xlabel="length in seconds", ylabel="accuracy")
        axes.set_xlim(-0.5, len(labels) - 0.5)
        percent_ticks(axes)

    alt = "Accuracy by utterance length; the table has its figures."
    caption = "Bars are 95 % intervals (Wilson)."
    return {
        "figure": figure(draw, alt, caption),
        "table": Table("Accuracy and number of utterances", head, rows),
    }


def by_speaker(scored: Evaluation) -> dict[str, Any]:
    """All speakers' accuracies in order, and the lowest of them."""
    counts = {
        part: [
            np.bincount(one.target, weights, len(one.speakers)).astype(int)
            for weights in (one.right, None)
        ]
        for part, one in split_parts(scored).items()
    }

    def draw(canvas):
        axes = canvas.subplots()
        for part, (right, total) in counts.items():
            ranked = np.sort(right[total > 0] / total[total > 0])
            x = np.arange(len(ranked)) + 1
            axes.plot(x, ranked, **curve(part, len(ranked)))
        axes.set(xlabel="speakers, each curve from its lowest to its highest")
        axes.set(ylabel="accuracy", ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        percent_ticks(axes)

    part, (right, total) = next(iter(counts.items()))
    ends = {
        i: wilson_interval(right[i], total[i])
        for i in np.flatnonzero(right < total).tolist()
    }
    rows = [
        [
            *(scored.speakers[i], f"{right[i]} of {total[i]}"),
            percent(right[i] / total[i]),
            f"{span(100 * ends[i][0], 100 * ends[i][1])} %",
        ]
        for i in sorted(ends, key=lambda i: (ends[i][1], i))[:20]
    ]
    caption = (
        f"{len(ends)} of {np.count_nonzero(total)} speakers have errors on "
        f"{PARTS[part].name}."
    )
    alt = f"Speakers sorted by accuracy. {caption}"
    return {
        "figure": figure(draw, alt, caption, height=4),
        "table": Table(
            f"The {len(rows)} speakers with the lowest accuracy on "
            f"{PARTS[part].name}, by the upper end of the interval",
            ["speaker", "right", "accuracy", "95 % interval"],
            rows,
        ),
    }


def confusions(scored: Evaluation) -> Table:
    """Who is taken for whom; without rows, the caption says that nobody is."""
    part, one = next(iter(split_parts(scored).items()))
    names = one.speakers
    rows = [
        [
            names[pair.target],
            names[pair.guess],
            pair.utterances,
            percent(pair.share),
        ]
        for pair in confused_pairs(one.target, one.guess)
    ]
    caption = f"No error on {PARTS[part].name}."
    if rows:
        caption = (
            f"The {len(rows)} most frequent confusions on {PARTS[part].name}, "
            "and their share of the speaker's utterances there"
        )
    head = ["who spoke", "taken for", "utterances", "share"]
    return Table(caption, head, rows, "pairs")


def flatten(vectors: np.ndarray) -> tuple[str, np.ndarray]:
    """Points [n, 2] of vectors, similar ones close, and the method's name."""
    vectors = unit_vectors(vectors)
    left, scale, _ = np.linalg.svd(
        vectors - vectors.mean(axis=0), full_matrices=False
    )
    points = np.zeros((len(vectors), 2))
    points[:, : len(scale)] = (left * scale)[:, :2]
    spread = points[:, 0].std()
    # t-SNE needs neighbourhoods of 30, and crashes where all are one point.
    if len(points) < 100 or spread < 1e-6:
        return "PCA", points
    tsne = TSNE(init=points / spread * 1e-4, random_state=0)
    with threadpool_limits(1):  # several threads would add in any order
        return "t-SNE", tsne.fit_transform(vectors)


def hue(angle: float, luma: float) -> tuple[float, ...]:
    """Red, green and blue of a hue, as light as every other hue is."""
    colour = colorsys.hsv_to_rgb(angle, 0.75, 0.85)
    missing = luma - np.dot(colour, (0.3, 0.59, 0.11))
    if missing < 0:
        return tuple(value * luma / (luma - missing) for value in colour)
    white = missing / (1 - luma + missing)
    return tuple(value + white * (1 - value) for value in colour)


def apart(places: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Places [n, 2] of labels, moved until none of a size [2] is on another."""
    ties = np.linspace(0, 1e-3, len(places))[:, None]
    places = places + ties * size
    for _ in range(200):
        away = places[:, None] - places
        covers = (np.abs(away) < size).all(axis=2)
        np.fill_diagonal(covers, False)
        if not covers.any():
            break
        places += size / 10 * (np.sign(away) * covers[..., None]).sum(axis=1)
    return places


def embedding_map(scored: Evaluation) -> dict[str, Any]:
    """The embeddings of some speakers in two dimensions."""
    speakers, index = np.unique(scored.target, return_inverse=True)
    accuracy = np.bincount(index, scored.right) / np.bincount(index)
    ranked = speakers[np.argsort(accuracy, kind="stable")]
    places = np.linspace(0, len(ranked) - 1, min(MAX_COLOURS, len(ranked)))
    chosen = np.sort(ranked[places.round().astype(int)]).tolist()
    at = np.flatnonzero(np.isin(scored.target, chosen))
    drawn = scored.select(np.random.default_rng(0).permutation(at)[:MAX_POINTS])
    method, points = flatten(drawn.embedding)
    colours = {
        speaker: hue(i / len(chosen), 0.4 + 0.12 * (i % 2))
        for i, speaker in enumerate(chosen)
    }

    def draw(canvas):
        axes = canvas.subplots()
        for part, one in split_parts(drawn).items():
            name, _, marker = PARTS[part]
            look = {"marker": marker, "s": 14, "alpha": 0.7, "linewidths": 0}
            axes.scatter(
                *points[drawn.part == part].T,
                c=[colours[speaker] for speaker in one.target.tolist()],
                **look,
            )
            axes.scatter([], [], label=name, color=GREY, **look)
        middles = [
            np.median(points[drawn.target == speaker], axis=0)
            for speaker in chosen
        ]
        places = apart(np.array(middles), 0.045 * np.ptp(points, axis=0))
        for i, speaker in enumerate(chosen):
            box = {"boxstyle": "round,pad=0.2", "linewidth": 0}
            axes.text(
                *(*places[i], str(i + 1)),
                **{"color": "white", "fontsize": 6, "ha": "center"},
                va="center",
                bbox=box | {"facecolor": colours[speaker]},
            )
        axes.axis("off")

    which = f"{len(chosen)} speakers"
    if len(chosen) < len(speakers):
        which += f" of {len(speakers)}, from the lowest accuracy to the highest"
    caption = (
        f"{method} of the directions of {len(points)} embeddings: {which}."
    )
    if method == "t-SNE":
        caption += " Close points are similar; large distances say little."
    return {
        "figure": figure(draw, f"Embedding map. {caption}", caption, 4.2),
        "key": [
            (
                scored.speakers[speaker],
                [round(255 * value) for value in colours[speaker]],
            )
            for speaker in chosen
        ],
    }


def calibration(scored: Evaluation) -> dict[str, Any]:
    """Whether a confidence of 80 % is right in 80 of 100 cases."""
    measured, texts = {}, []
    for part, one in split_parts(scored).items():
        confidence = np.nan_to_num(one.confidence.astype(float))
        measured[part] = reliability(confidence, one.right)
        mean, accuracy = confidence.mean(), one.right.mean()
        verdict = "over-confident" if mean > accuracy else "under-confident"
        if abs(mean - accuracy) < 0.01:
            verdict = "neither over- nor under-confident on average"
        texts.append(
            f"On {PARTS[part].name} the model is {verdict}: its mean "
            f"confidence is {percent(mean)}, its accuracy {percent(accuracy)}, "
            "both over utterances; the expected calibration error is "
            f"{percent(measured[part].error)}."
        )

    def draw(canvas):
        upper, lower = canvas.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, dashes=(4, 3))
        for part, bins in measured.items():
            look = curve(part, len(bins.utterances))
            upper.plot(bins.confidence, bins.accuracy, **look)
            edges = np.linspace(0, 1, len(bins.utterances) + 1)
            share = bins.utterances / bins.utterances.sum()
            lower.stairs(share, edges, color=look["color"])
        upper.set(ylabel="accuracy", ylim=(-0.02, 1.02))
        lower.set(xlabel="confidence", ylabel="utterances", xlim=(0, 1.02))
        percent_ticks(upper)
        percent_ticks(lower, "xy")

    caption = (
        "Below the dashed line the model is over-confident. The lower curve is "
        "the share of utterances in each of 15 bins."
    )
    alt = "Reliability diagram; the text has its figures."
    return {"figure": figure(draw, alt, caption, height=3.6), "texts": texts}
