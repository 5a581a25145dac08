"""The whole embedding model: SpeechBrain's call, training, export."""

import pytest
import torch

from spkid.models import (
    AMSoftmax,
    AttentiveStatisticsPooling,
    ConformerEncoder,
    LinearSoftmax,
    MeanPooling,
    SpeakerEmbedding,
    TransformerEncoder,
)

D = 24


def make(**options):
    torch.manual_seed(0)
    encoder = ConformerEncoder(40, D, 2, 2, 32)
    pooling = AttentiveStatisticsPooling(D)
    return SpeakerEmbedding(encoder, pooling, **options)


def test_lengths_are_speechbrains_and_whole_numbers_are_refused():
    model, x = make().eval(), torch.randn(1, 7, 40)
    x[:, 3:] = 99.0
    assert torch.allclose(
        model(x, torch.tensor([3 / 7])), model(x[:, :3]), atol=1e-5
    )
    with pytest.raises(TypeError, match="must be fractions"):
        model(x, torch.tensor([3]))


def test_the_course_model_has_its_125896_parameters():
    model = SpeakerEmbedding(
        TransformerEncoder(40), MeanPooling(80), batch_norm=False
    )
    head = LinearSoftmax(80, 600, hidden_size=80)
    count = sum(p.numel() for m in (model, head) for p in m.parameters())
    assert count == 125_896


def test_bfloat16_autocast_gives_finite_close_embeddings():
    model, x = make(embedding_size=8).eval(), torch.randn(2, 50, 40)
    lengths = torch.tensor([0.4, 1.0])
    with torch.no_grad():
        exact = model(x, lengths)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, lengths)
    cosine = torch.cosine_similarity(exact.float(), half.float(), dim=-1)
    assert (cosine > 0.995).all()


@pytest.mark.parametrize("position", ["none", "rope", "relative"])
@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
@pytest.mark.parametrize("window", [None, 2])
def test_a_bfloat16_training_step_is_finite(position, conv_norm, window):
    encoder = ConformerEncoder(
        40,
        D,
        2,
        2,
        48,
        dropout=0.1,
        position=position,
        window=window,
        conv_norm=conv_norm,
        subsampling=2,
        aggregate=True,
        drop_path=0.2,
    )
    pooling = AttentiveStatisticsPooling(encoder.output_size)
    model, head = SpeakerEmbedding(encoder, pooling), AMSoftmax(4 * D, 3)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(torch.randn(3, 20, 40), torch.tensor([1, 0.5, 0.1]))
        loss = -head(embeddings, torch.tensor([[0], [1], [2]])).mean()
    loss.backward()
    for parameter in (*model.parameters(), *head.parameters()):
        assert parameter.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("position", ["none", "rope", "relative"])
@pytest.mark.parametrize("subsampling", [1, 2])
def test_exported_program_gives_the_same_for_any_shape(position, subsampling):
    torch.manual_seed(0)
    encoder = ConformerEncoder(
        40, D, 2, 2, 32, position=position, subsampling=subsampling
    )
    model = SpeakerEmbedding(encoder, AttentiveStatisticsPooling(D)).eval()
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames", min=9)
    program = torch.export.export(
        model,
        (torch.randn(3, 50, 40), torch.tensor([0.5, 1.0, 0.3])),
        dynamic_shapes=({0: batch, 1: frames}, {0: batch}),
    ).module()
    for shape in ((2, 31), (5, 777)):
        x, lengths = torch.randn(*shape, 40), torch.rand(shape[0]) / 2 + 0.5
        with torch.no_grad():
            difference = program(x, lengths) - model(x, lengths)
        assert difference.abs().max() <= 1e-5


def test_training_step_reaches_every_parameter():
    model = make(embedding_size=8, dropout=0.1).train()
    head = AMSoftmax(8, 5)
    log_posteriors = head(
        model(torch.randn(4, 20, 40), torch.tensor([1.0, 0.5, 0.2, 0.05])),
        torch.tensor([[0], [1], [2], [3]]),
    )
    (-log_posteriors.mean()).backward()
    for name, parameter in (
        *model.named_parameters(),
        *head.named_parameters(),
    ):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_no_random_number_is_drawn_in_evaluation():
    model = make(embedding_size=8).eval()
    before = torch.get_rng_state()
    model(torch.randn(2, 20, 40, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())
