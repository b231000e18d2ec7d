"""A linear layer that sees its input whitened: natural neural networks [THESIS, sec. 6.5.2]."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from natgrad.layers.factors import flatten_rows
from natgrad.linalg.covariance import SymmetricForm, covariance_inverse_root, low_rank


class WhitenedLinear(nn.Linear):
    r"""``a = V U (h − μ) + d``: V is ``weight``, d is ``bias``, and U and μ are buffers that are not trained.

    An ``nn.Linear`` becomes one in place (:meth:`convert`) and an ``nn.Linear`` again (:meth:`restore`), with the same
    parameter objects under the same names and the same function of the input.

    U is symmetric, ``(C + ε I)^{-1/2}``, kept dense or as ``scale I − root rootᵀ``. With h̄ and C of the input the
    effective input ``h_e = U (h − μ)`` has mean 0 and covariance ``C (C + ε I)^{-1}``. Per call the cheaper way is
    taken: U on the rows, or once on V, ``a = (V U) (h − μ) + d``.

    A layer without a trained bias is whitened without centring: μ = 0, and C is the second moment.
    """

    mean: Float[Tensor, " in"]
    root: Float[Tensor, "in k"]
    scale: Float[Tensor, ""]
    rank: int | None
    centred: bool

    @staticmethod
    @torch.no_grad()
    def convert(layer: nn.Linear, examples: int | None = None, damping: float = 1.0) -> "WhitenedLinear":
        """Turn a layer into a whitened one with U = I and μ = 0.

        Args:
            layer: exactly an ``nn.Linear``; it is changed.
            examples: the number of rows that C will be estimated from; few make U the identity and a matrix of that
                rank. None for a dense U.
            damping: ε; without any there is no low-rank form.

        Raises:
            TypeError: a subclass of ``nn.Linear``, or something else.
        """
        if type(layer) is not nn.Linear:
            raise TypeError(f"layer: expected an nn.Linear, got {type(layer).__name__}")
        d, weight = layer.in_features, layer.weight
        layer.__class__ = WhitenedLinear
        assert isinstance(layer, WhitenedLinear)  # for the type checker
        layer.rank = examples if low_rank(examples, d, damping) else None
        layer.centred = layer.bias is not None and layer.bias.requires_grad
        layer.register_buffer("mean", weight.new_zeros(d))
        root = torch.eye(d, dtype=weight.dtype, device=weight.device)
        layer.register_buffer("root", root if layer.rank is None else weight.new_zeros(d, layer.rank))
        layer.register_buffer("scale", weight.new_ones(()))
        return layer

    @property
    def whitening(self) -> SymmetricForm:
        """U."""
        return _form(self.root, self.scale, self.rank)

    @torch.no_grad()
    def ordinary(self) -> tuple[Tensor, Tensor | None]:
        """W = V U and b = d − W μ of the ordinary layer that computes the same."""
        W = self.whitening.right_product(self.weight)
        return W, self.bias if not self.centred else self.bias - W @ self.mean

    @torch.no_grad()
    def restore(self) -> nn.Linear:
        """Become an ``nn.Linear`` again: the same parameter objects, holding W and b."""
        W, b = self.ordinary()
        self.weight.copy_(W)
        if self.centred and b is not None:
            self.bias.copy_(b)
        for name in ("mean", "root", "scale"):
            delattr(self, name)
        del self.rank, self.centred
        self.__class__ = nn.Linear  # pyrefly: ignore[bad-argument-type] - the way back from `convert`
        return self

    @torch.no_grad()
    def rewhiten(self, h: Float[Tensor, "... in"], damping: float) -> bool:
        """New U and μ from rows of the layer's input, and the V and d that keep what the layer computes.

        Returns:
            False, with nothing changed, where the covariance has no inverse root: not finite, or singular without
            damping.
        """
        rows = flatten_rows(h).to(torch.promote_types(self.weight.dtype, torch.float32))
        if self.rank is not None:
            rows = rows[: self.rank]
        root, inverse = covariance_inverse_root(rows, damping, rank=self.rank, centre=self.centred)
        if not root.ok:
            return False
        W, b = self.ordinary()
        self.weight.copy_(inverse.right_product(W.to(rows.dtype)))
        if self.centred and b is not None:
            self.mean.copy_(rows.mean(0))
            self.bias.copy_(b + W @ self.mean)
        self.root.copy_(root.basis if root.dense is None else root.dense)
        self.scale.copy_(root.scale)
        return True

    def effective_input(self, h: Float[Tensor, "... in"]) -> Float[Tensor, "... in"]:
        """``h_e = U (h − μ)``."""
        rows = flatten_rows(h)
        rows = rows - self.mean if self.centred else rows
        return self.whitening.right_product(rows).reshape(h.shape)

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``V U (h − μ) + d``."""
        passes = 2 if input.requires_grad else 1
        rows = input.numel() // max(1, input.shape[-1])
        if rows * passes < self.out_features * 2:
            return functional.linear(self.effective_input(input), self.weight, self.bias)
        W = self.whitening.right_product(self.weight)
        return functional.linear(input - self.mean if self.centred else input, W, self.bias)


def _form(root: Tensor, scale: Tensor, rank: int | None) -> SymmetricForm:
    ok = torch.ones((), dtype=torch.bool, device=root.device)
    dense = root if rank is None else None
    return SymmetricForm(dense, scale, root.new_zeros(root.shape[0], 0) if rank is None else root, ok)
