"""The short form of chaos.py: one run meets each kind of event once."""

import random

import chaos
import pytest
from harness import CAN_FORK

# Counts are those of each process.
FATES = [
    ("killed worker", ("packing", 3, True)),
    ("full disk", ("step", 5, True)),
    ("kill", ("optimiser", 4, False)),
    ("killed worker", ("step", 2, True)),
    ("signal", ("step", 3, False)),
    ("clock", ("step", 2, True)),
]


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason="can't fork here")
def test_disturbed_runs_end_in_the_same_bits(tmp_path, capsys):
    with chaos.small_disk(tmp_path / "disk") as disk:
        one, draw = chaos.Chaos(tmp_path, disk), random.Random(28)
        for seed, (kind, fate) in enumerate(FATES):
            one.process(1, ["--num_workers=2"], kind, fate, seed)
        for kind in chaos.DAMAGES:
            one.damage(kind, draw)
        one.process()
    assert not sum(one.bad.values()), capsys.readouterr().out
    assert set(one.events) == {
        *chaos.EVENTS,
        *(f"damaged {kind}" for kind in chaos.DAMAGES),
    }
