"""One of several classes with logits z: cross-entropy."""

from typing import Any

import torch
from torch import Tensor, nn

from natgrad.likelihoods.base import Normalised, check_pair, expand_weight, own_weight


class Categorical(Normalised):
    r"""``p(y = c | z) = softmax(z)_c``: cross-entropy; ``F_R = diag(p) − p pᵀ`` at every position [NATGRAD, eq. 13].

    Targets are integers shaped like z without its class dimension, or probabilities shaped like z.

    Args:
        normalizer: ``"example"``, ``"element"`` (targets that are not ignored), ``"none"``, or ``"weighted"``: the sum
            of the class weights of the targets that are not ignored, as ``nn.CrossEntropyLoss`` divides.
        class_weight: one factor per class. The curvature then depends on y.
        ignore_index: targets of this value do not count. The curvature then depends on y; the value −100 that PyTorch
            ignores by default is honoured where y is given and assumed absent where it is not.
        label_smoothing: ε in the target ``(1 − ε) onehot + ε / classes``.
        class_dim: the dimension of z that holds the classes.

    Raises:
        TypeError: ``class_weight`` is no tensor.
        ValueError: a class weight is negative, label_smoothing is not in [0, 1], the classes are in dimension 0, or an
            unknown normaliser.
    """

    normalizers = (*Normalised.normalizers, "weighted")

    def __init__(
        self,
        normalizer: str = "example",
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_dim: int = -1,
    ) -> None:
        super().__init__(normalizer)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Categorical(label_smoothing={label_smoothing}): expected a number from 0 to 1")
        if class_dim == 0:
            raise ValueError(
                "Categorical(class_dim=0): dimension 0 holds the examples; expected another dimension of z"
            )
        self.class_weight, self.ignore_index = own_weight("class_weight", class_weight), ignore_index
        self.label_smoothing, self.class_dim = label_smoothing, class_dim

    def __repr__(self) -> str:
        return f"Categorical(normalizer={self.normalizer!r}, class_dim={self.class_dim})"

    @property
    def needs_targets(self) -> bool:
        """True with class weights, an ``ignore_index`` other than PyTorch's −100, or a count that depends on y."""
        return self.class_weight is not None or self.ignore_index != -100 or self.normalizer == "weighted"

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy of every target, with class weights; 0 where ignored. Shaped like integer targets."""
        try:
            return nn.functional.cross_entropy(
                z.movedim(self.class_dim, 1),
                y.movedim(self.class_dim, 1) if y.is_floating_point() else y,
                weight=None if self.class_weight is None else self.class_weight.to(z),
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                reduction="none",
            )
        except IndexError as error:
            raise ValueError(f"targets: {str(error).rstrip('.')}; {self._expected_range(z)}") from error

    def elements(self, z: Tensor, y: Tensor | None, weight: Tensor | None) -> Tensor:
        """The number of positions that are neither ignored nor of weight zero."""
        like = z.select(self.class_dim, 0)
        if weight is None and (y is None or y.is_floating_point()):
            return torch.as_tensor(like.numel(), device=z.device)
        counted = (
            torch.ones_like(like, dtype=torch.bool)
            if weight is None
            else expand_weight(weight, like).expand_as(like) != 0
        )
        if y is not None and not y.is_floating_point():
            counted = counted & (y != self.ignore_index)
        return torch.count_nonzero(counted)

    def count(self, z: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """What ``nll`` divides by; with ``"weighted"`` the sum of the targets' class weights (times ``weight``).

        Raises:
            ValueError: the count depends on y, and y is not given.
        """
        if y is not None:
            self.check(z, y)
        if self.normalizer != "weighted":
            if self.normalizer == "element" and y is None and self.needs_targets:
                raise ValueError("Categorical: the number of targets that count depends on them; pass y=")
            return super().count(z, y, weight)
        if y is None:
            raise ValueError("Categorical(normalizer='weighted'): the count depends on the targets; pass y=")
        if y.is_floating_point():  # as torch.nn.CrossEntropyLoss divides for probabilities
            return self.elements(z, y, weight).to(z.dtype)
        of_target = (y != self.ignore_index).to(z.dtype)
        if self.class_weight is not None:
            of_target = of_target * self.class_weight.to(z)[y.clamp(min=0, max=len(self.class_weight) - 1)]
        if weight is not None:
            of_target = of_target * expand_weight(weight, of_target)
        return of_target.sum()

    def curvature_weight(self, z: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Tensor | None:
        """Per position the weight times ``Σ_c class_weight_c ỹ_c`` of the (smoothed) target ỹ, 0 where ignored.

        Raises:
            ValueError: it depends on y, and y is not given.
        """
        if y is None and self.needs_targets:
            raise ValueError("Categorical: with class weights or ignored targets the curvature depends on y; pass y=")
        like = z.select(self.class_dim, 0)
        total = None if weight is None else expand_weight(weight, like).to(z.dtype).expand_as(like)
        if y is not None:
            self.check(z, y)
            own = self._target_weight(z, y)
            total = own if total is None else total if own is None else total * own
        return None if total is None else total.unsqueeze(self._classes(z))

    def _target_weight(self, z: Tensor, y: Tensor) -> Tensor | None:
        classes = None if self.class_weight is None else self.class_weight.to(z)
        if y.is_floating_point():
            if classes is None:
                return None
            smoothing = self.label_smoothing / len(classes)
            return ((1 - self.label_smoothing) * y.to(z.dtype).movedim(self.class_dim, -1) + smoothing) @ classes
        kept = y != self.ignore_index
        if classes is None:
            return kept.to(z.dtype)
        of_target = classes[y.clamp(min=0, max=len(classes) - 1)]
        return kept * ((1 - self.label_smoothing) * of_target + self.label_smoothing * classes.mean())

    def check_output(self, z: Tensor) -> None:
        """Examples first, and classes in a dimension of their own, as many as there are class weights."""
        super().check_output(z)
        if z.ndim < 2:
            raise ValueError(f"z: Categorical expects [batch, ..., classes], got shape {tuple(z.shape)}")
        if not -z.ndim < self.class_dim < z.ndim:
            raise ValueError(
                f"z: shape {tuple(z.shape)} has no class dimension {self.class_dim} behind the examples in dimension 0"
            )
        classes = z.shape[self.class_dim]
        if self.class_weight is not None and self.class_weight.shape != (classes,):
            raise ValueError(
                f"class_weight: expected shape ({classes},), one factor per class in z; "
                f"got {tuple(self.class_weight.shape)}"
            )

    def check(self, z: Tensor, y: Any) -> None:
        """Integer targets shaped like z without its class dimension, or probabilities shaped like z."""
        check_pair("Categorical", z, y)
        self.check_output(z)
        if y.is_floating_point() and y.shape == z.shape:
            if self.ignore_index >= 0:
                raise ValueError("targets: ignore_index is for integer classes; got probabilities")
            return
        if y.dtype != torch.int64:
            raise ValueError(f"targets: Categorical expects integer classes (torch.long), got {y.dtype}; use y.long()")
        expected = z.select(self.class_dim, 0).shape
        if y.shape != expected:
            where = "in the last dimension" if self.class_dim == -1 else f"in dimension {self.class_dim}"
            raise ValueError(
                f"targets: expected shape {tuple(expected)} for z of shape {tuple(z.shape)} with the classes {where}; "
                f"got {tuple(y.shape)}"
            )

    def validate(self, z: Tensor, y: Any) -> None:
        """Classes are in range; probabilities are not negative and sum to 1 (NaN is left to the optimisers)."""
        super().validate(z, y)
        if y.is_floating_point():
            excess = (y.sum(self.class_dim) - 1).abs().max().item()
            if excess > 1e-2 or bool((y < 0).any()):
                raise ValueError(
                    "targets: Categorical expects probabilities that sum to 1 over the classes, or integer classes; "
                    f"got values from {y.min().item():g} to {y.max().item():g} whose sums are off by up to {excess:g}"
                )
        else:
            wrong = ((y < 0) | (y >= z.shape[self.class_dim])) & (y != self.ignore_index)
            if bool(wrong.any()):
                raise ValueError(f"targets: found class {y[wrong][0].item()}; {self._expected_range(z)}")

    def _classes(self, z: Tensor) -> int:
        """The class dimension, counted from the front."""
        return self.class_dim % z.ndim

    def _expected_range(self, z: Tensor) -> str:
        return f"expected classes from 0 to {z.shape[self.class_dim] - 1}, the size of z's class dimension"

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A class for every position."""
        p = torch.softmax(z.detach(), self.class_dim)
        # the smallest of independent exponential clocks of rates p falls to class c with probability p_c
        return (torch.empty_like(p).exponential_(generator=generator) / p).argmin(self.class_dim)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """``softmax(z) − onehot(y)``."""
        dim = self._classes(z)
        p = torch.softmax(z, dim)
        return p.scatter_add(dim, y.unsqueeze(dim), torch.full_like(p.narrow(dim, 0, 1), -1.0))

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        """``p ∘ v − p (p · v)`` at every position."""
        dim = self.class_dim if self.class_dim < 0 else self.class_dim - z.ndim
        p = torch.softmax(z, dim)
        return p * v - p * (p * v).sum(dim, keepdim=True)

    def fisher_factor(self, z: Tensor) -> Tensor:
        """``diag(√p) − p √pᵀ`` at every position, ``[*z.shape, k]`` with k = positions × classes."""
        p = torch.softmax(z, self.class_dim).movedim(self.class_dim, -1)
        root = p.sqrt()
        blocks = torch.diag_embed(root) - p.unsqueeze(-1) * root.unsqueeze(-2)  # [batch, ..., classes, classes]
        batch, classes = p.shape[0], p.shape[-1]
        flat = blocks.reshape(batch, -1, classes, classes)
        positions = flat.shape[1]
        eye = torch.eye(positions, dtype=z.dtype, device=z.device)
        full = torch.einsum("npcd,pq->npcqd", flat, eye).reshape(*p.shape, positions * classes)
        return full.movedim(-2, self.class_dim - 1 if self.class_dim < 0 else self.class_dim)

    def to_mean(self, z: Tensor) -> Tensor:
        """``softmax(z)``."""
        return torch.softmax(z, self.class_dim)

    def mean_fisher_product(self, p: Tensor, v: Tensor) -> Tensor:
        """The Fisher of the output probabilities: ``v / p``."""
        return v / p
