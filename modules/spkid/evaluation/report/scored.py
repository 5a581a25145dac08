"""The sections of a report that are drawn from the scored utterances."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from spkid.evaluation.metrics import (
    confused_pairs,
    quantile_edges,
    reliability,
    wilson_interval,
)
from spkid.evaluation.report.page import (
    columns,
    figure,
    percent,
    percent_ticks,
    table,
)

# The parts of an evaluation, the most telling first: name, colour, marker.
PARTS = {
    "new": ("new sessions", "#2f80c9", "o"),
    "random": ("random utterances", "#2f80c9", "o"),
    "known": ("known sessions", "#e08a2e", "s"),
    "test": ("test utterances", "#2a9d78", "^"),
}
GREY = "#888888"
MAX_POINTS = 1000  # of the embedding map; t-SNE takes seconds for them
MAX_COLOURS = 20


@dataclass
class Evaluation:
    """Scored utterances whose speaker is known; n of them, at least one."""

    names: list[str]  # by class index
    part: np.ndarray  # [n] keys of PARTS
    target: np.ndarray  # [n] class indices
    guess: np.ndarray  # [n] class indices
    confidence: np.ndarray  # [n] posteriors of the guesses
    frames: np.ndarray  # [n] lengths; 10 ms a frame
    embedding: np.ndarray  # [n, size]

    def __post_init__(self):
        self.right = self.target == self.guess

    def select(self, mask: np.ndarray) -> Evaluation:
        """Those utterances for which the mask [n] is true."""
        keys = ("part", "target", "guess", "confidence", "frames", "embedding")
        return Evaluation(self.names, *(getattr(self, k)[mask] for k in keys))

    @cached_property
    def parts(self) -> dict[str, Evaluation]:
        """By part, the most telling first; none is empty."""
        selected = {key: self.select(self.part == key) for key in PARTS}
        return {key: one for key, one in selected.items() if len(one.part)}


def curve(part: str, n_points: int) -> dict[str, str]:
    """How a part's curve looks; the points of a short one are marked."""
    name, colour, marker = PARTS[part]
    marker = marker if n_points < 30 else ""
    return {"color": colour, "label": name, "marker": marker}


def span(low: float, high: float, digits: int = 0) -> str:
    """From where to where, with an en dash."""
    return f"{low:.{digits}f}\N{EN DASH}{high:.{digits}f}"


def by_length(scored: Evaluation) -> str:
    """Accuracy of short and long utterances, with intervals."""
    n_bins = int(np.clip(len(scored.frames) // 30, 1, 6))
    edges = quantile_edges(scored.frames, n_bins)
    labels = [
        span(low / 100, (high - 1) / 100, digits=1)
        for low, high in pairwise(edges)
    ]
    head, rows = ["seconds"], [[label] for label in labels]
    points = {}
    for part, one in scored.parts.items():
        head.append(PARTS[part][0])
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
        for k, (part, (accuracy, low, high)) in enumerate(
            (part, found.T) for part, found in points.items()
        ):
            x = np.arange(len(labels)) + 0.14 * (k - (len(points) - 1) / 2)
            look = curve(part, len(labels))
            axes.vlines(x, low, high, color=look["color"], alpha=0.6)
            axes.plot(x, accuracy, linestyle="", **look)
        axes.set_xticks(range(len(labels)), labels, fontsize=7.5)
        axes.set(xlabel="length in seconds", ylabel="accuracy")
        axes.set_xlim(-0.5, len(labels) - 0.5)
        percent_ticks(axes)

    alt = "Accuracy by utterance length; the table has its figures."
    return columns(
        figure(draw, alt, "Bars are 95 % intervals (Wilson)."),
        table("Accuracy, and of how many utterances", head, rows),
    )


def by_speaker(scored: Evaluation) -> str:
    """All speakers' accuracies in order, and the worst of them."""
    part, *_ = scored.parts
    counts = {
        key: [
            np.bincount(one.target, weights, len(one.names)).astype(int)
            for weights in (one.right, None)
        ]
        for key, one in scored.parts.items()
    }

    def draw(canvas):
        axes = canvas.subplots()
        for key, (right, total) in counts.items():
            ranked = np.sort(right[total > 0] / total[total > 0])
            x = np.arange(len(ranked)) + 1
            axes.plot(x, ranked, **curve(key, len(ranked)))
        axes.set(xlabel="speakers, each curve from its worst to its best")
        axes.set(ylabel="accuracy", ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        percent_ticks(axes)

    right, total = counts[part]
    ends = {
        i: wilson_interval(right[i], total[i])
        for i in np.flatnonzero(right < total).tolist()
    }
    rows = [
        [
            *(scored.names[i], f"{right[i]} of {total[i]}"),
            percent(right[i] / total[i]),
            f"{span(100 * ends[i][0], 100 * ends[i][1])} %",
        ]
        for i in sorted(ends, key=lambda i: (ends[i][1], i))[:20]
    ]
    said = (
        f"{len(ends)} of {np.count_nonzero(total)} speakers have mistakes on "
        f"{PARTS[part][0]}."
    )
    worst = table(
        f"The {len(rows)} worst on {PARTS[part][0]}, by the interval's upper "
        "end",
        ["speaker", "right", "accuracy", "95 % interval"],
        rows,
    )
    return columns(
        figure(draw, f"Speakers sorted by accuracy. {said}", said, height=4),
        worst if rows else "",
    )


def confusions(scored: Evaluation) -> str:
    """Who is taken for whom."""
    part, *_ = scored.parts
    one, names = scored.parts[part], scored.names
    rows = [
        [names[pair.target], names[pair.guess], pair.count, percent(pair.share)]
        for pair in confused_pairs(one.target, one.guess)
    ]
    if not rows:
        return f"<p>No mistake on {PARTS[part][0]}.</p>"
    return table(
        f"The {len(rows)} most frequent on {PARTS[part][0]}; the share is of "
        "the speaker's utterances there",
        ["who spoke", "taken for", "utterances", "share"],
        rows,
        "pairs",
    )


def flatten(vectors: np.ndarray) -> tuple[str, np.ndarray]:
    """A method's name and points [n, 2] that keep neighbours together."""
    vectors = vectors.astype(float)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.nan_to_num(vectors / np.maximum(lengths, 1e-9))
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
    with threadpool_limits(1):  # several would add up in any order
        return "t-SNE", tsne.fit_transform(vectors)


def hue(angle: float, luma: float) -> tuple[float, ...]:
    """A colour, in red, green and blue, that is as light as any other hue."""
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


def embedding_map(scored: Evaluation) -> str:
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
        for part, one in drawn.parts.items():
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
        which += f" of {len(speakers)}, spread from the worst to the best"
    caption = f"{method} of {len(points)} embeddings' directions: {which}."
    if method == "t-SNE":
        caption += " What is near is alike; far distances say little."
    key = []
    for i, speaker in enumerate(chosen):
        red, green, blue = (round(255 * value) for value in colours[speaker])
        key.append(
            f'<li><b style="background:rgb({red},{green},{blue})">{i + 1}</b> '
            f"{escape(scored.names[speaker])}</li>"
        )
    return columns(
        figure(draw, f"Embedding map. {caption}", caption, height=4.2),
        f'<ul class="key" aria-label="Speakers">{"".join(key)}</ul>',
    )


def calibration(scored: Evaluation) -> str:
    """Whether a confidence of 80 % is right in 80 of 100 cases."""
    measured, said = {}, []
    for part, one in scored.parts.items():
        confidence = np.nan_to_num(one.confidence.astype(float))
        measured[part] = reliability(confidence, one.right)
        mean, accuracy = confidence.mean(), one.right.mean()
        verdict = "over-confident" if mean > accuracy else "under-confident"
        if abs(mean - accuracy) < 0.01:
            verdict = "neither over- nor under-confident on average"
        said.append(
            f"<p>On {PARTS[part][0]} the model is {verdict}: its mean "
            f"confidence is {percent(mean)}, its accuracy {percent(accuracy)}, "
            "both over utterances; the expected calibration error is "
            f"{percent(measured[part].error)}.</p>"
        )

    def draw(canvas):
        upper, lower = canvas.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, dashes=(4, 3))
        for part, bins in measured.items():
            look = curve(part, len(bins.count))
            upper.plot(bins.confidence, bins.accuracy, **look)
            edges = np.linspace(0, 1, len(bins.count) + 1)
            share = bins.count / bins.count.sum()
            lower.stairs(share, edges, color=look["color"])
        upper.set(ylabel="accuracy", ylim=(-0.02, 1.02))
        lower.set(xlabel="confidence", ylabel="utterances", xlim=(0, 1.02))
        percent_ticks(upper)
        percent_ticks(lower, "xy")

    caption = (
        "Below the dashed line the model is over-confident. 15 bins; the lower "
        "curve is the share of utterances in each."
    )
    alt = "Reliability diagram; the text has its figures."
    text = f"<div>{''.join(said)}</div>"
    return columns(figure(draw, alt, caption, height=3.6), text)
