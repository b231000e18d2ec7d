"""The structures of curvature that optimisers know, and what follows from the choice of one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.layers.coverage import Coverage
from natgrad.layers.rules import DiagonalRule
from natgrad.linalg.iterative import NewtonSchulz
from natgrad.linalg.low_rank import LowRank
from natgrad.optim.chain_inverses import ChainInverses
from natgrad.optim.input_inverses import InputInverses
from natgrad.optim.inverses import LayerInverses, Tikhonov
from natgrad.optim.low_rank_inverses import LowRankInverses
from natgrad.optim.scaled_inverses import ScaledInverses
from natgrad.optim.settings import Damping, Rescaling
from natgrad.optim.single_use import SingleUseInverses
from natgrad.optim.static import StaticInputs

# Two products with a layer's whole gradient are half of an update at common batch sizes: low rank makes them cheap.
_FORMS: dict[str, Tikhonov] = {
    "block_diagonal": FactoredTikhonov(solver=LowRank(128)),
    "block_tridiagonal": FactoredTikhonov(solver=LowRank(192)),
    "ekfac": ExactTikhonov(),
}


def check_structure(structure: str, known: Sequence[str], optimiser: str) -> None:
    """Refuse a structure that an optimiser does not know.

    Raises:
        ValueError: with all that it knows.
    """
    if structure not in known:
        raise ValueError(f"structure={structure!r}: {optimiser} knows {', '.join(map(repr, known))}")


def damping_for(structure: str, damping: float | Damping | None) -> Damping:
    """K-FAC's damping, with the structure's form where none was chosen; EKFAC has the exact form alone.

    Raises:
        ValueError: a form that the structure does not have: factored for EKFAC, exact for the block-tridiagonal one.
    """
    given = damping if isinstance(damping, Damping) else Damping(value=damping)
    if given.form is None:
        return replace(given, form=_FORMS.get(structure, FactoredTikhonov()))
    if structure == "block_tridiagonal" and isinstance(given.form, ExactTikhonov):
        raise ValueError(
            f"damping.form={given.form}: structure='block_tridiagonal' has FactoredTikhonov() alone [KFAC, sec. 6.3]; "
            "leave form out"
        )
    solver = given.form.solver if isinstance(given.form, FactoredTikhonov) else None
    if structure == "block_tridiagonal" and isinstance(solver, NewtonSchulz):
        raise ValueError(
            f"damping.form={given.form}: structure='block_tridiagonal' inverts its factors by Cholesky "
            "or as LowRank(...); leave solver out, or pass one"
        )
    if structure != "ekfac":
        return given
    if isinstance(given.form, FactoredTikhonov) and given.form != FactoredTikhonov():
        raise ValueError(f"damping.form={given.form}: structure='ekfac' has ExactTikhonov() alone; leave form out")
    return replace(given, form=ExactTikhonov())


def rescaling_for(structure: str, rescaling: Rescaling) -> Rescaling:
    """K-FAC's rescaling with the structure's choice where none was made.

    Raises:
        ValueError: coefficients of single layers for the block-tridiagonal inverse.
    """
    coupled = structure == "block_tridiagonal"
    if coupled and rescaling.layers:
        raise ValueError(
            f"rescaling={rescaling}: structure='block_tridiagonal' couples neighbouring layers, whose parts are scaled "
            "together; leave layers out"
        )
    return replace(rescaling, layers=not coupled) if rescaling.layers is None else rescaling


def form_for(structure: str, form: Tikhonov | None) -> Tikhonov:
    """How damping enters: by default factored, for EKFAC exact.

    Raises:
        ValueError: EKFAC or the input covariance was asked for the factored form.
    """
    exact = structure in ("ekfac", "input_covariance")
    if exact and isinstance(form, FactoredTikhonov):
        raise ValueError(f"form={form}: structure={structure!r} has ExactTikhonov() alone; leave form out")
    return form or (ExactTikhonov() if exact else FactoredTikhonov())


def inverses_for(
    structure: str, form: Tikhonov, coverage: Coverage, alpha: float = 1.0, *, once: bool = False
) -> LayerInverses:
    """Where the inverses are kept.

    Args:
        structure: of the curvature.
        form: how damping enters.
        coverage: the layers.
        alpha: of the input covariance.
        once: whether every inverse is used for one step.
    """
    if structure == "ekfac":
        return ScaledInverses([name for name, b in coverage.blocks.items() if isinstance(b.rule, DiagonalRule)])
    if structure == "input_covariance":
        return InputInverses(alpha)
    if structure == "block_tridiagonal" and isinstance(form, FactoredTikhonov):
        sizes = {name: (b.factor_shapes[1][0], b.factor_shapes[0][0]) for name, b in coverage.blocks.items()}
        return ChainInverses(form, sizes)
    if isinstance(form, FactoredTikhonov) and isinstance(form.solver, LowRank):
        return LowRankInverses(form)
    if once and structure == "block_diagonal" and isinstance(form, FactoredTikhonov) and form.solver is None:
        return SingleUseInverses(form)
    return LayerInverses(form)


def static_for(structure: str, inputs: Any) -> StaticInputs | None:
    """Inputs that are the same at every update.

    Raises:
        ValueError: there are some, and the structure is block-tridiagonal: there an A that is known beforehand cannot
            stand beside cross factors that are estimated.
    """
    if inputs is None:
        return None
    if structure == "block_tridiagonal":
        raise ValueError(
            "static_inputs: an exact A of the first layer beside estimated cross factors is no covariance, so that "
            "structure='block_tridiagonal' cannot use it; leave static_inputs out"
        )
    return StaticInputs(inputs)
