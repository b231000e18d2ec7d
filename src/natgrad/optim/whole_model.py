"""What optimisers share that evaluate the model themselves and make one step over all parameters at a time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from natgrad.curvature.cotangents import validate_targets
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.sandwich import check_likelihood
from natgrad.optim.arguments import check_real, seeded
from natgrad.optim.batches import micro_batches
from natgrad.optim.layer_state import same_keys, same_shape, warn_of_threads
from natgrad.optim.of_model import OptimizerOfModel
from natgrad.optim.select import keep_where
from natgrad.optim.stats import Stats

_VERSION = 1


class WholeModelOptimizer(OptimizerOfModel):
    """An optimiser whose state is vectors over the parameters, numbers and a random stream of its own.

    A subclass implements ``step``, and names its state in `_vectors` and `_numbers`.

    Args:
        model: any module.
        likelihood: p(y|z).
        lr: multiplies the computed step.
        seed: of the optimiser's own random stream.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.

    Attributes:
        stats: of the last step.

    Raises:
        ValueError: a negative learning rate, or a model without trainable parameters.
        TypeError: the likelihood lacks a method.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, *, lr: float, seed: int, forward: Forward | None
    ) -> None:
        check_likelihood(likelihood)
        check_real(lr=lr)
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr={lr}: expected a finite number of at least 0; it multiplies the computed step")
        self.view, self.likelihood = ModelView(model, forward), likelihood
        super().__init__(list(self.view.parameters.items()), {"lr": lr})
        self._generator = seeded(seed, self.view.device)
        self._update_number = 0
        self._counts: dict[str, Tensor] = {"skipped": self._scalar()}
        self._validated = False
        self.stats = Stats()

    def _vectors(self) -> dict[str, Float[Tensor, " P"]]:
        """The vectors of the state, in use, by name."""
        return {}

    def _numbers(self) -> dict[str, Tensor]:
        """The 0-d tensors of the state, in use, by name; NaN stands for "not known yet"."""
        return {}

    def _scalar(self, value: float = 0.0) -> Float[Tensor, ""]:
        real = torch.float64 if self.view.device.type != "mps" else torch.float32
        return torch.full((), value, dtype=real, device=self.view.device)

    def _batches(self, inputs: Any, targets: Any, size: int | None, closure: Any) -> list[tuple[Any, Any]] | None:
        """The micro-batches of a step; None where it shall only allocate state.

        Raises:
            TypeError: a closure is given, or inputs are missing while a learning rate is not 0.
            ValueError: no examples, or lengths that differ.
        """
        name = type(self).__name__
        if closure is not None or callable(inputs):
            raise TypeError(
                f"{name}.step(inputs, targets) evaluates the model itself and takes no closure; in a loop that calls "
                "loss.backward() use natgrad.Preconditioner in front of any torch.optim optimiser"
            )
        if inputs is None:
            if any(group["lr"] != 0 for group in self.param_groups):
                raise TypeError(
                    f"step: inputs are missing; expected step(inputs, targets), for {name} evaluates the model itself"
                )
            return None
        return micro_batches(inputs, targets, size)

    def _check_trainable(self) -> None:
        """Refuse a model of which something was frozen in the meantime.

        Raises:
            ValueError: with the parameter's name.
        """
        frozen = [name for name, parameter in self.view.parameters.items() if not parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"model: {frozen[0]} was frozen after {type(self).__name__} had been made for it; make a new optimiser"
            )

    def _validate(self, z: Tensor, targets: Any) -> None:
        """Compare the first batch with what the likelihood expects, values included."""
        if not self._validated:
            validate_targets(self.likelihood, z.detach(), targets)

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """The model's buffers, each with a copy of what it holds now."""
        return [(buffer, buffer.clone()) for buffer in self.view.module.buffers()]

    def _add(self, step: Float[Tensor, " P"]) -> None:
        """θ ← θ + lr step, each parameter with the lr of its group."""
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        parts = self.view.to_dict(step)
        for name, parameter in self.view.parameters.items():
            parameter.add_(parts[name], alpha=rates[id(parameter)])

    def _count_step(self, finite: Bool[Tensor, ""], buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One more step: what a batch that was not finite did to buffers is undone, and the batch counted."""
        self._update_number += 1
        self._validated = True
        for buffer, before in buffers:
            keep_where(buffer, finite, before)
        self._counts["skipped"] += ~finite

    def state_dict(self) -> dict[str, Any]:
        """Vectors by parameter, numbers and the random stream, in the form of every torch optimiser's state."""
        state = super().state_dict()
        state["state"] = {
            index: {key: tensor.detach().clone() for key, tensor in tensors.items()}
            for index, tensors in enumerate(self._vector_parts())
            if tensors
        }
        state["param_groups"][0] |= self._saved_numbers()
        return state

    def _tensors(self) -> list[dict[str, Tensor]]:
        """What a state holds by parameter."""
        return self._vector_parts()

    def _vector_parts(self) -> list[dict[str, Tensor]]:
        parts = {key: self.view.to_dict(vector) for key, vector in self._vectors().items()}
        return [{key: part[name] for key, part in parts.items()} for name in self.view.names]

    def _saved_numbers(self) -> dict[str, Any]:
        """What a state holds beside vectors and what every parameter group has."""
        return {
            "version": _VERSION,
            "optimizer": type(self).__name__,
            "threads": torch.get_num_threads(),
            "update": self._update_number,
            "generator": self._generator.get_state(),
            **{name: float(value) for name, value in {**self._numbers(), **self._counts}.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, bit for bit on the same machine with the same number of threads.

        Raises:
            ValueError: the state is of another model or optimiser; what does not fit is named, nothing was changed.
        """
        numbers, tensors = self._check_state(state_dict)
        own = self._saved_numbers()
        group = {key: value for key, value in numbers.items() if key not in own}  # a scheduler's keys stay
        super().load_state_dict({"state": {}, "param_groups": [group]})
        warn_of_threads(numbers["threads"])
        self._update_number = int(numbers["update"])
        self._generator.set_state(numbers["generator"].cpu())
        for name, value in {**self._numbers(), **self._counts}.items():
            value.fill_(numbers[name])
        for key, vector in self._vectors().items():
            parts = self.view.to_dict(vector)
            for name, saved in zip(self.view.names, tensors, strict=True):
                parts[name].copy_(saved[key])

    def _check_state(self, state: Any) -> tuple[Mapping[str, Any], list[Mapping[str, Tensor]]]:
        kind, names = type(self).__name__, self.view.names
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
            raise ValueError(f"state_dict: expected what {kind}.state_dict() returns, with 'state' and 'param_groups'")
        groups = state["param_groups"]
        if len(groups) != 1 or len(groups[0].get("params", ())) != len(names):
            found = [len(group.get("params", ())) for group in groups]
            raise ValueError(f"state_dict: parameter groups of {found} parameters; this model has one of {len(names)}")
        numbers = groups[0]
        own = {**self._numbers(), **self._counts}
        missing = [
            key for key in ("version", "optimizer", "threads", "update", "generator", *own) if key not in numbers
        ]
        if missing or numbers["optimizer"] != kind:
            what = f"lacks {missing}" if missing else f"is that of {numbers['optimizer']}"
            raise ValueError(f"state_dict['param_groups'][0] {what}; expected the state of a {kind}")
        if numbers["version"] != _VERSION:
            raise ValueError(f"state_dict: of version {numbers['version']}; this natgrad reads version {_VERSION}")
        for key in ("threads", "update", *own):
            if isinstance(numbers[key], bool) or not isinstance(numbers[key], int | float):
                raise ValueError(f"state_dict: {key} is {numbers[key]!r}; expected a number")
        same_shape("state_dict: generator", self._generator.get_state(), numbers["generator"])
        other = numbers.get("param_names")
        if other is not None and list(other) != list(names):
            raise ValueError("state_dict: of a model whose parameters have other names")
        tensors: list[Mapping[str, Tensor]] = []
        for index, name, own in zip(numbers["params"], names, self._tensors(), strict=True):
            saved = state["state"].get(index, {})
            same_keys(f"parameter {name!r}", own, saved)
            for key, tensor in own.items():
                same_shape(f"parameter {name!r}: {key}", tensor, saved[key])
            tensors.append(saved)
        return numbers, tensors
