"""Schedules against the course's own formula and their corner values."""

import math

import pytest

from spkid.training.schedule import LinearRamp, WarmupCosine


def course_schedule(step, warmup, total):
    """The course's get_cosine_schedule_with_warmup, half a cycle."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def test_warmup_cosine_is_the_course_schedule():
    ours = WarmupCosine(peak=1e-3, warmup=1000 / 70000)
    for step in range(0, 70001, 97):
        theirs = 1e-3 * course_schedule(step, 1000, 70000)
        assert ours(step / 70000) == pytest.approx(theirs, abs=1e-12)


def test_it_starts_peaks_and_ends_where_it_should():
    lr = WarmupCosine(peak=2.0, warmup=0.25, final=0.5)
    assert (lr(0.0), lr(0.25), lr(1.0), lr(1.5)) == (0.0, 2.0, 0.5, 0.5)
    assert WarmupCosine(peak=2.0, warmup=0.0)(0.0) == 2.0


def test_ramp():
    ramp = LinearRamp(0.0, 0.3, begin=0.2, end=0.4)
    points = [ramp(p) for p in (0.0, 0.2, 0.3, 0.4, 1.0)]
    assert points == pytest.approx([0.0, 0.0, 0.15, 0.3, 0.3])
    assert LinearRamp(0.0, 0.3, begin=0.0, end=0.0)(0.0) == 0.3
    assert LinearRamp(0.0, 0.3, begin=0.5, end=0.5)(0.6) == 0.3


def test_impossible_points_are_refused():
    with pytest.raises(ValueError, match="warmup=1"):
        WarmupCosine(1.0, warmup=1)
    with pytest.raises(ValueError, match="must rise"):
        LinearRamp(0.0, 1.0, begin=0.5, end=0.4)
