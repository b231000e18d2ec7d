"""A linear layer that sees its input whitened: natural neural networks [THESIS, sec. 6.5.2]."""

from typing import Any

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
        if self.centred:
            rows = rows - self.mean
            if not h.requires_grad and _plain(h, self.mean):  # nothing remembers these rows
                return self.whitening.right_product_(rows).reshape(h.shape)
        return self.whitening.right_product(rows).reshape(h.shape)

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``V U (h − μ) + d``."""
        passes = 2 if input.requires_grad else 1
        rows = input.numel() // max(1, input.shape[-1])
        if rows * passes < self.out_features * 2:
            return functional.linear(self.effective_input(input), self.weight, self.bias)
        if _plain(input, self.weight):
            shape = (*input.shape[:-1], self.out_features)
            mean = self.mean if self.centred else None
            return _Composed.apply(flatten_rows(input), self.weight, self.bias, mean, self.whitening).reshape(shape)
        W = self.whitening.right_product(self.weight)
        return functional.linear(input - self.mean if self.centred else input, W, self.bias)


class _Composed(torch.autograd.Function):
    """``h (V U)ᵀ + d − V U μ`` and its derivatives, in fewer passes over memory than automatic differentiation takes.

    The weight's gradient is ``(gᵀ h − (Σ g) μᵀ) U``, g being that of the output: the centring is of rank one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Float[Tensor, "rows in"],
        V: Float[Tensor, "out in"],
        d: Float[Tensor, " out"] | None,
        mean: Float[Tensor, " in"] | None,
        U: SymmetricForm,
    ) -> Float[Tensor, "rows out"]:
        W = U.right_product(V)
        ctx.form = U
        ctx.save_for_backward(h, V, W, mean)
        ctx.save_for_forward(h, W, mean)
        return functional.linear(h, W, _shifted(d, W, mean))

    @staticmethod
    def backward(ctx: Any, g: Float[Tensor, "rows out"]) -> tuple[Any, ...]:  # pyrefly: ignore[bad-override]
        h, V, W, mean = ctx.saved_tensors
        needs_h, needs_V, needs_d = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()  # second derivatives: W depends on V
        dh = g @ (ctx.form.right_product(V) if again else W) if needs_h else None
        dd = g.sum(0) if needs_d or (needs_V and mean is not None) else None
        dV = None
        if needs_V:
            dW = g.T @ h
            if mean is not None and dd is not None:
                dW = dW.addr_(dd, mean, alpha=-1)
            dV = ctx.form.right_product(dW) if again else ctx.form.right_product_(dW)
        return dh, dV, dd if needs_d else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Float[Tensor, "rows out"]:
        dh, dV, dd = tangents[:3]
        h, W, mean = ctx.saved_tensors
        out = h.new_zeros(h.shape[0], W.shape[0]) if dh is None else dh @ W.T
        if dV is not None:
            out = out + (h if mean is None else h - mean) @ ctx.form.right_product(dV).T
        return out if dd is None else out + dd


def _shifted(d: Tensor | None, W: Tensor, mean: Tensor | None) -> Tensor | None:
    return d if mean is None or d is None else torch.addmv(d, W, mean, alpha=-1)


def _plain(h: Tensor, V: Tensor) -> bool:
    """Whether nothing is at work that wants to see the single operations: mixed precision, a transform, a compiler."""
    return (
        h.dtype == V.dtype
        and not torch.is_autocast_enabled(h.device.type)
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
    )


def _form(root: Tensor, scale: Tensor, rank: int | None) -> SymmetricForm:
    ok = torch.ones((), dtype=torch.bool, device=root.device)
    dense = root if rank is None else None
    return SymmetricForm(dense, scale, root.new_zeros(root.shape[0], 0) if rank is None else root, ok)
