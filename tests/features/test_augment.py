"""Augmentation: what it may touch, and what it does."""

import math

import pytest
import torch

from spkid.features import ChannelAugment, SpectrogramMasking
from spkid.features.augment import NAT_PER_DB

MODULES = {"channel": ChannelAugment, "masking": SpectrogramMasking}
LENGTHS = torch.tensor([60, 1, 33])


@pytest.fixture
def x():
    return torch.randn(3, 60, 40, generator=torch.manual_seed(0)) * 3 - 4


@pytest.mark.parametrize("name", MODULES)
def test_input_is_left_alone_and_padding_is_neither_read_nor_kept(name, x):
    outputs = []
    for pad in (0.0, -20.0, 1e4, float("nan")):
        for row, length in zip(x, LENGTHS, strict=True):
            row[length:] = pad
        before = x.clone()
        torch.manual_seed(1)
        outputs.append(MODULES[name]()(x, LENGTHS))
        assert torch.equal(x.nan_to_num(), before.nan_to_num())
    for output in outputs:
        assert torch.equal(output, outputs[0])
        assert output.isfinite().all()
        for row, length in zip(output, LENGTHS, strict=True):
            assert (row[length:] == 0).all()


@pytest.mark.parametrize("name", MODULES)
def test_draws_differ_by_step_and_utterance_and_follow_the_state(name, x):
    augment, same = MODULES[name](), x[:1].expand(3, -1, -1)
    torch.manual_seed(1)
    first, second = augment(same), augment(same)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    assert torch.equal(first, augment(same))


def only(**options):
    nothing = {"equalizer_db": 0.0, "gain_db": 0.0, "probability": 0.0}
    return ChannelAugment(**{**nothing, **options})


def test_nothing_asked_is_the_identity(x):
    assert torch.allclose(only()(x), x, atol=1e-4)


def test_gain_is_one_number_of_the_asked_size(x):
    x = x.repeat(200, 1, 1)
    moved = only(gain_db=6.0)(x) - x
    assert moved.std(dim=(1, 2)).max() < 1e-3
    gains = moved.mean(dim=(1, 2)) / NAT_PER_DB
    assert 5.5 < gains.max() < 6.0
    assert gains.std() == pytest.approx(6 / math.sqrt(3), rel=0.1)


def test_equaliser_is_constant_in_time_and_smooth(x):
    x = x.repeat(200, 1, 1)
    moved = only(equalizer_db=4.0)(x) - x
    assert moved.std(dim=1).max() < 1e-3
    curve = moved[:, 0] / NAT_PER_DB
    assert curve.std(dim=0).mean() == pytest.approx(4.0, rel=0.1)
    assert curve.diff(dim=1).abs().mean() < 0.25 * curve.abs().mean()


def test_noise_has_the_asked_power():
    x = torch.zeros(400, 60, 40)  # power 1 everywhere
    noisy = only(probability=1.0, snr_db=(10, 10), reverberant_db=(-99, -99))
    # The spectrum's shape is about 0 dB at its median.
    added = (noisy(x).exp() - 1).mean(dim=1).log().median()
    assert added.item() / NAT_PER_DB == pytest.approx(-10, abs=1.5)


def test_reverberation_is_a_plain_convolution_of_power():
    """An impulse becomes itself and its tail, of the asked power and time."""
    x = torch.full((1, 200, 2), -20.0)
    x[0, 5] = 0.0
    room = only(probability=1.0, snr_db=(199, 199), rt60=(0.5, 0.5),
                reverberant_db=(-3, -3))  # fmt: skip
    power = room(x)[0, :, 0].exp()
    assert power[:5].max() < 1e-8
    tail = power[6:55]
    slope = (tail[10].log() - tail[0].log()) / 10
    assert slope.item() == pytest.approx(-60 * NAT_PER_DB * 0.01 / 0.5, 0.01)
    assert power[5:].sum() == pytest.approx(1 + 10**-0.3, rel=0.01)


def test_masks_have_the_asked_widths_and_places():
    torch.manual_seed(0)
    masking = SpectrogramMasking(1, 10, 1, 6, time_share=0.2)
    x, lengths = torch.ones(2000, 60, 40), torch.tensor([60, 20] * 1000)
    hidden = masking(x, lengths) == 0
    bands = hidden[0::2].all(dim=1).sum(dim=1)
    assert bands.min() == 0
    assert bands.max() == 6
    times = hidden[0::2].all(dim=2).sum(dim=1)
    assert times.max() == 10
    assert times.float().mean() == pytest.approx(5, abs=0.4)
    short = hidden[1::2, :20].all(dim=2).sum(dim=1)
    assert short.max() == 4  # a fifth of 20 frames
    first = hidden[0::2].all(dim=2)[:, 0].float().mean()
    middle = hidden[0::2].all(dim=2)[:, 30].float().mean()
    last = hidden[0::2].all(dim=2)[:, 59].float().mean()
    assert 0 < first < middle
    assert 0 < last < middle
