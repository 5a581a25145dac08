"""The short form of chaos.py."""

import chaos
import pytest


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bits(tmp_path):
    result = chaos.chaos(runs=1, seed=28, folder=tmp_path)
    assert result["kills"] == 2
    assert result["lost"] == result["different"] == 0
