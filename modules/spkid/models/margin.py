"""Classifiers that turn an embedding into log-posteriors over speakers.

All have one call: ``head(embeddings)`` gives log-posteriors [..., speakers];
``head(embeddings, targets)`` gives those of training, with a margin on the
target's logit. The loss is always the negative log-likelihood
(``speechbrain.nnet.losses.nll_loss``), so the margin can't be left on in a
test; a margin that is forgotten in training is warned of. For scripts that
pass no targets there are ``each_as_target`` and :class:`Cosines`.

Only the target's logit may carry the margin. If each class gets the
log-probability that it would have as the target, and a softmax follows, the
margins cancel and, once the class is right, act as an anti-margin. An example
with scale 15, margin 0.3, a cosine of 0.5 to the target and random ones (in
256 dimensions) to 599 others; the losses of a margin on every class, of none,
and of AM:

>>> s, m, target = 15.0, 0.3, torch.tensor([0])
>>> cosines = torch.randn(1, 600, generator=torch.manual_seed(3)) / 256**0.5
>>> cosines[0, 0], am = 0.5, m * F.one_hot(target, 600)
>>> e, own = (s * cosines).exp(), s * (cosines - m)
>>> every_class_its_own = own - (own.exp() + e.sum() - e).log()
>>> [round(F.cross_entropy(logits, target).item(), 2) for logits in (
...     every_class_its_own, s * cosines, s * (cosines - am))]
[0.17, 0.42, 3.88]
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class Cosines(nn.Module):
    """Cosines to each speaker, for losses that add the margin themselves.

    Such as SpeechBrain's ``LogSoftmaxWrapper`` around ``AngularMargin`` or
    ``AdditiveAngularMargin``. The weights are those of :class:`AMSoftmax`.

    Arguments
    ---------
    input_size : int
        Size of an embedding.
    n_speakers : int
        Number of classes.
    sub_centers : int
        Directions of each class, of which the nearest counts (sub-center
        ArcFace, Deng et al., 2020).

    Example
    -------
    >>> from speechbrain.nnet.losses import AngularMargin, LogSoftmaxWrapper
    >>> cosines = Cosines(8, n_speakers=5)(torch.rand(2, 1, 8))
    >>> loss = LogSoftmaxWrapper(AngularMargin(margin=0.2, scale=30.0))
    >>> loss(cosines, torch.tensor([[0], [3]])).shape
    torch.Size([])
    """

    def __init__(
        self, input_size: int, n_speakers: int, sub_centers: int = 1
    ) -> None:
        super().__init__()
        self.sub_centers = sub_centers
        self.weight = nn.Parameter(
            torch.empty(n_speakers * sub_centers, input_size)
        )
        nn.init.xavier_uniform_(self.weight)

    def cosines(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosines [..., n_speakers] of embeddings [..., input_size]."""
        # In float32 or better, also inside autocast.
        with torch.autocast(embeddings.device.type, enabled=False):
            exact = torch.promote_types(embeddings.dtype, torch.float32)
            cosines = F.linear(
                F.normalize(embeddings.to(exact), dim=-1),
                F.normalize(self.weight, dim=-1),
            )
        if self.sub_centers > 1:
            cosines = cosines.unflatten(-1, (-1, self.sub_centers)).amax(-1)
        return cosines

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Maps [..., input_size] to cosines [..., n_speakers]."""
        return self.cosines(embeddings)


class AMSoftmax(Cosines):
    """Additive margin softmax (Wang et al., 2018): s (cos - m) for the target.

    Also known as CosFace; with a margin of 0 it is NormFace (Wang et al.,
    2017).

    Arguments
    ---------
    input_size : int
        Size of an embedding.
    n_speakers : int
        Number of classes.
    scale : float
        Scale s of the cosines.
    margin : float
        Margin m. :meth:`set_margin` changes it in training; it is saved with
        the weights.
    sub_centers : int
        Directions of each class, of which the nearest counts (sub-center
        ArcFace, Deng et al., 2020).
    top_k : int
        In training, the ``top_k`` nearest wrong classes are moved nearer
        (inter-top-k, Zhao et al., 2022).
    top_k_margin : float
        By how much, in units of the margin.
    each_as_target : bool
        For scripts that pass no targets and whose loss is ``nll_loss``. Each
        class then gets in training the log-posterior that it would have as
        the target. ``nll_loss`` picks the target's, so that loss and gradient
        are those with targets. These aren't log-posteriors of one
        distribution: a loss that normalises them again
        (``LogSoftmaxWrapper``, ``cross_entropy``, label smoothing) is wrong.

    Example
    -------
    >>> head = AMSoftmax(8, n_speakers=5, scale=30.0, margin=0.2)
    >>> embeddings, targets = torch.rand(2, 1, 8), torch.tensor([[0], [3]])
    >>> head(embeddings, targets).shape
    torch.Size([2, 1, 5])
    """

    margin: torch.Tensor

    def __init__(
        self,
        input_size: int,
        n_speakers: int,
        scale: float = 30.0,
        margin: float = 0.2,
        sub_centers: int = 1,
        top_k: int = 0,
        top_k_margin: float = 0.06,
        each_as_target: bool = False,
    ) -> None:
        super().__init__(input_size, n_speakers, sub_centers)
        if not 0 <= top_k < n_speakers:
            raise ValueError(
                f"top_k={top_k} must be 0 or more, and less than "
                f"n_speakers={n_speakers}."
            )
        if each_as_target and top_k:
            raise ValueError(
                f"top_k={top_k} must be 0 with each_as_target: which wrong "
                "classes are nearest depends on the target."
            )
        self.scale, self.each_as_target = scale, each_as_target
        self.top_k, self.top_k_margin = top_k, top_k_margin
        self.register_buffer("margin", torch.tensor(float(margin)))

    def set_margin(self, margin: float) -> None:
        """Sets the margin of the next steps."""
        self.margin.fill_(margin)

    def shifted(self, cosines: torch.Tensor, away: bool) -> torch.Tensor:
        """cos - m for the target, cos + m' for another class."""
        return cosines - self.margin if away else cosines + self.top_k_margin

    def forward(
        self, embeddings: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps [..., input_size] to log-posteriors [..., n_speakers].

        Arguments
        ---------
        embeddings : torch.Tensor [batch, 1, input_size] or [batch, input_size]
            Of any norm; only their direction counts.
        targets : torch.Tensor [batch, 1] or [batch], optional
            Indices of the right classes, for training.
        """
        cosines = self.cosines(embeddings)
        if targets is not None:
            cosines = self._with_margin(cosines, targets)
        elif self.training and self.each_as_target:
            return self._each_as_target(cosines)
        elif self.training and torch.is_grad_enabled():
            # Python shows the same warning once.
            warnings.warn(
                f"{type(self).__name__} is trained without targets, so no "
                "margin is applied: call it with them. Where a script can't, "
                "set each_as_target: True if its loss is nll_loss, or use "
                "spkid.models.Cosines if its loss takes cosines.",
                stacklevel=1,
            )
        return F.log_softmax(self.scale * cosines, dim=-1)

    def _with_margin(self, cosines, targets):
        index = targets.reshape(cosines.shape[:-1]).unsqueeze(-1)
        target = cosines.gather(-1, index)
        if self.top_k:
            others = cosines.scatter(-1, index, -math.inf)
            nearest, places = others.topk(self.top_k, dim=-1)
            cosines = cosines.scatter(
                -1, places, self.shifted(nearest, away=False)
            )
        return cosines.scatter(-1, index, self.shifted(target, away=True))

    def _each_as_target(self, cosines):
        logits = self.scale * cosines
        own = self.scale * self.shifted(cosines, away=True)
        # Log-sum over the other classes: what is left of the sum over all,
        # which is exact where a class is half of it or less. The best class
        # may be nearly all of it.
        total = logits.logsumexp(-1, keepdim=True)
        best = logits.argmax(-1, keepdim=True)
        share = (logits - total).exp().scatter(-1, best, 0.0)
        without_best = logits.scatter(-1, best, -math.inf)
        others = (total + (-share).log1p()).scatter(
            -1, best, without_best.logsumexp(-1, keepdim=True)
        )
        return own - torch.logaddexp(own, others)


class AAMSoftmax(AMSoftmax):
    """Additive angular margin softmax: s cos(angle + m) for the target.

    Also known as ArcFace (Deng et al., 2019). For angles above pi - m, where
    cos(angle + m) would rise again, it is cos(angle) - m sin(m). Arguments
    are those of :class:`AMSoftmax`.

    Example
    -------
    >>> head = AAMSoftmax(8, n_speakers=5, scale=30.0, margin=0.2)
    >>> head(torch.rand(2, 8), torch.tensor([0, 3])).shape
    torch.Size([2, 5])
    """

    def shifted(self, cosines: torch.Tensor, away: bool) -> torch.Tensor:
        """cos(angle + m) for the target, cos(angle - m') for another."""
        # The sine's slope is infinite at cosines of 1 and -1.
        sines = (1 - cosines.square()).clamp(min=1e-9).sqrt()
        if not away:
            turn = self.top_k_margin
            nearer = cosines * math.cos(turn) + sines * math.sin(turn)
            return torch.where(cosines < math.cos(turn), nearer, 1.0)
        cosine, sine = self.margin.cos(), self.margin.sin()
        farther = cosines * cosine - sines * sine
        return torch.where(
            cosines > -cosine, farther, cosines - self.margin * sine
        )


class LinearSoftmax(nn.Module):
    """Plain softmax classifier with the same call; targets change nothing.

    Arguments
    ---------
    input_size : int
        Size of an embedding.
    n_speakers : int
        Number of classes.
    hidden_size : int, optional
        Width of a hidden ReLU layer, as in the course's sample model.

    Example
    -------
    >>> LinearSoftmax(8, n_speakers=5, hidden_size=8)(torch.rand(2, 1, 8)).shape
    torch.Size([2, 1, 5])
    """

    def __init__(
        self, input_size: int, n_speakers: int, hidden_size: int | None = None
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hidden_size is not None:
            layers = [nn.Linear(input_size, hidden_size), nn.ReLU()]
            input_size = hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(input_size, n_speakers))

    def forward(
        self, embeddings: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps [..., input_size] to log-posteriors [..., n_speakers]."""
        logits = self.layers(embeddings)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.log_softmax(logits.to(exact), dim=-1)
