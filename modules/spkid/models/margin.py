"""Heads that turn an embedding into log-posteriors over speakers.

All share one call: ``head(embeddings)`` gives log-posteriors [..., speakers];
``head(embeddings, targets)`` gives those of training, in which the target's
logit, and it alone, carries the margin. Either way the loss is the plain
negative log-likelihood (``speechbrain.nnet.losses.nll_loss``), so a margin
can be neither forgotten in training nor left on in a test.

The margin on the target alone is the whole point. A softmax that is given, for
each class, the log-probability which that class would have as the target,
normalises the margins against each other: they cancel, and once the class is
right they turn into an anti-margin. Scale 15, margin 0.3, a cosine of 0.5 to
the target and those of chance in 256 dimensions to 599 others (another draw
moves the losses by up to a tenth); that softmax, the plain one, and AM:

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

import torch
import torch.nn.functional as F
from torch import nn


class CosineSoftmax(nn.Module):
    """Softmax of scaled cosines (NormFace, Wang et al., 2017); the base of
    the margin heads.

    Arguments
    ---------
    input_size : int
        Size of an embedding.
    n_speakers : int
        Number of classes.
    scale : float
        Scale s of the cosines.
    margin : float
        Margin m; here 0. Training may change it by :meth:`set_margin`; it is
        saved with the weights.
    sub_centers : int
        Directions a class may choose from, the nearest counts (Sub-center
        ArcFace, Deng et al., 2020).
    top_k : int
        Inter-top-k (Zhao et al., 2022): the ``top_k`` nearest wrong classes
        are made nearer by ``top_k_margin`` in training.
    top_k_margin : float
        Penalty of those classes, in units of the margin.

    Example
    -------
    >>> head = CosineSoftmax(8, n_speakers=5)
    >>> head(torch.rand(2, 1, 8)).exp().sum(-1)
    tensor([[1.0000],
            [1.0000]], grad_fn=<SumBackward1>)
    """

    def __init__(
        self,
        input_size: int,
        n_speakers: int,
        scale: float = 30.0,
        margin: float = 0.0,
        sub_centers: int = 1,
        top_k: int = 0,
        top_k_margin: float = 0.06,
    ) -> None:
        super().__init__()
        if not 0 <= top_k < n_speakers:
            raise ValueError(
                f"top_k={top_k} must be less than n_speakers={n_speakers}."
            )
        self.scale, self.sub_centers = scale, sub_centers
        self.top_k, self.top_k_margin = top_k, top_k_margin
        self.weight = nn.Parameter(
            torch.empty(n_speakers * sub_centers, input_size)
        )
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("margin", torch.tensor(float(margin)))

    def set_margin(self, margin: float) -> None:
        """Changes the margin from the next step on."""
        self.margin.fill_(margin)

    def cosines(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosines [..., n_speakers] of embeddings [..., input_size]."""
        cosines = F.linear(
            F.normalize(embeddings, dim=-1), F.normalize(self.weight, dim=-1)
        )
        if self.sub_centers > 1:
            cosines = cosines.unflatten(-1, (-1, self.sub_centers)).amax(-1)
        return cosines

    def shifted(self, cosines: torch.Tensor, away: bool) -> torch.Tensor:
        """Cosines made harder: a target's lowered, or (``away`` false)
        another class's raised. Here: as they are."""
        return cosines

    def forward(
        self, embeddings: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-posteriors, in float32 (or better) inside autocast too.

        Arguments
        ---------
        embeddings : torch.Tensor [batch, 1, input_size] or [batch, input_size]
            Of any length; only their direction counts.
        targets : torch.Tensor [batch, 1] or [batch], optional
            Indices of the right classes, for training.

        Returns
        -------
        torch.Tensor [batch, 1, n_speakers] or [batch, n_speakers]
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            exact = torch.promote_types(embeddings.dtype, torch.float32)
            cosines = self.cosines(embeddings.to(exact))
            if targets is not None:
                cosines = self._with_margin(cosines, targets)
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


class AMSoftmax(CosineSoftmax):
    """Additive margin softmax: s (cos - m) for the target.

    "Additive Margin Softmax for Face Verification" (Wang et al., 2018);
    CosFace (Wang et al., 2018). Arguments as in :class:`CosineSoftmax`.

    Example
    -------
    >>> head = AMSoftmax(8, n_speakers=5, scale=30.0, margin=0.2)
    >>> embeddings, targets = torch.rand(2, 1, 8), torch.tensor([[0], [3]])
    >>> head(embeddings, targets).shape
    torch.Size([2, 1, 5])
    """

    def __init__(
        self,
        input_size: int,
        n_speakers: int,
        scale: float = 30.0,
        margin: float = 0.2,
        **options,
    ) -> None:
        super().__init__(input_size, n_speakers, scale, margin, **options)

    def shifted(self, cosines: torch.Tensor, away: bool) -> torch.Tensor:
        """cos - m for the target, cos + m' for another class."""
        return cosines - self.margin if away else cosines + self.top_k_margin


class AAMSoftmax(AMSoftmax):
    """Additive angular margin softmax: s cos(angle + m) for the target.

    ArcFace (Deng et al., 2019). Past pi - m, where the cosine would rise
    again, the target's cosine falls on by the constant m sin(m). Arguments as
    in :class:`CosineSoftmax`.

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
    """Plain softmax classifier behind the same call; it has no margin.

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
        layers = []
        if hidden_size is not None:
            layers = [nn.Linear(input_size, hidden_size), nn.ReLU()]
            input_size = hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(input_size, n_speakers))

    def forward(
        self, embeddings: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., input_size] to log-posteriors [..., n_speakers]."""
        logits = self.layers(embeddings)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.log_softmax(logits.to(exact), dim=-1)
