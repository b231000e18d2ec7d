"""What the thesis' optimisers share: one recorded pass over a batch, momentum, skipped batches, checkpoints."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.sgd import sgd
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from natgrad.curvature.cotangents import validate_targets
from natgrad.curvature.kfac import check_captured
from natgrad.layers.capture import Capture, Record
from natgrad.layers.coverage import Coverage, Uncovered, cover
from natgrad.layers.factors import flatten_rows
from natgrad.likelihoods import Likelihood, is_plain_sum, nll_and_score
from natgrad.model_view import Forward, ModelView, batch_size
from natgrad.operators.sandwich import check_likelihood
from natgrad.optim.batches import micro_batches
from natgrad.optim.layer_state import warn_of_threads
from natgrad.optim.of_model import OptimizerOfModel
from natgrad.optim.select import keep_where, reads_for_free
from natgrad.optim.stats import Stats


@dataclass
class LayerRows:
    """What a batch left behind of one layer: sums over rows, and what was asked for."""

    rows: int = 0
    total: Float[Tensor, " in"] | None = None
    inputs: list[Float[Tensor, "rows in"]] = field(default_factory=list)
    largest: Float[Tensor, ""] | None = None  # max (∇_a l)² per example, not divided by n

    @property
    def mean(self) -> Float[Tensor, " in"]:
        """h̄ over the rows."""
        assert self.total is not None  # a layer that was never called has no gradient, and is not asked
        return self.total / self.rows


@dataclass
class BatchPass:
    """Loss, gradients by parameter name (None where there is none) and the layers' rows of a batch."""

    loss: Float[Tensor, ""]
    examples: int
    gradients: dict[str, Tensor | None]
    layers: dict[str, LayerRows]

    def finite(self) -> Bool[Tensor, ""]:
        """Whether the loss and every gradient are."""
        sums = [self.loss.to(torch.float64) if self.loss.device.type != "mps" else self.loss]
        sums += [g.sum() for g in self.gradients.values() if g is not None]
        return torch.stack([torch.isfinite(s) for s in sums]).all()


@dataclass
class Wanted:
    """What of a pass is needed beside the gradient: the layers' inputs themselves, their largest derivatives."""

    inputs: bool = False
    largest: bool = False


class LayerwiseOptimizer(OptimizerOfModel):
    """An optimiser that evaluates the model itself and treats linear layers by what enters them.

    Subclasses say what they need of a pass (:meth:`_wanted`) and make the update (:meth:`_update`).

    Args:
        model: any module.
        likelihood: p(y | z); the loss is ``likelihood.nll``.
        lr: the learning rate.
        momentum: of the directions, as in ``torch.optim.SGD`` without dampening.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.
        uncovered: trainable parameters outside of the layers that are treated: ``"error"`` or ``"identity"``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float,
        momentum: float,
        forward: Forward | None,
        uncovered: Uncovered,
    ) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr={lr}: expected a finite learning rate of at least 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: expected a number in [0, 1)")
        if uncovered not in ("error", "identity"):
            raise ValueError(f"uncovered={uncovered!r}: {type(self).__name__} knows 'error' and 'identity'")
        check_likelihood(likelihood)
        self.view, self.likelihood = ModelView(model, forward), likelihood
        self._coverage = cover(self.view, uncovered, structure="layerwise")
        super().__init__(list(self.view.parameters.items()), {"lr": lr, "momentum": momentum, "updates": 0})
        self.capture = Capture(model, self._coverage.blocks)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.view.device)
        self._checked = False
        self.stats = Stats()

    def _wanted(self, update: int) -> Wanted:
        """What the update of this number, counted from 1, needs of its pass."""
        raise NotImplementedError

    def _update(self, update: int, batch: BatchPass, finite: Bool[Tensor, ""]) -> dict[str, Any]:
        """Change the parameters, unless the batch is not finite; returns entries of ``stats``."""
        raise NotImplementedError

    @torch.no_grad()
    def step(  # pyrefly: ignore[bad-override] - these optimisers evaluate the model themselves
        self, inputs: Any = None, targets: Any = None, micro_batch_size: int | None = None, closure: Any = None
    ) -> Float[Tensor, ""] | None:
        """Evaluate a mini-batch and update the parameters.

        Args:
            inputs: one batch; or, with ``targets=None``, a re-iterable of (inputs, targets) micro-batches.
            targets: what the likelihood compares z with.
            micro_batch_size: split the batch into chunks of at most this many examples.
            closure: not supported; see Raises.

        Returns:
            the loss before the update, a 0-d tensor. Where it or its gradient is not finite, the batch is skipped and
            counted in ``stats["skipped"]``: parameters, buffers and state stay as they were.

        Raises:
            TypeError: a closure is given, or inputs are missing although an lr is not 0.
            ValueError: inputs or targets that do not fit the model and the likelihood, or an empty batch.
        """
        name = type(self).__name__
        if closure is not None or callable(inputs):
            raise TypeError(
                f"{name}.step(inputs, targets) evaluates the model itself and takes no closure; in a loop that calls "
                "loss.backward() use natgrad.Preconditioner in front of any torch.optim optimiser"
            )
        if inputs is None:
            if any(group["lr"] != 0 for group in self.param_groups):
                raise TypeError(f"step: inputs are missing; expected step(inputs, targets), for {name} evaluates them")
            return None
        _refuse_ranks(name)
        batches = micro_batches(inputs, targets, micro_batch_size)
        buffers = [(buffer, buffer.clone()) for buffer in self.view.module.buffers()]
        update = int(self.param_groups[0]["updates"]) + 1
        batch = self._evaluate(batches, self._wanted(update))
        finite = batch.finite()
        for buffer, before in buffers:
            keep_where(buffer, finite, before)
        self._skipped += ~finite
        found = self._update(update, batch, finite)
        for group in self.param_groups:
            group["updates"] = update
        self.stats = Stats({"loss": batch.loss, "updates": update, "skipped": self._skipped.clone(), **found})
        return batch.loss

    def coverage(self) -> Coverage:
        """What is treated how; ``print`` it for a table with parameter counts."""
        return self._coverage

    def _evaluate(self, batches: Sequence[tuple[Any, Any]], wanted: Wanted) -> BatchPass:
        """One forward and one backward pass over every micro-batch."""
        examples = sum(batch_size(x) for x, _ in batches)
        parameters = self.view.parameters
        alone = len(batches) == 1
        sums: dict[str, Tensor | None] = dict.fromkeys(parameters)
        layers = {name: LayerRows() for name in self._coverage.layers}
        loss: Tensor | None = None
        total: Tensor | None = None
        for inputs, targets in batches:
            with torch.enable_grad(), self.view.curvature_pass(once=True), self.capture.record() as record:
                z = self.view(inputs)
            if not self._checked:
                check_captured(record, z)
                validate_targets(self.likelihood, z.detach(), targets)
                self._checked = True
            nll, derivative = nll_and_score(self.likelihood, z, targets)
            count = torch.as_tensor(self.likelihood.count(z.detach(), targets), dtype=nll.dtype, device=nll.device)
            if is_plain_sum(self.likelihood):
                count = count * (batch_size(inputs) / examples)
            if alone:
                derivative = derivative / count
            gradients = self._backward(record, z, derivative, wanted, layers)
            for name, gradient in zip(parameters, gradients, strict=True):
                known = sums[name]
                if gradient is not None:
                    sums[name] = gradient if known is None else known + gradient
            loss = nll if loss is None else loss + nll
            total = count if total is None else total + count
        assert loss is not None and total is not None  # there is a batch
        if not alone:
            sums = {name: None if g is None else g / total for name, g in sums.items()}
        scale = examples if alone else examples / total
        for layer in layers.values():
            if layer.largest is not None:
                layer.largest = (layer.largest * scale).square()
        return BatchPass(loss / total, examples, sums, layers)

    def _backward(
        self, record: Record, z: Tensor, derivative: Tensor, wanted: Wanted, layers: dict[str, LayerRows]
    ) -> list[Tensor | None]:
        """The parameters' gradients for a derivative with respect to z; adds the layers' rows."""
        parameters = list(self.view.parameters.values())
        gradients: list[Tensor | None]
        if wanted.largest:
            outputs, gradients = record.gradients(z, derivative, parameters, retain_graph=False)
            for name, found in outputs.items():
                for g in found:
                    low, high = torch.aminmax(g)
                    size = torch.maximum(-low, high)
                    known = layers[name].largest
                    layers[name].largest = size if known is None else torch.maximum(known, size)
        else:
            record.refuse_hidden(z)
            gradients = [*torch.autograd.grad(z, parameters, derivative, allow_unused=True)]
        for name, found in record.inputs.items():
            layer = layers[name]
            for h in found:
                h = flatten_rows(h)
                h = h.to(torch.promote_types(h.dtype, torch.float32))
                layer.rows += h.shape[0]
                layer.total = h.sum(0) if layer.total is None else layer.total.add_(h.sum(0))
                if wanted.inputs:
                    layer.inputs.append(h)
        return gradients

    def _descend(self, directions: Mapping[str, Tensor], finite: Bool[Tensor, ""]) -> None:
        """``θ ← θ − lr v`` with ``v ← momentum v + direction``; where ``finite`` is False nothing changes."""
        if reads_for_free(finite) and not finite:
            return
        parameters = self.view.parameters
        name_of = {id(p): name for name, p in parameters.items()}
        for group in self.param_groups:
            chosen = [(p, directions[name_of[id(p)]]) for p in group["params"] if name_of[id(p)] in directions]
            if not chosen:
                continue
            moved, gradients = [p for p, _ in chosen], [d for _, d in chosen]
            momentum = group["momentum"]
            if not reads_for_free(finite):
                self._descend_where(finite, moved, gradients, momentum, group["lr"])
                continue
            buffers: list[Tensor | None] = [self._velocity(p) if momentum else None for p in moved]
            fused = all(p.device.type in _get_fused_kernels_supported_devices() for p in moved)
            sgd(
                moved,
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=momentum,
                lr=float(group["lr"]),
                dampening=0.0,
                nesterov=False,
                maximize=False,
                fused=fused,
                foreach=not fused,
            )

    def _descend_where(
        self, finite: Tensor, moved: list[Tensor], directions: list[Tensor], momentum: float, lr: float
    ) -> None:
        """The same without reading ``finite``: an accelerator is not waited for."""
        steps = [torch.where(finite, d, torch.zeros_like(d)) for d in directions]
        if momentum:
            buffers = [self._velocity(p) for p in moved]
            torch._foreach_mul_(buffers, torch.where(finite, momentum, 1.0).to(moved[0].dtype))
            torch._foreach_add_(buffers, steps)
            steps = torch._foreach_mul(buffers, finite.to(moved[0].dtype))
        torch._foreach_add_(moved, steps, alpha=-float(lr))

    def _velocity(self, p: Tensor) -> Tensor:
        """The momentum buffer of a parameter; zeros at first."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return self.state[p]["momentum_buffer"]

    def state_dict(self) -> dict[str, Any]:
        """Momentum, counters and whatever is kept of a layer, in the form of every torch optimiser."""
        state = super().state_dict()
        state["param_groups"][0] |= {"skipped": int(self._skipped), "threads": torch.get_num_threads()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, bit for bit on the same machine with the same number of threads.

        Raises:
            ValueError: the state is of another model or optimiser; nothing was changed.
        """
        groups = state_dict.get("param_groups", []) if isinstance(state_dict, Mapping) else []
        if not groups or "skipped" not in groups[0]:
            raise ValueError(f"state_dict: expected the mapping that {type(self).__name__}.state_dict() returns")
        self._check_state(state_dict["state"])
        warn_of_threads(int(groups[0]["threads"]))
        plain = [{k: v for k, v in group.items() if k not in ("skipped", "threads")} for group in groups]
        super().load_state_dict({"state": state_dict["state"], "param_groups": plain})
        self._skipped.fill_(int(groups[0]["skipped"]))
        # The base class casts to the parameter's dtype; here every tensor keeps its own.
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            p = parameters[int(index)]
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)

    def _check_state(self, state: Mapping[Any, Any]) -> None:
        """Compare the shapes of momentum buffers with those of the parameters."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state.items():
            buffer = saved.get("momentum_buffer")
            if int(index) >= len(parameters) or (buffer is not None and buffer.shape != parameters[int(index)].shape):
                raise ValueError(f"state_dict: the state of parameter {index} does not fit this model")

    def _layer_gradients(self, batch: BatchPass) -> Iterator[tuple[str, nn.Linear, Tensor | None, Tensor | None]]:
        """Name, layer, ∇W and ∇b of the layers that took part; None for what is not trained."""
        for name, layer in self._coverage.layers.items():
            weight, bias = self._coverage.members[name]
            dW = batch.gradients[weight] if weight is not None else None
            db = batch.gradients[bias] if bias is not None else None
            if (dW is not None or db is not None) and batch.layers[name].rows:
                yield name, layer, dW, db


def _refuse_ranks(name: str) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"{name}: this process group has several ranks, and each would use the statistics of its own examples; "
            "training on several ranks is not supported yet"
        )
