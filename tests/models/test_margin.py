"""Margin heads against SpeechBrain's losses and closed forms."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from speechbrain.nnet.losses import (
    AdditiveAngularMargin,
    AngularMargin,
    LogSoftmaxWrapper,
    nll_loss,
)

from spkid.models import AAMSoftmax, AMSoftmax, Cosines, LinearSoftmax

SPEAKERS, SIZE = 7, 5


@pytest.fixture
def batch():
    torch.manual_seed(0)
    embeddings = torch.randn(64, 1, SIZE) * 3
    return embeddings, torch.randint(SPEAKERS, (64, 1))


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("scale", [15.0, 30.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(AMSoftmax, AngularMargin), (AAMSoftmax, AdditiveAngularMargin)],
)
def test_loss_and_gradient_are_speechbrains(ours, theirs, margin, scale, batch):
    embeddings, targets = batch
    head = ours(SIZE, SPEAKERS, scale=scale, margin=margin)
    reference = LogSoftmaxWrapper(theirs(margin=margin, scale=scale))
    x = embeddings.clone().requires_grad_()
    y = embeddings.clone().requires_grad_()
    loss = nll_loss(head(x, targets), targets)
    expected = reference(head.cosines(y), targets)
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-5
    assert (x.grad - y.grad).abs().max() <= 1e-5


def loss_and_gradients(head, embeddings, loss):
    x = embeddings.clone().requires_grad_()
    head.zero_grad()
    value = loss(head, x)
    value.backward()
    return value.detach(), x.grad, head.weight.grad.clone()


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("scale", [15.0, 64.0])
@pytest.mark.parametrize("sure", [0.0, 100.0])
@pytest.mark.parametrize("kind", [AMSoftmax, AAMSoftmax])
def test_each_as_target_trains_as_targets_do(kind, sure, scale, margin, batch):
    """Up to a posterior of 1, where little is left for the other classes."""
    embeddings, targets = batch
    head = kind(SIZE, SPEAKERS, scale, margin, 2, each_as_target=True)
    embeddings = embeddings + sure * head.weight[2 * targets].detach()
    given, found = (
        loss_and_gradients(
            head, embeddings, lambda f, x, t=t: nll_loss(f(x, *t), targets)
        )
        for t in ([targets], [])
    )
    for ours, theirs in zip(found, given, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [(AMSoftmax, AngularMargin), (AAMSoftmax, AdditiveAngularMargin)],
)
def test_cosines_train_in_speechbrains_wrapper_as_our_head_does(
    kind, theirs, batch
):
    embeddings, targets = batch
    head, cosines = kind(SIZE, SPEAKERS, 30.0, 0.2), Cosines(SIZE, SPEAKERS)
    cosines.load_state_dict({"weight": head.weight})
    wrapper = LogSoftmaxWrapper(theirs(margin=0.2, scale=30.0))
    ours = loss_and_gradients(
        head, embeddings, lambda f, x: nll_loss(f(x, targets), targets)
    )
    other = loss_and_gradients(
        cosines, embeddings, lambda f, x: wrapper(f(x), targets)
    )
    for a, b in zip(ours, other, strict=True):
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("head", [AMSoftmax, AAMSoftmax])
def test_training_without_targets_is_warned_of_once(head, batch):
    embeddings, _ = batch
    head = head(SIZE, SPEAKERS)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            head(embeddings)
    (warning,) = shown
    assert str(warning.message).startswith(
        f"{type(head).__name__} is trained without targets, so no margin is "
        "applied"
    )


def test_no_warning_where_no_margin_belongs_or_one_is_applied(batch):
    embeddings, targets = batch
    head = AMSoftmax(SIZE, SPEAKERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(embeddings, targets)
        AMSoftmax(SIZE, SPEAKERS, each_as_target=True)(embeddings)
        with torch.no_grad():
            head(embeddings)
        head.eval()(embeddings)


def test_each_as_target_has_no_margin_in_a_test_and_no_top_k(batch):
    embeddings, _ = batch
    head = AMSoftmax(SIZE, SPEAKERS, each_as_target=True).eval()
    plain = F.log_softmax(30 * head.cosines(embeddings), dim=-1)
    assert torch.equal(head(embeddings), plain)
    with pytest.raises(ValueError, match="top_k=2 must be 0 with"):
        AMSoftmax(SIZE, SPEAKERS, top_k=2, each_as_target=True)


@pytest.mark.parametrize("head", [AMSoftmax, AAMSoftmax])
def test_no_margin_without_targets(head, batch):
    embeddings, _ = batch
    head = head(SIZE, SPEAKERS, scale=20.0, margin=0.4).eval()
    plain = F.log_softmax(20 * head.cosines(embeddings), dim=-1)
    assert torch.allclose(head(embeddings), plain, atol=1e-6)


def test_a_margin_of_zero_is_a_plain_softmax_of_cosines(batch):
    embeddings, targets = batch
    head = AMSoftmax(SIZE, SPEAKERS, margin=0.0).eval()
    assert torch.equal(head(embeddings, targets), head(embeddings))


def test_margin_moves_the_target_logit_alone(batch):
    embeddings, targets = batch
    head = AMSoftmax(SIZE, SPEAKERS, scale=1.0, margin=0.3).eval()
    shift = head(embeddings, targets) - head(embeddings)
    shift = shift - shift.max(dim=-1, keepdim=True).values
    expected = -0.3 * F.one_hot(targets, SPEAKERS)
    assert torch.allclose(shift, expected, atol=1e-5)


def test_closed_form_of_one_example():
    """Target cosine 1/2, all others 0."""
    head = AMSoftmax(SPEAKERS, SPEAKERS, scale=15.0, margin=0.3)
    head.weight.data = torch.eye(SPEAKERS)
    embedding = torch.eye(SPEAKERS)[:1] * 0.5
    # The rest of the embedding lies outside of all classes' directions.
    head.weight.data = torch.cat((head.weight, torch.zeros(SPEAKERS, 1)), 1)
    embedding = torch.cat((embedding, torch.tensor([[math.sqrt(0.75)]])), 1)
    loss = nll_loss(head(embedding, torch.tensor([0])), torch.tensor([0]))
    closed = math.log(1 + (SPEAKERS - 1) * math.exp(-15 * (0.5 - 0.3)))
    assert loss.item() == pytest.approx(closed, abs=1e-5)


def test_scale_of_an_embedding_does_not_count(batch):
    embeddings, targets = batch
    head = AMSoftmax(SIZE, SPEAKERS)
    assert torch.allclose(
        head(embeddings, targets), head(9 * embeddings, targets), atol=1e-4
    )


def test_margin_is_checkpointed_and_can_change(batch):
    embeddings, targets = batch
    head, other = AMSoftmax(SIZE, SPEAKERS), AMSoftmax(SIZE, SPEAKERS)
    head.set_margin(0.05)
    other.load_state_dict(head.state_dict())
    assert other.margin.item() == pytest.approx(0.05)
    assert torch.equal(head(embeddings, targets), other(embeddings, targets))


def test_nearest_sub_center_counts(batch):
    embeddings, _ = batch
    head = AMSoftmax(SIZE, SPEAKERS, scale=1.0, sub_centers=3).eval()
    centers = F.normalize(head.weight, dim=1).view(SPEAKERS, 3, SIZE)
    cosines = torch.einsum(
        "be,cke->bck", F.normalize(embeddings[:, 0], dim=1), centers
    )
    expected = cosines.max(dim=2).values.log_softmax(1)
    assert torch.allclose(head(embeddings)[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("head", [AMSoftmax, AAMSoftmax])
def test_inter_top_k_raises_the_nearest_wrong_classes(head, batch):
    embeddings, targets = batch
    head = head(SIZE, SPEAKERS, scale=1.0, margin=0.0, top_k=2).eval()
    cosines = head.cosines(embeddings)
    logits = head(embeddings, targets)
    moved = (logits - head(embeddings)) - (logits - head(embeddings)).gather(
        -1, targets[..., None]
    )
    for row in range(len(embeddings)):
        others = cosines[row, 0].clone()
        others[targets[row]] = -2
        nearest = set(others.topk(2).indices.tolist())
        raised = set((moved[row, 0] > 1e-4).nonzero().flatten().tolist())
        assert raised == nearest
    if isinstance(head, AAMSoftmax):
        return
    assert torch.allclose(moved.max(), torch.tensor(0.06), atol=1e-5)


def test_top_k_angle_is_that_of_the_formula():
    head = AAMSoftmax(2, 2, scale=1.0, top_k=1, top_k_margin=0.1)
    cosines = torch.tensor([math.cos(1.0), math.cos(0.05), -1.0])
    expected = torch.tensor([math.cos(0.9), 1.0, math.cos(math.pi - 0.1)])
    assert torch.allclose(
        head.shifted(cosines, away=False), expected, atol=1e-5
    )


@pytest.mark.parametrize("head", [AMSoftmax, AAMSoftmax])
def test_float32_inside_autocast(head, batch):
    embeddings, targets = batch
    head = head(SIZE, SPEAKERS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(embeddings, targets)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head(embeddings, targets))


@pytest.mark.parametrize("head", [AMSoftmax, AAMSoftmax])
def test_finite_at_the_ends_of_the_cosine(head):
    head = head(2, 2)
    head.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]).requires_grad_()
    nll_loss(head(x, torch.zeros(3).long()), torch.zeros(3).long()).backward()
    assert x.grad.isfinite().all()


def test_linear_softmax_is_cross_entropy(batch):
    embeddings, targets = batch
    head = LinearSoftmax(SIZE, SPEAKERS, hidden_size=4)
    loss = nll_loss(head(embeddings, targets), targets)
    logits = head.layers(embeddings[:, 0])
    expected = F.cross_entropy(logits, targets[:, 0])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_label_smoothing_is_torchs(batch):
    embeddings, targets = batch
    head = AMSoftmax(SIZE, SPEAKERS, scale=10.0)
    log_posteriors = head(embeddings, targets)
    ours = nll_loss(log_posteriors, targets, label_smoothing=0.1)
    theirs = F.cross_entropy(
        log_posteriors[:, 0], targets[:, 0], label_smoothing=0.1
    )
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_too_few_and_too_many_top_k_are_refused():
    for top_k in (-1, SPEAKERS):
        with pytest.raises(ValueError, match=f"top_k={top_k} must be 0 or"):
            AMSoftmax(SIZE, SPEAKERS, top_k=top_k)
