"""The amortised covariance preconditioner."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from natgrad.damping import check_damping
from natgrad.layers.coverage import Uncovered
from natgrad.likelihoods import Likelihood
from natgrad.linalg.covariance import SymmetricForm, covariance_inverse, low_rank
from natgrad.model_view import Forward
from natgrad.optim.layerwise import BatchPass, LayerwiseOptimizer, Wanted
from natgrad.optim.select import keep_where, reads_for_free


class ACP(LayerwiseOptimizer):
    r"""The amortised covariance preconditioner: ``θ ← θ − lr (F_in + λ I)^{-1} ∇h`` [THESIS, sec. 6.4.2, Algorithm 3].

    ``F_in = [[M, h̄], [h̄ᵀ, 1]] ⊗ α I`` per layer ignores how output neurons interact. With κ = λ/α, C the covariance of
    the layer's input and ``s = 1/(1+κ)`` where the bias is damped, else 1:

        ``ΔW = (1/α) (∇W − s ∇b h̄ᵀ) S^{-1},   Δb = s (∇b/α − ΔW h̄)``,

    S = ``C + κ I``, plus ``κ/(1+κ) h̄ h̄ᵀ`` where the bias is damped [THESIS, eqs. 6.3.3–6.3.4]. (Algorithm 3 prints a
    plus for the minus of the step and leaves out α, λ and 6.3.4.) C is that of the minibatch at the first update and
    at every ``every``-th after it, when ``(C + κ I)^{-1}`` is computed and kept; h̄ is that of each minibatch, which
    damps and centres exactly by two products with vectors::

        optimizer = ng.ACP(model, likelihood, lr=0.1)
        loss = optimizer.step(x, y)

    A layer without a trained bias has the block ``E[h hᵀ] ⊗ α I``. On sequences rows are uses of the layer, and a
    layer that is used T times per example has T times that block.

    Args:
        model: any module whose trainable parameters are those of ``nn.Linear`` layers (see ``uncovered``).
        likelihood: p(y | z); the loss is ``likelihood.nll``.
        lr: the learning rate.
        alpha: α, a number; or ``"max"``, per layer the largest ``(∇_a l)²`` of the minibatch, over examples and
            outputs, of the examples' own loss (not divided by n). κ then has the α of the minibatch that C is of.
        damping: Tikhonov's λ, the coefficient of the identity beside ``F_in``.
        every: N: C is renewed every so many updates.
        damp_bias: damp the whole block, as printed; False leaves the bias undamped, which is the minimiser of the
            local criterion of [THESIS, sec. 6.1] with ε = κ.
        plain_bias: ``Δb = ∇b/α``, the ablation of [THESIS, Algorithm 3; NOTE, sec. 4.3].
        examples: in a layer of more than twice as many inputs, C is that of so many leading rows of the minibatch, 200
            as in [THESIS, sec. 6.6.2]. Then the inverse is a multiple of the identity and a matrix of that rank, whose
            products are cheaper. None: C is always that of all rows, which narrower layers have anyway.
        momentum: of the preconditioned gradient, as in ``torch.optim.SGD`` without dampening; 0 in the thesis.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.
        uncovered: trainable parameters that no factor covers are an ``"error"``, or take a plain gradient step
            (``"identity"``).

    Attributes:
        stats: of the last step: ``loss``, ``updates``, ``skipped``, ``failed_inverses`` (a layer keeps the inverse it
            had) and ``bare`` (layers that have none yet and take a plain gradient step of length lr).

    Raises:
        ValueError: a setting out of range, or an uncovered parameter (it is named).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 0.1,
        alpha: float | str = "max",
        damping: float = 0.1,
        every: int = 100,
        damp_bias: bool = True,
        plain_bias: bool = False,
        examples: int | None = 200,
        momentum: float = 0.0,
        forward: Forward | None = None,
        uncovered: Uncovered = "error",
    ) -> None:
        if alpha != "max" and (isinstance(alpha, str) or not 0 < alpha < math.inf):
            raise ValueError(f"alpha={alpha!r}: expected a positive number or 'max'")
        check_damping(damping)
        if every < 1:
            raise ValueError(f"every={every}: expected a positive number of updates")
        if examples is not None and examples < 1:
            raise ValueError(f"examples={examples}: expected a positive number of rows, or None")
        super().__init__(model, likelihood, lr=lr, momentum=momentum, forward=forward, uncovered=uncovered)
        if not self._coverage.layers:
            raise ValueError(f"model: {type(self.view.module).__name__} has no trainable nn.Linear layer")
        self.alpha, self.damping, self.every, self.examples = alpha, float(damping), every, examples
        self.damp_bias, self.plain_bias = damp_bias, plain_bias
        self._inverses: dict[str, tuple[SymmetricForm, Tensor]] = {}  # (C + κ I)^{-1} and κ
        self.param_groups[0]["failed_inverses"] = 0

    def _renews(self, update: int) -> bool:
        return (update - 1) % self.every == 0 or len(self._inverses) < len(self._with_weights())

    def _wanted(self, update: int) -> Wanted:
        return Wanted(inputs=self._renews(update), largest=self.alpha == "max")

    def _with_weights(self) -> list[str]:
        return [name for name, (weight, _) in self._coverage.members.items() if weight is not None]

    def _update(self, update: int, batch: BatchPass, finite: Bool[Tensor, ""]) -> dict[str, Any]:
        plain = {name: g for name, g in batch.gradients.items() if g is not None}
        bare = 0
        if self._renews(update) and bool(finite):
            self._refresh(update, batch)
        if reads_for_free(finite) and not finite:
            return self._counts(bare)
        for name, _, dW, db in self._layer_gradients(batch):
            weight, bias = self._coverage.members[name]
            if dW is not None and name not in self._inverses:
                bare += 1
                continue
            alpha = self._alpha(batch, name)
            if dW is not None:
                assert weight is not None  # it has a gradient
                plain.pop(weight)
            direction = self._layer(name, weight, dW, db, alpha, batch, finite)
            if bias is not None and direction is not None:
                plain[bias] = direction
        self._descend(plain, finite)
        return self._counts(bare)

    def _counts(self, bare: int) -> dict[str, Any]:
        return {"failed_inverses": self.param_groups[0]["failed_inverses"], "bare": bare}

    def _alpha(self, batch: BatchPass, name: str) -> Float[Tensor, ""]:
        """α, times the uses of the layer per example."""
        rows = batch.layers[name]
        assert rows.total is not None  # the layer was called
        uses = rows.rows / batch.examples
        if self.alpha == "max":
            assert rows.largest is not None  # asked for in `_wanted`
            alpha = rows.largest.to(rows.total.dtype)
            # Without any gradient there is no update either; 0/0 would not say so.
            return torch.where(alpha > 0, alpha, torch.ones_like(alpha)) * uses
        return rows.total.new_tensor(float(self.alpha) * uses)

    def _refresh(self, update: int, batch: BatchPass) -> None:
        """``(C + κ I)^{-1}`` of every layer from this minibatch; where a factorisation fails the old one stays."""
        for name in self._with_weights():
            rows = batch.layers[name]
            if not rows.rows or ((update - 1) % self.every and name in self._inverses):
                continue
            h = rows.inputs[0] if len(rows.inputs) == 1 else torch.cat(rows.inputs)
            rank = self.examples if low_rank(self.examples, h.shape[1], self.damping) else None
            h = h[:rank]
            kappa = self.damping / self._alpha(batch, name)
            centre = self._coverage.members[name][1] is not None
            inverse = covariance_inverse(h, kappa, centre=centre, rank=rank)
            if bool(inverse.ok):
                self._keep(name, inverse, kappa)
            else:
                self.param_groups[0]["failed_inverses"] += 1

    def _keep(self, name: str, inverse: SymmetricForm, kappa: Tensor) -> None:
        """Keep an inverse in use, and in the state of the layer's weight."""
        self._inverses[name] = inverse, kappa
        weight = self._coverage.layers[name].weight
        form = {"basis": inverse.basis} if inverse.dense is None else {"inverse": inverse.dense}
        self.state[weight].update({**form, "kappa": kappa})

    def _layer(
        self,
        name: str,
        weight: str | None,
        dW: Tensor | None,
        db: Tensor | None,
        alpha: Tensor,
        batch: BatchPass,
        finite: Tensor,
    ) -> Tensor | None:
        """Move the weight of a layer; returns Δb."""
        s: Tensor | float = 1.0
        if dW is None:
            assert db is not None  # a layer without gradients is not asked
            kappa = self.damping / alpha
            return db / alpha if self.plain_bias or not self.damp_bias else db / (alpha * (1 + kappa))
        inverse, kappa = self._inverses[name]
        dtype = (inverse.basis if inverse.dense is None else inverse.dense).dtype
        X = dW.to(dtype).div_(alpha)
        correction = None
        direction = None
        if db is not None:
            mean, b = batch.layers[name].mean.to(dtype), db.to(dtype) / alpha
            s = 1 / (1 + kappa) if self.damp_bias else 1.0
            X.addr_(b * s, mean, alpha=-1)
            u = inverse.vector_product(mean)
            Xu = torch.mv(X, u)
            if self.damp_bias:  # S^{-1} from (C + κ I)^{-1} by the formula of Sherman and Morrison
                tau = kappa * s
                factor = 1 / (1 + tau * torch.dot(mean, u))
                correction = (Xu * (tau * factor), u)
                Xu = Xu * factor  # S^{-1} h̄ = factor (C + κ I)^{-1} h̄
            direction = b if self.plain_bias else s * (b - Xu)
        if not reads_for_free(finite):
            keep_where(X, finite, 0.0)
        assert weight is not None  # dW is its gradient
        self._move(self.view.parameters[weight], X, inverse, correction, finite)
        return None if direction is None or db is None else direction.to(db.dtype)

    def _move(
        self,
        parameter: Tensor,
        X: Tensor,
        inverse: SymmetricForm,
        correction: tuple[Tensor, Tensor] | None,
        finite: Tensor,
    ) -> None:
        """``W ← W − lr v`` with ``v ← momentum v + X S^{-1}``; without momentum the product goes straight into W."""
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        lr, momentum = float(group["lr"]), group["momentum"]
        if correction is not None and finite.device.type != "cpu":
            correction = torch.where(finite, correction[0], 0.0), torch.where(finite, correction[1], 0.0)
        if momentum or parameter.dtype != X.dtype or not parameter.is_contiguous():
            v = inverse.right_product(X)
            if correction is not None:
                v.addr_(*correction, alpha=-1)
            self._descend({self._name_of(parameter): v.to(parameter.dtype)}, finite)
            return
        inverse.add_product(parameter, X, alpha=-lr)
        if correction is not None:
            parameter.addr_(*correction, alpha=lr)

    def _name_of(self, parameter: Tensor) -> str:
        return next(name for name, p in self.view.parameters.items() if p is parameter)

    def _check_state(self, state: Mapping[Any, Any]) -> None:
        super()._check_state(state)
        index = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for name in self._with_weights():
            d = self._coverage.layers[name].in_features
            saved = state.get(index[id(self._coverage.layers[name].weight)], {})
            low = low_rank(self.examples, d, self.damping)
            key, shape = ("basis", (d, self.examples)) if low else ("inverse", (d, d))
            found = {k for k in ("basis", "inverse") if k in saved}
            if found and (found != {key} or tuple(saved[key].shape) != shape):
                raise ValueError(
                    f"state_dict: layer {name!r} needs {key!r} of shape {shape}; the state is that of another model, "
                    "or of an ACP with another examples="
                )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As the base class; the inverses in use are those of the state."""
        super().load_state_dict(state_dict)
        self._inverses = {}
        for name in self._with_weights():
            saved = self.state.get(self._coverage.layers[name].weight, {})
            if "kappa" not in saved:
                continue
            kappa, dense = saved["kappa"], saved.get("inverse")
            basis = saved["basis"] if dense is None else dense.new_zeros(dense.shape[0], 0)
            ok = torch.ones((), dtype=torch.bool, device=kappa.device)
            self._inverses[name] = SymmetricForm(dense, kappa.reciprocal(), basis, ok), kappa
