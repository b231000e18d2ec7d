"""How many operations an update takes, task by task [KFAC, sec. 8].

Multiply-adds of the matrix products and factorisations; what is linear in the number of units or parameters is left
out. A network is a chain of linear layers; the derivative with respect to the data is not computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Multiply-adds of one factorisation in units of d³: Cholesky and the inverse from it; a symmetric eigendecomposition
# (reduction to tridiagonal form, divide and conquer, back-transformation), about nine times as much.
_INVERSE = 0.5
_EIGENVECTORS = 4.5
# Simultaneous diagonalisation of a pair [KFAC, app. B]: Cholesky, two triangular solves and the eigenvectors.
_PAIR = _EIGENVECTORS + 2.0


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of one update, averaged over the periods.

    Attributes:
        tasks: by name, in the order of the list in [KFAC, sec. 8].
        sgd: of one stochastic gradient on the same batch: tasks 1 and 2.
    """

    tasks: dict[str, float]
    sgd: float

    @property
    def total(self) -> float:
        """Of all tasks."""
        return sum(self.tasks.values())

    @property
    def ratio(self) -> float:
        """In units of one SGD update."""
        return self.total / self.sgd

    def relative(self) -> dict[str, float]:
        """Every task in units of one SGD update."""
        return {name: count / self.sgd for name, count in self.tasks.items()}

    def __str__(self) -> str:
        """One line per task."""
        width = max(map(len, self.tasks))
        lines = [f"{name:<{width}}  {share:6.3f}" for name, share in self.relative().items()]
        return "\n".join([*lines, f"{'all, in SGD updates':<{width}}  {self.ratio:6.3f}"])


def kfac_operations(
    sizes: Sequence[tuple[int, int]],
    m: int,
    *,
    tau1: float = 1 / 8,
    tau2: float = 1 / 4,
    T1: int = 5,
    T2: int | None = 20,
    T3: int = 20,
    momentum: bool = True,
    structure: str = "block_diagonal",
    bias: bool = True,
    statistics_every: int = 1,
    rho_share: float = 1.0,
    diagonal_output: bool = False,
    static_input: bool = False,
    low_rank: bool = True,
) -> Operations:
    """The operation count of [KFAC, sec. 8] for a network; the published values are the defaults.

    Args:
        sizes: (inputs, outputs) of every layer, in order.
        m: examples in the batch.
        tau1: τ₁, the share of the batch whose sampled targets update the factors.
        tau2: τ₂, the share on which products with the exact F are computed.
        T1: period of the λ rule: ρ is computed every T₁ updates.
        T2: period of the γ rule, at which three candidates are computed; None without a γ rule.
        T3: period of the inverses.
        momentum: whether products with δ₀ are computed too.
        structure: "block_diagonal", "block_tridiagonal" or "ekfac".
        bias: whether the layers have one, which makes a factor A one larger.
        statistics_every: the factors are estimated every so many updates.
        rho_share: the share of the batch on which ρ is computed.
        diagonal_output: the output layer's G is diagonal and known.
        static_input: the first layer's A is known.
        low_rank: use the rank-m form of task 6 where it is cheaper; block_diagonal only.

    Raises:
        ValueError: an unknown structure, no layer or sizes that are no pairs, or a number out of range.
    """
    if structure not in ("block_diagonal", "block_tridiagonal", "ekfac"):
        raise ValueError(f"structure={structure!r}: expected 'block_diagonal', 'block_tridiagonal' or 'ekfac'")
    if not sizes or not all(isinstance(size, Sequence) and len(size) == 2 for size in sizes):
        raise ValueError(
            f"sizes: expected (inputs, outputs) of every layer, at least of one, such as [(784, 100), (100, 10)]; got "
            f"{sizes}"
        )
    for name, value in (("m", m), ("T1", T1), ("T2", T2), ("T3", T3), ("statistics_every", statistics_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    for name, value in (("tau1", tau1), ("tau2", tau2), ("rho_share", rho_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: expected a share of the batch, from 0 to 1")
    candidates = 1.0 if T2 is None else 1 + 2 / T2
    weights = float(sum(i * o for i, o in sizes))
    above = weights - sizes[0][0] * sizes[0][1]  # the pass that needs no derivative of the data
    n, last = len(sizes), len(sizes) - 1
    sampled = tau1 * m / statistics_every
    inputs = [0 if static_input and k == 0 else i * i for k, (i, _) in enumerate(sizes)]
    outputs = [0 if diagonal_output and k == last else o * o for k, (_, o) in enumerate(sizes)]
    # the tridiagonal form also needs E[ā_i ā_{i+1}ᵀ] and E[g_i g_{i+1}ᵀ]
    cross = sum(sizes[k][0] * sizes[k + 1][0] + sizes[k][1] * sizes[k + 1][1] for k in range(n - 1))
    statistics = sum(inputs) + sum(outputs) + (cross if structure == "block_tridiagonal" else 0)
    if structure == "ekfac":
        statistics += sum(i * i + i * o + o * o for i, o in sizes)  # rotations, and the squares' product
    decompositions = preconditioning = 0.0
    per_factor = _EIGENVECTORS if structure == "ekfac" else _INVERSE
    products = 2 if structure == "ekfac" else 1
    for k, (i, o) in enumerate(sizes):
        columns, known = i + bias, diagonal_output and k == last and structure != "block_tridiagonal"
        decompositions += per_factor * (columns**3 + (0 if known else o**3))
        direct = products * (o * columns**2 + (0 if known else o**2 * columns))
        rank_m = m * (columns**2 + (0 if known else o**2) + o * columns)
        preconditioning += min(direct, rank_m) if low_rank and structure == "block_diagonal" else direct
    if structure == "block_tridiagonal":
        for lower, upper in zip(sizes[:-1], sizes[1:], strict=True):
            found = _edge(lower[0] + bias, lower[1], upper[0] + bias, upper[1])
            decompositions, preconditioning = decompositions + found[0], preconditioning + found[1]
    tasks = {
        "1 forward and backward pass": m * (weights + above),
        "2 gradient": m * weights,
        "3 backward pass with sampled targets": sampled * above,
        "4 statistics": sampled * statistics,
        "5 inverses": candidates / T3 * decompositions,
        "6 preconditioning": candidates * preconditioning,
        "7 products with the exact F": candidates * (1 + momentum) * tau2 * m * (weights + above),
        "8 forward pass for rho": rho_share * m * weights / T1,
    }
    return Operations(tasks, m * (2 * weights + above))


def _edge(columns: int, out: int, upper_columns: int, upper_out: int) -> tuple[float, float]:
    """What a pair of layers adds: its canonical coordinates, and the products of both layers with them.

    As :mod:`natgrad.curvature.edges` does it: of each factor as many coordinates as the smaller layer has.
    """
    ranks, decompositions = [], 0.0
    for n, other in ((columns, upper_columns), (out, upper_out)):
        r, large = min(n, other), max(n, other)
        decompositions += _PAIR * r**3 + large**2 * r + 2 * large * r**2
        ranks.append(r)
    r_a, r_g = ranks
    there = sum(r_g * o * c + r_g * c * r_a for c, o in ((columns, out), (upper_columns, upper_out)))
    return decompositions, 2.0 * there


def paper_coefficients(
    *, tau1: float = 1 / 8, tau2: float = 1 / 4, T1: int = 5, T2: int = 20, T3: int = 20, momentum: bool = True
) -> dict[str, float]:
    r"""What stands before the constants of the paper's summary, for a network of ℓ layers of d units [KFAC, sec. 8].

    C1 and C2 are in units of ``ℓ d² m``; C3, C4 and C6 of ``ℓ d³``; C5 of ``ℓ d² min(d, m)``. C3 and C5 belong to the
    block-diagonal inverse, C4 and C6 to the block-tridiagonal one.
    """
    candidates = 1 + 2 / T2
    return {
        "C1": 2 + tau1 + 2 * (1 + momentum) * candidates * tau2 + 1 / T1,
        "C2": 1 + 2 * tau1,
        "C3": candidates / T3,
        "C4": candidates / T3,
        "C5": candidates,
        "C6": candidates,
    }
