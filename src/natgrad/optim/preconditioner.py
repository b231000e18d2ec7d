"""Kronecker-factored curvature in front of any ``torch.optim`` optimiser."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from natgrad.curvature.cotangents import Expectation, check_expectation, validate_targets
from natgrad.curvature.input_covariance import collect_inputs, input_statistics
from natgrad.curvature.kfac import check_captured, collect, share_of_statistics
from natgrad.curvature.loss_statistics import LossStatistics
from natgrad.curvature.running import RunningFactors
from natgrad.curvature.uncovered import couples_examples
from natgrad.distributed import collectives
from natgrad.layers.bare import BareRule
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import Coverage, Uncovered, cover
from natgrad.layers.watch import Watch
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.sandwich import check_likelihood
from natgrad.optim import preconditioner_state
from natgrad.optim.arguments import check_objects, seeded, warn_of_size
from natgrad.optim.input_inverses import InputInverses
from natgrad.optim.inverses import Tikhonov
from natgrad.optim.preconditioner_checks import Unchanged, check_output, refuse_shards, refuse_transforms
from natgrad.optim.preconditioner_gradients import Proposal, gradient_of, outside_autocast, replace_gradients
from natgrad.optim.preconditioner_settings import DEFAULT_DAMPING, damping_by_layer, layers_by_damping, uniform
from natgrad.optim.preconditioner_statistics import Pending, estimated, noted, report
from natgrad.optim.scaling import KLClip, Scaling, Unscaled
from natgrad.optim.settings import Periods, Renewal
from natgrad.optim.stats import Stats
from natgrad.optim.structures import check_structure, form_for, inverses_for

# Between the random streams of two ranks; those of two seeds are one apart.
_RANK_STRIDE = 0x9E3779B97F4A7C15


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
        damping: λ, the coefficient of the identity; or a mapping from names of layers, or of modules around them, to λ,
            with ``""`` for all others. May be changed at any time through :attr:`damping`. It stands beside the
            curvature of ``likelihood.nll``: where that is a sum in place of a mean, λ has to be as many times larger.
        seed: of the preconditioner's own random stream (sampled targets).
        forward: ``forward(model, inputs) → z``, for :meth:`update` on models that are not called as ``model(inputs)``.
        uncovered: trainable parameters that no factor covers are an ``"error"``, keep their gradient
            (``"identity"``), or have the ``"diagonal"`` of their block, as the bare parameters of a module of your own.
        exclude: names of modules (with all that is inside), layers or bare parameters that keep their gradient.
        form: factored Tikhonov damping (the default of block_diagonal), or the exact one in the eigenbasis of the
            factors, the only one of ekfac (twice the products for every step, decompositions several times as costly).
        periods: how often statistics and inverses are renewed.
        scaling: ν: a :class:`KLClip` (the default), a :class:`Grafting`, or None for 1.
        expectation: whose targets: ``"sampled"`` (drawn from the model), ``"exact"`` (all of them), or ``"empirical"``,
            the training targets: then :meth:`observe` needs y and costs no backward pass. What that loses: the
            empirical Fisher is no Gauss-Newton matrix. It shrinks with the residuals, so that steps grow where the
            model fits, and it may turn a good gradient away from the minimum (Kunstner et al. 2019).
        decay: the cap on ε in the decayed averages of the factors, ``ε = min(1 − 1/k, decay)``.
        sharing: how the positions of an example count, as for :func:`natgrad.kronecker_fisher`.
        alpha: α of ``"input_covariance"``.

    Attributes:
        stats: of the last step, read from the device on access: ``steps``, ``damping``, ``nu`` (the mean over layers),
            ``skipped`` (estimates that were not finite and therefore left out), ``nonfinite`` (steps whose gradients
            were not finite and therefore left as they were), ``missed`` (steps that wanted statistics and got none),
            ``failed_inverses`` and ``bare`` (layers whose gradient was left as it was, because they have no inverse
            yet), ``rows`` and ``positions`` (the shares of `Renewal`).

    Raises:
        ValueError: a setting out of range, no layer to cover, or an uncovered parameter (it is named).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        structure: str = "block_diagonal",
        damping: float | Mapping[str, float] = DEFAULT_DAMPING,
        seed: int = 0,
        forward: Forward | None = None,
        uncovered: Uncovered = "error",
        exclude: Collection[str] = (),
        form: Tikhonov | None = None,
        periods: Periods = Renewal(),
        scaling: Scaling | None = KLClip(),
        expectation: Expectation = "sampled",
        decay: float = 0.95,
        sharing: str | Mapping[str, str] = "expand",
        alpha: float = 1.0,
    ) -> None:
        check_structure(structure, ("block_diagonal", "ekfac", "input_covariance"), "Preconditioner")
        check_likelihood(likelihood)
        check_objects(form=form, periods=periods, scaling=scaling)
        check_expectation(likelihood, expectation, targets=(), samples=1)
        self.view, self.likelihood = ModelView(model, forward), likelihood
        refuse_shards(self.view.parameters)
        self.periods, self.scaling, self.expectation = periods, scaling, expectation
        self._coverage = cover(self.view, uncovered, structure, sharing, exclude, bare=True)
        if not self._coverage.blocks:
            raise ValueError(f"model: {type(self.view.module).__name__} has no trainable layer to precondition")
        warn_of_size(self._coverage.blocks, structure)
        self._damping = damping_by_layer(damping, self._coverage.blocks)
        self.capture = Capture(model, self._coverage.blocks)
        self._watch = Watch(self.view.module, self.capture)
        self._unchanged = Unchanged(self.view.module)
        # Every rank draws targets of its own.
        self._generator = seeded(seed, self.view.device, offset=collectives.rank() * _RANK_STRIDE)
        self._running = RunningFactors(decay)
        self._inverses = inverses_for(
            structure, form_for(structure, form), self._coverage, alpha, once=periods.inverses == 1
        )
        self._inputs_only = isinstance(self._inverses, InputInverses)
        self._unchecked = {n for n, block in self._coverage.blocks.items() if not isinstance(block.rule, BareRule)}
        # The diagonal of a bare parameter needs the gradient of every example: a backward pass of its own.
        bare = len(self._unchecked) < len(self._coverage.blocks)
        self._from_loss = expectation == "empirical" and not bare and not self._inputs_only
        self._pending = Pending()
        self._steps, self._observed = 0, False
        self._skipped, self._nonfinite = torch.zeros((2,), dtype=torch.int64, device=self.view.device).unbind()
        self.stats = Stats()

    @property
    def damping(self) -> float | dict[str, float]:
        """λ, by layer where layers differ; a mapping that is assigned leaves the layers that it does not name.

        A new value takes effect at the next step (with factored damping, at the next renewal of the inverses).
        """
        return uniform(self._damping)

    @damping.setter
    def damping(self, value: float | Mapping[str, float]) -> None:
        self._damping = damping_by_layer(value, self._coverage.blocks, self._damping)

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
        return noted(self._coverage, self.periods)

    def observe(self, z: Float[Tensor, "batch ..."], y: Any = None, *, weight: Tensor | None = None) -> None:
        """Take in the curvature of the batch that the model has just seen, when it is due.

        Uses the graph of z for one more backward pass, without gradients of weights, and keeps it for your loss;
        neither ``.grad`` nor the global random streams change. Call it before ``loss.backward()``. With
        ``expectation="empirical"`` there is no pass of its own: ``loss.backward()`` makes the derivatives, of a loss
        that may be any multiple of ``likelihood.nll`` (models with bare parameters excepted, see the page "Layers").

        Args:
            z: the output of ``model(x)``, or what was computed from it; dimension 0 is that of the examples.
            y: the targets, where the curvature depends on them (class weights, ignored targets, ``"empirical"``).
            weight: per-target weights of the loss.

        Raises:
            TypeError: z is no tensor.
            ValueError: z has no graph, is not the model's output or does not fit the likelihood, targets are missing or
                do not fit, or the model's parameters are others than when this object was made.
            RuntimeError: the layers that computed z were not seen (a compiled or reentrantly checkpointed model: use
                :meth:`update`), an input of a layer was changed in place since, the graph is gone, or a transform of
                ``torch.func`` is at work.
        """
        check_output(z)
        self._observed = True
        if not self.due:
            return
        self._thin()
        check_expectation(self.likelihood, self.expectation, y, samples=1)
        self._unchanged.check(self._coverage.blocks)
        record = self._watch.take(z)
        try:
            if self._unchecked:
                check_captured(record, z)
                self._unchecked -= {name for name, calls in record.calls.items() if calls}
            validate_targets(self.likelihood, z.detach(), y)
            if self._inputs_only:
                self._pending.add(input_statistics(record, z.shape[0], self._share))
            elif self._from_loss:
                how = {"targets": y, "weight": weight, "bases": self._inverses.bases, "share": self._share}
                self._pending.expect(LossStatistics(record, z, self.likelihood, **how))
            else:
                how = self._settings(weight) | {"targets": y, "coupled": couples_examples(self.view.module)}
                with torch.autocast(z.device.type, enabled=False):
                    self._pending.add(share_of_statistics(record, z, self.likelihood, **how))
        except RuntimeError as error:
            if "second time" in str(error):
                raise RuntimeError("the graph of z is gone: call observe(z) before loss.backward()") from error
            raise

    def update(self, inputs: Any, targets: Any = None, *, weight: Tensor | None = None) -> None:
        """The same as :meth:`observe` by an eager forward and backward pass of its own, when it is due.

        Works with compiled models and with activation checkpointing. Buffers (running statistics of batch
        normalisation) and the global random streams are left as they were.

        Args:
            inputs: one batch, as the model or ``forward`` takes it.
            targets: as y of :meth:`observe`.
            weight: per-target weights of the loss.
        """
        refuse_transforms()
        self._observed = True
        if not self.due:
            return
        self._thin()
        self._unchanged.check(self._coverage.blocks)
        self._watch.settle()
        model = self.view, self.capture, self.likelihood
        if self._inputs_only:
            self._pending.add(collect_inputs(*model, inputs, share=self._share))
        else:
            self._pending.add(collect(*model, inputs, y=targets, **self._settings(weight)))

    def _thin(self) -> None:
        if isinstance(self.periods, Renewal):
            self.capture.positions = self.periods.thinning(self._steps + 1)

    def _settings(self, weight: Tensor | None) -> dict[str, Any]:
        """How statistics are estimated."""
        how = {"expectation": self.expectation, "generator": self._generator, "bases": self._inverses.bases}
        return {**how, "weight": weight, "share": self._share}

    @property
    def _share(self) -> float:
        return self.periods.rows if isinstance(self.periods, Renewal) else 1.0

    @outside_autocast
    def step(self, usable: Bool[Tensor, ""] | None = None) -> None:
        """Replace the gradients of the covered layers by preconditioned ones, in place.

        Parameters without a gradient are passed over, gradients of other parameters left alone. As long as no estimate
        was finite, or no output that was observed depended on a layer, its gradient stays what it is
        (``stats["bare"]``). Where a gradient is not finite, all stay what they are (``stats["nonfinite"]``). The
        statistics of all ranks of a process group add up, so that every rank has the same inverses.

        Args:
            usable: False, on the device, leaves out what was observed since the last step and counts it as skipped.

        Raises:
            RuntimeError: nothing was ever observed, no covered parameter has a gradient, or only some ranks of the
                process group observed something; with ``"empirical"``, the loss's backward pass did not happen.
            ValueError: with ``"empirical"``, the loss is not a multiple of ``likelihood.nll``.
        """
        if not self._observed:
            raise RuntimeError(
                "no curvature yet: call observe(z) before loss.backward(), or update(inputs), ahead of step()"
            )
        if all(p.grad is None for block in self._coverage.blocks.values() for p in block.parameters.values()):
            raise RuntimeError("no covered parameter has a gradient: call loss.backward() ahead of step()")
        statistics = self._pending.take(self.view.device, self._steps + 1) if self.due else None
        taken = torch.ones((), dtype=torch.bool, device=self._skipped.device) if usable is None else usable
        fresh: set[str] = set()
        if statistics is not None:
            estimate = estimated(statistics)
            fresh = estimate.keys() - self._running.factors.keys()
            taken = self._inverses.observe(estimate, self._running, taken)
        self._skipped = self._skipped + ~taken
        self._steps += 1
        if self._running.factors:
            self._renew(fresh)
        self.precondition()
        self._watch.clear()
        self._watch.active = self.due

    def skip(self) -> None:
        """Forget what was observed since the last step, for a batch that is left out; counts as skipped."""
        self._skipped = self._skipped + 1
        self._pending.clear()
        self._watch.clear()

    def _renew(self, fresh: Collection[str]) -> None:
        """Inverses from the averages, when they are due; those of layers that were not seen before, at once."""
        first, known = not self._inverses, self._running.factors
        # The comparison waits for the device, but only until there are inverses.
        if first and (self._running.updates is None or not self._running.updates > 0):
            return
        wanted = known if first or self.periods.due(self._steps) else fresh
        for damping, names in layers_by_damping(self._damping).items():
            self._inverses.refresh({name: known[name] for name in names if name in wanted and name in known}, damping)

    @outside_autocast
    def precondition(self) -> None:
        """Replace the gradients as :meth:`step` does, with the inverses there are: nothing is renewed or counted."""
        proposals: list[Proposal] = []
        scaling = Unscaled() if self.scaling is None else self.scaling
        bare = 0
        for name, block in self._coverage.blocks.items():
            members = block.parameters
            gradient = gradient_of(block, members)
            if gradient is None:
                continue
            inverse = self._inverses.get(name, self._damping[name])
            if inverse is None:
                bare += 1
                continue
            gradient = gradient.to(block.dtype)
            U = inverse.apply(gradient)
            proposals.append(Proposal(block, members, U, scaling.measure(gradient, U)))
        nu: Tensor | float = 1.0
        if proposals:
            scales, finite = replace_gradients(proposals, scaling)
            nu = scales.mean()
            self._nonfinite = self._nonfinite + ~finite
        self.stats = report(self, nu, bare)

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
            ValueError: it is of another model or other settings; what does not fit is named, nothing was changed.
        """
        preconditioner_state.load(self, state_dict)
