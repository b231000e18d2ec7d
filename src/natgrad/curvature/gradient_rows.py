r"""The matrix R of per-example gradients, one row per example, written out only where that is cheaper.

A linear layer's gradient of one example is ``Σ_t g_t ā_tᵀ`` over its uses t, so that a and g hold all of them in
``n (in + out)`` numbers instead of ``n in out``, and inner products between examples cost as little.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.model_view import ModelView


@dataclass(frozen=True)
class LinearRows:
    """Rows ``vec(Σ_t g_t āᵀ_t)`` of one linear layer, by a and g alone.

    Args:
        a: what went into the layer, without the homogeneous 1.
        g: derivatives of each example's own nll with respect to what came out.
        weight: name of the weight.
        bias: name of the bias, or None.
    """

    a: Float[Tensor, "n uses columns"]
    g: Float[Tensor, "n uses out"]
    weight: str
    bias: str | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients."""
        return self.g.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def gram(self, other: "LinearRows | None" = None) -> Float[Tensor, "n m"]:
        """Inner products of all rows with all rows of another batch (default: with each other)."""
        other = self if other is None else other
        inner = self.a.flatten(0, 1) @ other.a.flatten(0, 1).T
        if self.bias is not None:
            inner += 1
        inner *= self.g.flatten(0, 1) @ other.g.flatten(0, 1).T
        uses, others = self.a.shape[1], other.a.shape[1]
        return inner if uses == others == 1 else inner.view(len(self.a), uses, len(other.a), others).sum((1, 3))

    def combine(self, c: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """``Rᵀ c`` by parameter."""
        g = (self.g * c[:, None, None]).flatten(0, 1)
        found = {self.weight: g.T @ self.a.flatten(0, 1)}
        return found if self.bias is None else {**found, self.bias: g.sum(0)}

    def project(self, v: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """``R v`` for a vector by parameter."""
        out = nn.functional.linear(self.a, v[self.weight], None if self.bias is None else v[self.bias])
        return (out * self.g).sum((1, 2))

    def combine_all(self, C: Float[Tensor, "n k"]) -> dict[str, Float[Tensor, "k ..."]]:
        """``Cᵀ R`` by parameter."""
        g = (self.g[:, :, None] * C[:, None, :, None]).flatten(0, 1)
        k, out = g.shape[1:]
        found = {self.weight: (g.flatten(1).T @ self.a.flatten(0, 1)).view(k, out, -1)}
        return found if self.bias is None else {**found, self.bias: g.sum(0)}

    def project_all(self, V: Mapping[str, Float[Tensor, "k ..."]]) -> Float[Tensor, "k n"]:
        """``V Rᵀ`` for several vectors by parameter."""
        weight = V[self.weight]
        out = nn.functional.linear(self.a, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        if self.bias is not None:
            out += V[self.bias]
        return out.mul_(self.g[:, :, None]).sum((1, 3)).T

    def squares(self) -> dict[str, Tensor]:
        """The sums of the squares of every element, by parameter."""
        if self.a.shape[1] == 1:  # (g aᵀ)² = g² (a²)ᵀ
            a, g = self.a[:, 0], self.g[:, 0]
            weight = g.square().T @ a.square()
        else:
            weight = torch.einsum("nto,nti->noi", self.g, self.a).square().sum(0)
        return (
            {self.weight: weight}
            if self.bias is None
            else {self.weight: weight, self.bias: self.g.sum(1).square().sum(0)}
        )

    def tensors(self) -> "list[RowBlock]":
        """The same rows, weight and bias apart."""
        apart: list[RowBlock] = [replace(self, bias=None)]
        return apart if self.bias is None else [*apart, TensorRows(self.g.sum(1), self.bias, self.g.shape[2:])]

    def select(self, index: Tensor) -> "LinearRows":
        """Some of the examples."""
        return replace(self, a=self.a[index], g=self.g[index])

    def written(self) -> "list[TensorRows]":
        """The same rows, written out."""
        n, _, columns = self.a.shape
        out = self.g.shape[-1]
        weight = torch.einsum("nto,nti->noi", self.g, self.a).reshape(n, out * columns)
        rows = [TensorRows(weight, self.weight, (out, columns))]
        return rows if self.bias is None else [*rows, TensorRows(self.g.sum(1), self.bias, (out,))]

    def append(self, other: "RowBlock") -> "LinearRows":
        """These examples, then those of another batch."""
        assert isinstance(other, LinearRows)
        uses = max(self.a.shape[1], other.a.shape[1])
        a, g = (
            torch.cat([nn.functional.pad(t, (0, 0, 0, uses - t.shape[1])) for t in pair])  # a use with g = 0 adds none
            for pair in ((self.a, other.a), (self.g, other.g))
        )
        return replace(self, a=a, g=g)


@dataclass(frozen=True)
class TensorRows:
    """Rows of one parameter, written out.

    Args:
        rows: one gradient per example, flattened.
        name: of the parameter.
        shape: of the parameter.
    """

    rows: Float[Tensor, "n size"]
    name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients."""
        return self.rows.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter."""
        return (self.name,)

    def gram(self, other: "TensorRows | None" = None) -> Float[Tensor, "n m"]:
        """Inner products of all rows with all rows of another batch (default: with each other)."""
        return self.rows @ (self.rows if other is None else other.rows).T

    def combine(self, c: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """``Rᵀ c`` by parameter."""
        return {self.name: (c @ self.rows).view(self.shape)}

    def project(self, v: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """``R v`` for a vector by parameter."""
        return self.rows @ v[self.name].reshape(-1)

    def combine_all(self, C: Float[Tensor, "n k"]) -> dict[str, Float[Tensor, "k ..."]]:
        """``Cᵀ R`` by parameter."""
        return {self.name: (C.T @ self.rows).view(-1, *self.shape)}

    def project_all(self, V: Mapping[str, Float[Tensor, "k ..."]]) -> Float[Tensor, "k n"]:
        """``V Rᵀ`` for several vectors by parameter."""
        return V[self.name].reshape(-1, self.rows.shape[1]) @ self.rows.T

    def squares(self) -> dict[str, Tensor]:
        """The sums of the squares of every element, by parameter."""
        return {self.name: self.rows.square().sum(0).view(self.shape)}

    def tensors(self) -> "list[RowBlock]":
        """Itself."""
        return [self]

    def select(self, index: Tensor) -> "TensorRows":
        """Some of the examples."""
        return replace(self, rows=self.rows[index])

    def written(self) -> "list[TensorRows]":
        """Itself."""
        return [self]

    def append(self, other: "RowBlock") -> "TensorRows":
        """These examples, then those of another batch."""
        assert isinstance(other, TensorRows)
        return replace(self, rows=torch.cat([self.rows, other.rows]))


RowBlock = LinearRows | TensorRows


class GradientRows:
    """The matrix R of per-example gradients ``[n, P]`` in blocks, none of them larger than it must be.

    Args:
        view: the model: the order of the parameters.
        blocks: every trainable parameter once.
    """

    def __init__(self, view: ModelView, blocks: Sequence[RowBlock]) -> None:
        self.view, self.blocks = view, list(blocks)

    def __len__(self) -> int:
        block = self.blocks[0]
        return len(block.a if isinstance(block, LinearRows) else block.rows)

    def combine(self, c: Float[Tensor, " n"]) -> Float[Tensor, " P"]:
        """``Rᵀ c``."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            found |= block.combine(c.to(block.dtype))
        return self.view.to_vector(found)

    def sum(self) -> Float[Tensor, " P"]:
        """The sum of all rows."""
        return self.combine(torch.ones(len(self), dtype=self.view.dtype, device=self.view.device))

    def squares(self) -> Float[Tensor, " P"]:
        """The sum over the examples of the square of every element of the gradient: n times the diagonal of U."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            found |= block.squares()
        return self.view.to_vector(found)

    def project(self, v: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """``R v`` for a vector by parameter."""
        found = [block.project({name: v[name].to(block.dtype) for name in block.names}) for block in self.blocks]
        return torch.stack(found).sum(0)

    def project_all(self, V: Mapping[str, Float[Tensor, "k ..."]]) -> Float[Tensor, "k n"]:
        """``V Rᵀ`` for several vectors by parameter."""
        return torch.stack([block.project_all(V) for block in self.blocks]).sum(0)

    def gram(self, other: "GradientRows | None" = None) -> Float[Tensor, "n m"]:
        """``R Rᵀ``, or ``R Sᵀ`` with the rows S of another batch."""
        others = [None] * len(self.blocks) if other is None else other.blocks
        products = [mine.gram(theirs) for mine, theirs in zip(self.blocks, others, strict=True)]  # type: ignore
        return torch.stack(products).sum(0) if len(products) > 1 else products[0]

    def to_dense(self) -> Float[Tensor, "n P"]:
        """All gradients written out."""
        eye = torch.eye(len(self), dtype=self.view.dtype, device=self.view.device)
        return torch.stack([self.combine(row) for row in eye])

    def append(self, other: "GradientRows") -> "GradientRows":
        """These examples, then those of another batch."""
        forms = [{block.names: type(block) for block in blocks} for blocks in (self.blocks, other.blocks)]
        mine, theirs = self.blocks, other.blocks
        if forms[0] != forms[1]:  # what is written out depends on the number of uses
            mine, theirs = ([one for block in blocks for one in block.written()] for blocks in (mine, theirs))
        found = {block.names: block for block in theirs}
        return GradientRows(self.view, [block.append(found[block.names]) for block in mine])


def written_out(blocks: Sequence[LinearRows]) -> Iterator[RowBlock]:
    """Layers with so many uses per example that products of a and g would cost more than the gradients themselves."""
    for block in blocks:
        uses, columns = block.a.shape[1:]
        out = block.g.shape[-1]
        if uses == 1 or uses**2 * (columns + out) <= columns * out:
            yield block
        else:
            yield from block.written()
