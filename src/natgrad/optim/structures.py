"""The structures of curvature that optimisers know, and what follows from the choice of one."""

from collections.abc import Sequence
from dataclasses import replace

from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.linalg.low_rank import LowRank
from natgrad.optim.inverses import LayerInverses, Tikhonov
from natgrad.optim.low_rank_inverses import LowRankInverses
from natgrad.optim.scaled_inverses import ScaledInverses
from natgrad.optim.settings import Damping


def check_structure(structure: str, known: Sequence[str], optimiser: str) -> None:
    """Refuse a structure that an optimiser does not know.

    Raises:
        ValueError: with all that it knows.
    """
    if structure not in known:
        raise ValueError(f"structure={structure!r}: {optimiser} knows {', '.join(map(repr, known))}")


def damping_for(structure: str, damping: float | Damping | None) -> Damping:
    """K-FAC's damping; EKFAC has the exact form alone.

    Raises:
        ValueError: a factored form that EKFAC does not have was asked for.
    """
    given = damping if isinstance(damping, Damping) else Damping(value=damping)
    if structure != "ekfac":
        return given
    if isinstance(given.form, FactoredTikhonov) and given.form != FactoredTikhonov():
        raise ValueError(f"damping.form={given.form}: structure='ekfac' has ExactTikhonov() alone; leave form out")
    return replace(given, form=ExactTikhonov())


def form_for(structure: str, form: Tikhonov | None) -> Tikhonov:
    """How damping enters: by default factored, for EKFAC exact.

    Raises:
        ValueError: EKFAC was asked for the factored form.
    """
    if structure == "ekfac" and isinstance(form, FactoredTikhonov):
        raise ValueError(f"form={form}: structure='ekfac' has ExactTikhonov() alone; leave form out")
    return form or (ExactTikhonov() if structure == "ekfac" else FactoredTikhonov())


def inverses_for(structure: str, form: Tikhonov) -> LayerInverses:
    """Where the inverses are kept."""
    if structure == "ekfac":
        return ScaledInverses()
    if isinstance(form, FactoredTikhonov) and isinstance(form.solver, LowRank):
        return LowRankInverses(form)
    return LayerInverses(form)
