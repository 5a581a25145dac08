"""Embeddings of any length: the same whatever the batch and the memory."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkid.errors import UserError
from spkid.evaluation.embedder import (
    UtteranceEmbedder,
    is_out_of_memory,
    window_starts,
)
from spkid.models.conformer import ConformerEncoder
from spkid.models.embedding import SpeakerEmbedding
from spkid.models.pooling import AttentiveStatisticsPooling

LENGTHS = [70, 33, 12, 50, 51, 9, 40]
OUT_OF_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"
                        " memory: you tried to allocate 8 bytes."),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder = ConformerEncoder(8, d_model=20, n_layers=2, n_heads=2, d_ff=32)
    pooling = AttentiveStatisticsPooling(20)
    return SpeakerEmbedding(encoder, pooling, embedding_size=12).eval()


@pytest.fixture(scope="module")
def utterances():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 8, generator=generator) for n in LENGTHS]


def padded(utterances):
    lengths = torch.tensor([len(u) for u in utterances])
    x = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True)
    return x, lengths


@torch.inference_mode()
def embed(embedder, utterances):
    return embedder(*padded(utterances)).squeeze(1)


@given(
    length=st.integers(1, 5000),
    frames=st.integers(1, 600),
    hop=st.integers(1, 600),
)
def test_windows_leave_no_frame_out(length, frames, hop):
    hop = min(hop, frames)
    starts = window_starts(length, frames, hop)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert starts[0] == 0
    assert starts[-1] == max(length - frames, 0)
    assert all(0 < gap <= hop for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("evaluation", ["whole", "windows"])
@pytest.mark.parametrize("equal", [False, True])
def test_no_embedding_depends_on_its_batch(
    model, utterances, evaluation, equal
):
    options = {"evaluation": evaluation, "window_frames": 20, "window_hop": 7}

    @settings(max_examples=15, deadline=None)
    @given(st.permutations(range(len(LENGTHS))), st.integers(1, 400))
    def check(order, budget):
        order = order[: 1 + budget % len(LENGTHS)]
        embedder = UtteranceEmbedder(model, budget, equal, **options)
        together = embed(embedder, [utterances[i] for i in order])
        for row, i in enumerate(order):
            assert (together[row] - alone[i]).abs().max() < 1e-5

    single = UtteranceEmbedder(model, 10_000, **options)
    alone = [embed(single, [u])[0] for u in utterances]
    check()


def test_whole_utterances_go_through_the_model_unchanged(model, utterances):
    x, lengths = padded(utterances)
    with torch.inference_mode():
        direct = model(x, lengths / x.shape[1])
        assert torch.equal(UtteranceEmbedder(model, 10_000)(x, lengths), direct)
        same = UtteranceEmbedder(model, 10_000)(x)
        assert torch.equal(same, model(x))


def test_windows_are_averaged_by_direction_and_norm(model, utterances):
    embedder = UtteranceEmbedder(model, 100, False, "windows", 30, 20)
    found = embed(embedder, utterances)
    for row, utterance in enumerate(utterances):
        starts = window_starts(len(utterance), 30, 20)
        with torch.inference_mode():
            windows = torch.stack(
                [model(utterance[None, s : s + 30])[0, 0] for s in starts]
            ).double()
        unit = windows / windows.norm(dim=1, keepdim=True)
        direction = unit.mean(0) / unit.mean(0).norm()
        expected = direction * windows.norm(dim=1).mean()
        assert torch.allclose(found[row].double(), expected, atol=1e-5)
        if len(starts) == 1:
            assert torch.allclose(found[row].double(), windows[0], atol=1e-6)


class Small:
    """A model on a device on which only so many frames fit."""

    def __init__(self, model, room, error):
        self.model, self.room, self.error = model, room, error
        self.sizes = []

    def __call__(self, x, relative):
        self.sizes.append(x.shape[0] * x.shape[1])
        if self.sizes[-1] > self.room:
            raise self.error
        return self.model(x, relative)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_running_out_of_memory_halves_the_budget_and_goes_on(
    model, utterances, kind
):
    expected = embed(UtteranceEmbedder(model, 10_000), utterances)
    small = Small(model, 100, OUT_OF_MEMORY[kind])
    embedder = UtteranceEmbedder(small, 10_000)
    assert torch.allclose(embed(embedder, utterances), expected, atol=1e-5)
    assert 25 < embedder.max_frames <= 100
    failed = sum(size > 100 for size in small.sizes)
    assert failed == 3  # 490, 210 (of 245), 102 (of 105)
    # The next batch needs no further try.
    assert torch.allclose(embed(embedder, utterances), expected, atol=1e-5)
    assert sum(size > 100 for size in small.sizes) == failed


def test_utterance_too_long_for_the_memory_is_embedded_by_windows(
    model, utterances
):
    small = Small(model, 45, OUT_OF_MEMORY["gpu"])
    options = {"window_frames": 20, "window_hop": 10}
    embedder = UtteranceEmbedder(small, 10_000, **options)
    whole = embed(UtteranceEmbedder(model, 10_000), utterances)
    windows = UtteranceEmbedder(model, 10_000, False, "windows", **options)
    windows = embed(windows, utterances)
    found = embed(embedder, utterances)
    for row, length in enumerate(LENGTHS):
        expected = windows[row] if length > 45 else whole[row]
        assert torch.allclose(found[row], expected, atol=1e-5)


def test_window_too_long_for_the_memory_is_refused_in_one_sentence(
    model, utterances
):
    embedder = UtteranceEmbedder(Small(model, 5, OUT_OF_MEMORY["cpu"]), 1000)
    with pytest.raises(UserError, match="Not even 70 frames fit into memory"):
        embed(embedder, utterances)


def test_relative_lengths_are_refused(model, utterances):
    x, lengths = padded(utterances)
    for evaluation in "whole", "windows":
        embedder = UtteranceEmbedder(model, 1000, evaluation=evaluation)
        with pytest.raises(TypeError, match="absolute_lengths"):
            embedder(x, lengths / x.shape[1])


def test_other_errors_are_not_swallowed(model, utterances):
    embedder = UtteranceEmbedder(Small(model, 5, RuntimeError("shapes")), 1000)
    with pytest.raises(RuntimeError, match="shapes"):
        embed(embedder, utterances)


def test_allocator_errors_count_as_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_the_budget_bounds_each_pass(model):
    """Also where one utterance is as long as the longest of the real data."""
    generator = torch.Generator().manual_seed(2)
    lengths = [719, 300, 299, 50, 50, 50, 49, 9]
    long = [torch.randn(n, 8, generator=generator) for n in lengths]
    small = Small(lambda x, relative: x.mean(1, keepdim=True), 800, None)
    embed(UtteranceEmbedder(small, 800), long)
    assert max(small.sizes) <= 800
    small.sizes.clear()
    embed(UtteranceEmbedder(small, 160, False, "windows", 40, 20), long)
    assert max(small.sizes) == 160


def test_wrong_choices_are_refused_in_one_sentence(model):
    with pytest.raises(UserError, match="must be whole or windows"):
        UtteranceEmbedder(model, 100, evaluation="crops")
    with pytest.raises(UserError, match="frames are left out"):
        UtteranceEmbedder(model, 100, window_frames=10, window_hop=11)
