r"""Additive statistics, and the one place where they are divided.

For a layer with inputs a (with the homogeneous 1 last) and output derivatives g, over N examples, R rows (uses of the
layer) and the likelihood's normaliser ``count``:

.. math:: A = \frac{1}{N} \sum_r a_r a_r^T, \qquad G = \frac{N}{\text{count}} \, \frac{1}{R} \sum_r g_r g_r^T,

so that ``A ⊗ G`` approximates the curvature of the number that ``likelihood.nll`` returns [KFAC, sec. 3, eq. 1]. For
the empirical Fisher ``count`` is N. A layer that is used several times per example has A summed and G averaged over
its uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.gram import Gram


@dataclass(frozen=True)
class Diagonal:
    """A diagonal matrix, by its diagonal."""

    vector: Float[Tensor, " d"]

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        return torch.Size((self.vector.shape[0], self.vector.shape[0]))

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix itself."""
        return torch.diag(self.vector)


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors of one layer's block ``A ⊗ G``; either may be :class:`Diagonal` or :class:`Gram`.

    A grouped layer has a stack of blocks: both factors then have a leading dimension, and so has the matrix they act
    on.

    Args:
        A: ``[in (+1), in (+1)]``; the homogeneous coordinate is the last.
        G: ``[out, out]``.
        S: second moments of the gradient in the eigenbasis of A and G (see :mod:`natgrad.curvature.ekfac`), or None.
    """

    A: Float[Tensor, "*stack columns columns"] | Diagonal | Gram
    G: Float[Tensor, "*stack out out"] | Diagonal | Gram
    S: Float[Tensor, "out columns"] | None = None

    def to_dense(self) -> Float[Tensor, "size size"]:
        """``A ⊗ G``, which acts on the stacked columns of ``[W b]``; of a stack the blocks after each other."""
        return kron_blocks(to_dense(self.A), to_dense(self.G))


@dataclass
class LayerSums:
    """Sums of outer products of one layer. A vector stands for a diagonal matrix; few rows are kept as such.

    Args:
        A: ``Σ a aᵀ``, ``[in (+1), in (+1)]``, or its diagonal.
        G: ``Σ g gᵀ``, ``[out, out]``, or its diagonal; per draw or summed over the columns of an exact expectation.
        rows: how many rows (uses of the layer) the sums run over; for a stack of blocks possibly a tensor that
            broadcasts to G.
        squares: ``Σ (Q_Gᵀ ∇_n Q_A)²`` over examples in a given eigenbasis, ``[out, in (+1)]``, or None.
    """

    A: Tensor | Gram
    G: Tensor | Gram
    rows: float | Tensor
    squares: Tensor | None = None

    def __add__(self, other: "LayerSums") -> "LayerSums":
        """Sums over both sets of rows; a diagonal added to a full matrix is written out."""
        squares = None if self.squares is None or other.squares is None else self.squares + other.squares
        return LayerSums(_added(self.A, other.A), _added(self.G, other.G), self.rows + other.rows, squares)

    def scaled(self, factor: float) -> "LayerSums":
        """All sums times a number."""
        squares = None if self.squares is None else self.squares * factor
        return LayerSums(self.A * factor, self.G * factor, self.rows * factor, squares)


@dataclass
class Statistics:
    """What curvature needs to know of some examples. Chunks, micro-batches and ranks add up: ``s1 + s2``.

    Args:
        layers: sums by clean layer name; of a chain also those of neighbours (:mod:`natgrad.curvature.pairs`).
        examples: N.
        count: the likelihood's normaliser for these examples; N for an empirical estimate.
        additive: whether ``count`` adds up over batches; False where the loss is a plain sum (normaliser "none").
    """

    layers: dict[str, LayerSums] = field(default_factory=dict)
    examples: float = 0.0
    count: Float[Tensor, ""] | float = 0.0
    additive: bool = True

    def has(self, layer: str) -> bool:
        """Whether the output depends on a layer, as far as that is known without waiting for a device."""
        rows = self.layers[layer].rows
        return isinstance(rows, Tensor) or rows > 0

    def __add__(self, other: "Statistics") -> "Statistics":
        """Those of both sets of examples."""
        layers = dict(self.layers)
        for name, sums in other.layers.items():
            layers[name] = layers[name] + sums if name in layers else sums
        count = self.count + other.count if self.additive and other.additive else other.count
        return Statistics(layers, self.examples + other.examples, count, self.additive and other.additive)

    def scaled(self, factor: float) -> "Statistics":
        """As if every example counted ``factor`` times; the factors stay the same, their weight in a sum does not."""
        layers = {name: sums.scaled(factor) for name, sums in self.layers.items()}
        return replace(self, layers=layers, examples=self.examples * factor, count=self.count * factor)

    def standing_for(self, examples: int) -> "Statistics":
        """These examples as those of a batch of so many: what a plain sum counts (1) is not multiplied."""
        if examples == self.examples:
            return self
        found = self.scaled(examples / self.examples)
        return found if self.additive else replace(found, count=self.count)

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, keyed by layer name and sum."""
        state = {"examples": torch.tensor(self.examples, dtype=torch.float64)}
        state["count"] = torch.as_tensor(self.count).clone()
        state["additive"] = torch.tensor(self.additive)
        for name, sums in self.layers.items():
            state[f"{name}/A"], state[f"{name}/G"] = to_dense(sums.A), to_dense(sums.G)
            state[f"{name}/rows"] = torch.as_tensor(sums.rows, dtype=torch.float64)
            if sums.squares is not None:
                state[f"{name}/squares"] = sums.squares
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Statistics":
        """The inverse of :meth:`state`."""
        names = [key.removesuffix("/A") for key in state if key.endswith("/A")]
        layers = {
            n: LayerSums(state[f"{n}/A"], state[f"{n}/G"], _rows(state[f"{n}/rows"]), state.get(f"{n}/squares"))
            for n in names
        }
        return cls(layers, float(state["examples"]), state["count"].clone(), bool(state["additive"]))


def factors_from(statistics: Statistics, *, in_place: bool = False) -> dict[str, Factors]:
    """``A = ΣA / N`` and ``G = ΣG / rows · N / count`` of every layer; zero for a layer that was never used.

    The second moments in an eigenbasis, where they were collected, are ``S = Σ(Qᵀ∇)² / count``.

    Args:
        statistics: of at least one example.
        in_place: divide the sums themselves; the statistics can then no longer be used.

    Raises:
        ValueError: the statistics hold no example.
    """
    if not statistics.examples > 0:
        raise ValueError("statistics of no example: add those of at least one batch first")
    layers = statistics.layers
    unit = statistics.examples / statistics.count
    scale = {s.rows: unit / s.rows if s.rows else 0.0 for s in layers.values() if not isinstance(s.rows, Tensor)}
    factors = {}
    for name, sums in layers.items():
        if isinstance(sums.rows, Tensor):
            per_row = torch.where(sums.rows > 0, unit / sums.rows, 0.0).to(to_dense(sums.G).dtype)
        else:
            per_row = scale[sums.rows]
        squares = None if sums.squares is None else sums.squares / statistics.count
        A, G = _times(sums.A, 1 / statistics.examples, in_place), _times(sums.G, per_row, in_place)
        factors[name] = Factors(_factor(A), _factor(G), squares)
    return factors


def to_dense(factor: Tensor | Diagonal | Gram) -> Float[Tensor, "*stack d d"]:
    """A factor as a matrix, or a stack of them."""
    return factor if isinstance(factor, Tensor) else factor.to_dense()


def entries(factor: Tensor | Diagonal | Gram) -> Tensor:
    """A factor as a matrix, a diagonal one as its diagonal."""
    return factor.vector if isinstance(factor, Diagonal) else to_dense(factor)


def diagonal(factor: Tensor | Diagonal | Gram) -> Float[Tensor, " d"]:
    """The diagonal of a factor."""
    return factor.vector if isinstance(factor, Diagonal) else to_dense(factor).diagonal()


def kron(A: Float[Tensor, "a b"], G: Float[Tensor, "c d"]) -> Float[Tensor, "ac bd"]:
    """``A ⊗ G``; `torch.kron` fails on some pairs of strided matrices."""
    return torch.kron(A.contiguous(), G.contiguous())


def kron_blocks(A: Float[Tensor, "*stack a b"], G: Float[Tensor, "*stack c d"]) -> Float[Tensor, "ac bd"]:
    """``A ⊗ G``; of a stack the blocks after each other along the diagonal."""
    return kron(A, G) if A.ndim == 2 else torch.block_diag(*(kron(a, g) for a, g in zip(A, G, strict=True)))


def _rows(saved: Tensor) -> float | Tensor:
    return saved if saved.ndim else float(saved)


def _times(total: Tensor | Gram, factor: float | Tensor, in_place: bool) -> Tensor | Gram:
    return total.mul_(factor) if in_place and isinstance(total, Tensor) else total * factor


def _factor(mean: Tensor | Gram) -> Tensor | Diagonal | Gram:
    return Diagonal(mean) if isinstance(mean, Tensor) and mean.ndim == 1 else mean


def _added(x: Tensor | Gram, y: Tensor | Gram) -> Tensor | Gram:
    if isinstance(x, Gram) and isinstance(y, Gram):
        return x + y
    x, y = to_dense(x), to_dense(y)
    if x.ndim != y.ndim:
        x, y = (torch.diag(t) if t.ndim == 1 else t for t in (x, y))
    return x + y
