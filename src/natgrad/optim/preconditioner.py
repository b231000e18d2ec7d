"""Kronecker-factored curvature in front of any ``torch.optim`` optimiser."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.base import Statistics, diagonal, factors_from
from natgrad.curvature.cotangents import Expectation, check_expectation, validate_targets
from natgrad.curvature.input_covariance import collect_inputs, input_statistics
from natgrad.curvature.kfac import check_captured, collect, statistics_from
from natgrad.curvature.running import RunningFactors
from natgrad.curvature.uncovered import couples_examples
from natgrad.damping import check_damping
from natgrad.layers.bare import BareRule
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import Coverage, cover
from natgrad.layers.watch import Watch
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.sandwich import check_likelihood
from natgrad.optim import preconditioner_state
from natgrad.optim.input_inverses import InputInverses
from natgrad.optim.inverses import Tikhonov
from natgrad.optim.scaling import KLClip
from natgrad.optim.settings import Periods, Renewal
from natgrad.optim.stats import Stats
from natgrad.optim.structures import check_structure, form_for, inverses_for


class Preconditioner:
    r"""Replaces gradients by ``U = ν (F̆ + λ I)^{-1} ∇h``, for an optimiser of your own to use as its gradients.

    F̆ is the block-diagonal Kronecker-factored Fisher matrix [KFAC, sec. 3, 4.2] of the model's layers (see the page
    "Layers"), as a decayed average over batches::

        z = model(x)
        loss = likelihood.nll(z, y)
        pre.observe(z)              # statistics: one more backward pass, with targets drawn from the model
        loss.backward()
        pre.step()                  # p.grad is now U
        optimizer.step()

    The number of steps, not of batches, is what the periods count: with gradient accumulation call :meth:`observe` for
    every micro-batch and :meth:`step` once; their statistics add up. With a ``GradScaler`` call
    ``scaler.unscale_(optimizer)`` before :meth:`step`.

    Args:
        model: any module.
        likelihood: p(y | z). The curvature is that of ``likelihood.nll``: train on the same number, or one
            proportional to it.
        structure: ``"block_diagonal"``; ``"ekfac"``: second moments of the gradient in the eigenbasis of F̆; or
            ``"input_covariance"``: ``A ⊗ α I``, without a backward pass of its own [THESIS, sec. 6.3.2].
        damping: λ, the coefficient of the identity. May be changed at any time through :attr:`damping`.
        seed: of the preconditioner's own random stream (sampled targets).
        forward: ``forward(model, inputs) → z``, for :meth:`update` on models that are not called as ``model(inputs)``.
        uncovered: trainable parameters that no factor covers are an ``"error"``, or keep their gradient
            (``"identity"``).
        form: factored Tikhonov damping (the default of block_diagonal), or the exact one in the eigenbasis of the
            factors, the only one of ekfac (twice the products for every step, decompositions several times as costly).
        periods: how often statistics and inverses are renewed.
        scaling: ν; None for 1.
        expectation: ``"sampled"``, ``"exact"`` or ``"empirical"`` (which needs y).
        decay: the cap on ε in the decayed averages of the factors, ``ε = min(1 − 1/k, decay)``.
        sharing: how the positions of an example count, as for :func:`natgrad.kronecker_fisher`.
        alpha: α of ``"input_covariance"``.

    Attributes:
        stats: of the last step, read from the device on access: ``steps``, ``damping``, ``nu``, ``skipped`` (estimates
            that were not finite and therefore left out), ``failed_inverses`` and ``bare`` (layers whose gradient was
            left as it was, because they have no inverse yet).

    Raises:
        ValueError: a setting out of range, no layer to cover, or an uncovered parameter (it is named).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        structure: str = "block_diagonal",
        damping: float = 3e-3,
        seed: int = 0,
        forward: Forward | None = None,
        uncovered: str = "error",
        form: Tikhonov | None = None,
        periods: Periods = Renewal(),
        scaling: KLClip | None = KLClip(),
        expectation: Expectation = "sampled",
        decay: float = 0.95,
        sharing: str | Mapping[str, str] = "expand",
        alpha: float = 1.0,
    ) -> None:
        check_structure(structure, ("block_diagonal", "ekfac", "input_covariance"), "Preconditioner")
        if uncovered not in ("error", "identity"):
            raise ValueError(f"uncovered={uncovered!r}: Preconditioner knows 'error' and 'identity'")
        check_likelihood(likelihood)
        check_expectation(likelihood, expectation, targets=(), samples=1)
        self.view, self.likelihood = ModelView(model, forward), likelihood
        self.damping, self.periods, self.scaling, self.expectation = damping, periods, scaling, expectation
        self._coverage = cover(self.view, uncovered, structure, sharing)
        if not self._coverage.blocks:
            raise ValueError(f"model: {type(self.view.module).__name__} has no trainable layer to precondition")
        self.capture = Capture(model, self._coverage.blocks)
        self._watch = Watch(self.view.module, self.capture)
        self._generator = torch.Generator(device=self.view.device).manual_seed(seed)
        self._running = RunningFactors(decay)
        self._inverses = inverses_for(structure, form_for(structure, form), self._coverage, alpha)
        self._inputs_only = isinstance(self._inverses, InputInverses)
        self._pending: Statistics | None = None
        self._steps = 0
        self._observed = False
        self._unchecked = {n for n, block in self._coverage.blocks.items() if not isinstance(block.rule, BareRule)}
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.view.device)
        self.stats = Stats()

    @property
    def damping(self) -> float:
        """λ; a new value takes effect at the next step (with factored damping, at the next renewal of the inverses)."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        check_damping(value)
        if not value > 0:
            raise ValueError(f"damping={value}: expected a positive number, such as 3e-3")
        self._damping = float(value)

    @property
    def due(self) -> bool:
        """Whether the coming step wants statistics; otherwise :meth:`observe` and :meth:`update` do nothing."""
        return not isinstance(self.periods, Renewal) or self.periods.observes(self._steps + 1)

    @property
    def observed(self) -> bool:
        """Whether :meth:`observe` or :meth:`update` was ever called."""
        return self._observed

    def coverage(self) -> Coverage:
        """What is treated how; ``print`` it for a table with parameter counts."""
        return self._coverage

    def observe(self, z: Float[Tensor, "batch ..."], y: Any = None, *, weight: Tensor | None = None) -> None:
        """Take in the curvature of the batch that the model has just seen, when it is due.

        Uses the graph of z for one more backward pass, without gradients of weights, and keeps it for your loss;
        neither ``.grad`` nor the global random streams change. Call it before ``loss.backward()``.

        Args:
            z: the output of ``model(x)``, or what was computed from it; dimension 0 is that of the examples.
            y: the targets, where the curvature depends on them (class weights, ignored targets, ``"empirical"``).
            weight: per-target weights of the loss.

        Raises:
            ValueError: z has no graph, or targets are missing or do not fit.
            RuntimeError: the layers that computed z were not seen (a compiled or reentrantly checkpointed model: use
                :meth:`update`), an input of a layer was changed in place since, or the graph is gone.
        """
        if not isinstance(z, Tensor) or z.ndim == 0:
            raise TypeError("z: expected the model's output, a tensor with the examples in dimension 0")
        self._observed = True
        if not self.due:
            return
        check_expectation(self.likelihood, self.expectation, y, samples=1)
        self._check_parts()
        record = self._watch.take(z)
        try:
            if self._unchecked:
                check_captured(record, z)
                self._unchecked -= {name for name, calls in record.calls.items() if calls}
            validate_targets(self.likelihood, z.detach(), y)
            if self._inputs_only:
                statistics = input_statistics(record, z.shape[0])
            else:
                given = self._settings(weight) | {"targets": y, "coupled": couples_examples(self.view.module)}
                statistics = statistics_from(record, z, self.likelihood, **given)
        except RuntimeError as error:
            if "second time" in str(error):
                raise RuntimeError("the graph of z is gone: call observe(z) before loss.backward()") from error
            raise
        self._add(statistics)

    def update(self, inputs: Any, targets: Any = None, *, weight: Tensor | None = None) -> None:
        """The same as :meth:`observe` by an eager forward and backward pass of its own, when it is due.

        Works with compiled models and with activation checkpointing. Buffers (running statistics of batch
        normalisation) and the global random streams are left as they were.

        Args:
            inputs: one batch, as the model or ``forward`` takes it.
            targets: as y of :meth:`observe`.
            weight: per-target weights of the loss.
        """
        self._observed = True
        if not self.due:
            return
        self._check_parts()
        model = self.view, self.capture, self.likelihood
        if self._inputs_only:
            self._add(collect_inputs(*model, inputs))
        else:
            self._add(collect(*model, inputs, y=targets, **self._settings(weight)))

    def _settings(self, weight: Tensor | None) -> dict[str, Any]:
        """How statistics are estimated."""
        how = {"expectation": self.expectation, "generator": self._generator, "bases": self._inverses.bases}
        return {**how, "weight": weight}

    @torch.no_grad()
    def step(self) -> None:
        """Replace the gradients of the covered layers by preconditioned ones, in place.

        Parameters without a gradient are passed over, gradients of other parameters left alone. A layer has no inverse
        as long as no estimate was finite: then its gradient stays what it is (``stats["bare"]``).

        Raises:
            RuntimeError: nothing was ever observed, or there are several ranks, whose statistics would differ.
        """
        if not self._observed:
            raise RuntimeError(
                "no curvature yet: call observe(z) before loss.backward(), or update(inputs), ahead of step()"
            )
        _refuse_ranks()
        self._steps += 1
        self._renew()
        self.precondition()
        self._watch.clear()
        self._watch.active = self.due

    def skip(self) -> None:
        """Forget what was observed since the last step, for a batch that is left out; counts as skipped."""
        self._skipped += 1
        self._pending = None
        self._watch.clear()

    def _add(self, statistics: Statistics) -> None:
        self._pending = statistics if self._pending is None else self._pending + statistics

    @torch.no_grad()
    def _renew(self) -> None:
        """Averages and inverses from what was observed since the last step."""
        if self._pending is not None:
            usable = torch.ones((), dtype=torch.bool, device=self._skipped.device)
            self._skipped += ~self._inverses.observe(factors_from(self._pending), self._running, usable)
            self._pending = None
        first = not self._inverses
        # The comparison waits for the device, but only until there are inverses.
        if first and (self._running.updates is None or not self._running.updates > 0):
            return
        if first or self.periods.due(self._steps):
            self._inverses.refresh(self._running.factors, self._damping)

    @torch.no_grad()
    def precondition(self) -> None:
        """Replace the gradients as :meth:`step` does, with the inverses there are: nothing is renewed or counted."""
        preconditioned: list[tuple[str, Tensor]] = []
        products: list[Tensor] = []
        bare = 0
        for name in self._coverage.layers:
            gradient = self._gradient(name)
            if gradient is None:
                continue
            inverse = self._inverses.get(name, self._damping)
            if inverse is None:
                bare += 1
                continue
            gradient = gradient.to(diagonal(self._running.factors[name].A).dtype)
            U = inverse.apply(gradient)
            preconditioned.append((name, U))
            products.append(torch.sum(gradient * U))
        nu: Tensor | float = 1.0
        if self.scaling is not None and products:
            nu = self.scaling(torch.stack(products).sum())
        for name, U in preconditioned:
            self._write(name, U * nu)
        self.stats = Stats(
            {
                "steps": self._steps,
                "damping": self._damping,
                "nu": nu,
                "skipped": self._skipped.clone(),
                "failed_inverses": self._inverses.failures,
                "bare": bare,
            }
        )

    def _gradient(self, name: str) -> Float[Tensor, "*stack out columns"] | None:
        """The gradient as the matrix of a block, ``[∂h/∂W ∂h/∂b]``; None where no parameter of it has a gradient."""
        block = self._coverage.blocks[name]
        members = block.parameters
        if all(p.grad is None for p in members.values()):
            return None
        return block.to_matrix({k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in members.items()})

    def _write(self, name: str, U: Float[Tensor, "*stack out columns"]) -> None:
        block = self._coverage.blocks[name]
        members = block.parameters
        for key, part in block.from_matrix(U).items():
            gradient = members[key].grad
            if gradient is not None:
                gradient.copy_(part)

    def _check_parts(self) -> None:
        for name, block in self._coverage.blocks.items():
            if block.trained != tuple(block.members):
                raise ValueError(
                    f"layer {name!r}: requires_grad of its parameters changed since the Preconditioner was made, so "
                    "its factors would no longer fit; make a new Preconditioner after freezing or unfreezing"
                )

    def state_dict(self) -> dict[str, Any]:
        """Averages, inverses, counters and the random stream: tensors and plain numbers, keyed by clean layer names.

        Take it between two steps: statistics that were observed since the last step are not part of it. The shapes do
        not depend on what was observed so far, so that the state of a new object can be the template that
        ``torch.distributed.checkpoint.load`` fills.
        """
        return preconditioner_state.save(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, bit for bit on the same machine with the same number of threads.

        Raises:
            ValueError: the state is of another model or other settings; what does not fit is named, and nothing was
                changed.
        """
        preconditioner_state.load(self, state_dict)


def _refuse_ranks() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "Preconditioner: this process group has several ranks, and each would use the statistics of its own "
            "examples; training on several ranks is not supported yet"
        )
