"""Padding changes nothing, whatever encoder or pooling is used.

These tests find encoders and poolings by walking ``spkid.models``: a new one is
tested without being listed. OPTIONS only adds variants of some.
"""

import importlib
import inspect
import itertools
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spkid.models
from spkid.models import SpeakerEmbedding
from spkid.models.attention import POSITIONS
from spkid.models.conformer import CONV_NORMS
from spkid.models.masks import valid_mask

SIZE = 24
# Arguments of small modules, by their names.
SMALL = {
    "input_size": SIZE,
    "output_size": SIZE,
    "d_model": SIZE,
    "n_layers": 2,
    "n_heads": 2,
    "d_ff": 32,
    "attention_size": 8,
}
OPTIONS = {
    "AttentiveStatisticsPooling": [{"global_context": False}],
    "ConformerEncoder": [
        {
            "position": position,
            "subsampling": subsampling,
            "conv_norm": norm,
            "window": window,
            "aggregate": True,
        }
        for position, subsampling, norm, window in itertools.product(
            POSITIONS, (1, 2, 4), CONV_NORMS, (None, 3)
        )
    ],
    "SelfAttentivePooling": [{"n_heads": 1}, {"n_heads": 4}],
    "Subsampling": [{"factor": 4}],
}


def public_modules(package):
    """Each public torch module that a package's files define."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        file = importlib.import_module(info.name)
        for name, kind in inspect.getmembers(file, inspect.isclass):
            own = kind.__module__ == info.name and not name.startswith("_")
            if own and issubclass(kind, torch.nn.Module):
                yield kind


def takes_lengths(kind):
    arguments = list(inspect.signature(kind.forward).parameters)
    return arguments[1:3] == ["x", "lengths"]


def make(kind, **options):
    torch.manual_seed(0)
    arguments = inspect.signature(kind).parameters
    small = {key: SMALL[key] for key in arguments if key in SMALL}
    return kind(**{**small, **options})


def is_encoder(kind):
    """Encoders also return lengths; poolings return one tensor."""
    return isinstance(make(kind)(torch.zeros(2, 9, SIZE)), tuple)


KINDS = [kind for kind in public_modules(spkid.models) if takes_lengths(kind)]
ENCODERS = [kind for kind in KINDS if is_encoder(kind)]
POOLINGS = [kind for kind in KINDS if not is_encoder(kind)]
VARIANTS = {
    "-".join([kind.__name__, *map(str, options.values())]): (kind, options)
    for kind in KINDS
    for options in ({}, *OPTIONS.get(kind.__name__, ()))
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def variants(kinds):
    return [name for name, (kind, _) in VARIANTS.items() if kind in kinds]


def by_utterance(output, batch):
    """An encoder's valid frames, or a pooling's vector, of each utterance."""
    if not isinstance(output, tuple):
        return list(output)
    encoded, lengths = output
    if lengths is None:
        lengths = [encoded.shape[1]] * batch
    return [x[:length] for x, length in zip(encoded, lengths, strict=True)]


def padded(utterances, pad, more=0):
    """A batch [utterances, longest + more, SIZE] and its lengths."""
    lengths = torch.tensor([len(utterance) for utterance in utterances])
    batch = torch.full((len(utterances), int(lengths.max()) + more, SIZE), pad)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: len(utterance)] = utterance
    return batch, lengths


def test_the_walk_finds_every_encoder_and_pooling():
    assert spkid.models.ConformerEncoder in ENCODERS
    assert spkid.models.MeanPooling in POOLINGS
    for kind in public_modules(spkid.models):
        if kind.__name__.endswith(("Encoder", "Pooling")):
            assert kind in KINDS, f"{kind}.forward must take (x, lengths)"


def batches(pads):
    """Utterances' lengths and their order in a batch, and what pads it."""
    lengths = st.lists(st.integers(1, 33), min_size=2, max_size=4)
    orders = lengths.flatmap(lambda n: st.permutations(list(enumerate(n))))
    return given(order=orders, pad=st.sampled_from(pads))


@pytest.mark.parametrize("name", variants(ENCODERS))
@settings(max_examples=4)
@batches([0.0, -20.0, 1e4, float("nan")])
def test_encoding_does_not_depend_on_the_batch(name, order, pad):
    check_alone_and_together(name, order, pad)


@pytest.mark.parametrize("name", variants(POOLINGS))
@settings(max_examples=20)
@batches([0.0, -20.0, 1e4])  # frames that an encoder gives are finite
def test_pooling_does_not_depend_on_the_batch(name, order, pad):
    check_alone_and_together(name, order, pad)


def check_alone_and_together(name, order, pad):
    """In any company, in any order, and whatever the padding holds."""
    kind, options = VARIANTS[name]
    module = make(kind, **options).eval()
    utterances = [torch.randn(n, SIZE) for _, n in sorted(order)]
    batch = padded([utterances[i] for i, _ in order], pad, more=3)
    with torch.no_grad():
        together = by_utterance(module(*batch), len(order))
        for row, (index, _) in zip(together, order, strict=True):
            (alone,) = by_utterance(module(utterances[index][None]), 1)
            assert row.shape == alone.shape
            assert row.shape[-1] == getattr(module, "output_size", SIZE)
            assert (row - alone).abs().max() <= 1e-5


@every_variant
def test_gradients_are_finite_and_padding_gets_none(name):
    kind, options = VARIANTS[name]
    module = make(kind, **options).train()
    x, lengths = torch.randn(3, 12, SIZE), torch.tensor([12, 1, 5])
    outputs = by_utterance(module(x.requires_grad_(), lengths), 3)
    sum(output.square().sum() for output in outputs).backward()
    for parameter in module.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert x.grad.isfinite().all()
    assert (x.grad[~valid_mask(lengths, 12)] == 0).all()


@every_variant
@pytest.mark.parametrize("frames", [1, 5])
def test_finite_on_one_frame_and_on_constant_input(name, frames):
    kind, options = VARIANTS[name]
    module = make(kind, **options)
    x = torch.full((2, frames, SIZE), 3.0, requires_grad=True)
    outputs = by_utterance(module(x, torch.tensor([frames, 1])), 2)
    sum(output.sum() for output in outputs).backward()
    assert all(output.isfinite().all() for output in outputs)
    assert x.grad.isfinite().all()
    for parameter in module.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@every_variant
def test_relative_lengths_are_refused_unless_lengths_do_not_matter(name):
    kind, options = VARIANTS[name]
    module = make(kind, **options).eval()
    x, lengths = torch.randn(2, 8, SIZE), torch.tensor([4, 8])
    try:
        output = module(x, lengths / 8)
    except TypeError as error:
        assert "convert them with absolute_lengths()" in str(error)
    else:
        assert torch.equal(output, module(x, lengths))


@pytest.mark.parametrize("pad", [0.0, -20.0, 1e4, float("nan")])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "encoder", [kind for kind in ENCODERS if hasattr(make(kind), "output_size")]
)
def test_an_embedding_does_not_depend_on_its_batch(encoder, pooling, pad):
    """With SpeechBrain's relative lengths, rounding included."""
    encoder = make(encoder)
    pooling = make(pooling, input_size=encoder.output_size)
    model = SpeakerEmbedding(encoder, pooling, embedding_size=8).eval()
    utterances = [torch.randn(n, SIZE) for n in (1, 23, 29, 7, 3)]
    batch, lengths = padded(utterances, pad)
    with torch.no_grad():
        together = model(batch, lengths / 29)
        shuffled = model(batch.flip(0), lengths.flip(0) / 29)
        assert together.shape == (5, 1, 8)
        assert (together - shuffled.flip(0)).abs().max() <= 1e-5
        for row, utterance in zip(together, utterances, strict=True):
            assert (row - model(utterance[None])[0]).abs().max() <= 1e-5
