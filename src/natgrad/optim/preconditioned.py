"""An optimiser with a preconditioner inside, as one ``torch.optim.Optimizer``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.optim import preconditioner_state
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.select import reads_for_free
from natgrad.optim.undoable import all_finite, step_where

_PREFIX = "natgrad."


class Preconditioned(torch.optim.Optimizer):
    """``pre.step()`` and ``inner.step()`` in one, for training loops that you do not own.

    The loop (Lightning, Accelerate, Trainer, a ``GradScaler``, any ``lr_scheduler``) sees an ordinary optimiser, whose
    ``param_groups`` and ``state`` are those of the inner one. :meth:`Preconditioner.observe` is still called where the
    loss is computed. A step whose gradient holds NaN or infinite values is left out and counted (:attr:`skipped`):
    neither parameters nor the state of the inner optimiser change. On an accelerator nothing waits for that: such a
    step is undone on the device, from copies of the parameters and of their state, or by the inner optimiser itself
    where it is ``fused=True`` (Adam's number of steps, which torch keeps in the host's memory otherwise, counts it
    then, and so do the periods of the preconditioner).

    Args:
        inner: any ``torch.optim`` optimiser of the model's parameters.
        pre: of the same model.

    Raises:
        TypeError: ``inner`` is no optimiser, or a `Preconditioned` one, or ``pre`` no `Preconditioner`.
        ValueError: a covered parameter is not among the inner optimiser's parameters; it is named.
    """

    def __init__(self, inner: torch.optim.Optimizer, pre: Preconditioner) -> None:
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"inner_optimizer: expected a torch.optim.Optimizer, got {type(inner).__name__}")
        if isinstance(inner, Preconditioned):
            raise TypeError("inner_optimizer: got a Preconditioned, whose gradients would be preconditioned twice")
        if not isinstance(pre, Preconditioner):
            raise TypeError(f"pre: expected a natgrad.Preconditioner, got {type(pre).__name__}")
        known = {id(p) for group in inner.param_groups for p in group["params"]}
        for members in pre.coverage().members.values():
            for name in members:
                if name is not None and id(pre.view.parameters[name]) not in known:
                    raise ValueError(
                        f"inner_optimizer: {name} is preconditioned but not among its parameters; make it from the "
                        "same model's parameters() (after moving or compiling the model), or freeze that layer"
                    )
        self.inner, self.pre = inner, pre
        self._skipped = torch.zeros((), dtype=torch.int64, device=pre.view.device)
        super().__init__(inner.param_groups, inner.defaults)

    @property
    def skipped(self) -> int:
        """How many steps were left out; reading it waits for the device."""
        return int(self._skipped)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimiser."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        """The base class sets its own; the inner optimiser's stay."""

    @property
    def state(self) -> Any:
        """That of the inner optimiser."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        """The base class sets its own; the inner optimiser's stays."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimiser; what the `Preconditioner` covers of it is preconditioned."""
        if not any(
            param_group is group for group in self.inner.param_groups
        ):  # the base class adds those that are there
            self.inner.add_param_group(param_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Preconditioned":
        raise TypeError(
            "a Preconditioned optimiser belongs to the model that its preconditioner hooks and cannot be copied; make "
            "a new one for the copied model and load this one's state_dict()"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As that of the inner optimiser."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition the gradients, then let the inner optimiser update the parameters.

        Args:
            closure: clears the gradients, evaluates the model (with :meth:`Preconditioner.observe`), calls
                ``backward`` and returns the loss. The gradients are preconditioned after each evaluation; averages and
                inverses are renewed after the first.

        Returns:
            what the closure returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        usable = all_finite(gradients, self._skipped.device)
        waits = not reads_for_free(usable)
        self._skipped = self._skipped + ~usable
        if not waits and not usable:
            self.pre.skip()
            return loss
        # Distributed checkpointing makes a step with every lr 0 before training, so that the inner state exists.
        if self.pre.observed or any(group["lr"] != 0 for group in self.param_groups):
            self.pre.step(usable)
        if closure is None:
            if waits:
                step_where(usable, self.inner)
            else:
                self.inner.step()
            return None
        pending = [loss]  # the first evaluation is the one above

        def evaluate() -> Any:
            if pending:
                return pending.pop()
            with torch.enable_grad():
                value = closure()
            self.pre.precondition()
            return value

        return step_where(usable, self.inner, evaluate) if waits else self.inner.step(evaluate)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's, with the preconditioner's in it.

        Tensors are state of parameters and numbers are in the first group: so they pass through tools that know the two
        keys of ``torch.optim`` only, such as ``torch.distributed.checkpoint``.
        """
        packed = self.inner.state_dict()
        own = self.pre.state_dict()
        layers = own.pop("layers")
        index = self._indices()
        # Copies: the inner optimiser's state dict refers to its own dictionaries.
        state = packed["state"] = packed["state"] | {i: dict(packed["state"].get(i, {})) for i in index.values()}
        anchors = self._anchors()
        for name, tensors in layers.items():
            state[index[anchors[name]]].update({_PREFIX + key: value for key, value in tensors.items()})
        tensors = {key: own.pop(key) for key in [k for k, v in own.items() if isinstance(v, Tensor)]}
        state[index[next(iter(anchors.values()))]].update({_PREFIX + key: value for key, value in tensors.items()})
        for i in index.values():  # checkpointing tools want some state for every parameter
            state[i].setdefault(_PREFIX + "steps", torch.tensor(own["steps"]))
        own["skipped_steps"] = self.skipped
        packed["param_groups"][0].update({_PREFIX + key: value for key, value in own.items()})
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; dtypes of the preconditioner's tensors are kept.

        Raises:
            ValueError: it does not fit the model, the preconditioner or the inner optimiser; nothing was changed.
        """
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"state_dict: lacks {key!r}; expected what Preconditioned.state_dict() returned")
        own, packed = self._separated(state_dict)
        skipped = own.pop("skipped_steps")
        preconditioner_state.check(self.pre, own)
        self.inner.load_state_dict(packed)  # checks before it changes anything
        self.pre.load_state_dict(own)
        self._skipped.fill_(int(skipped))

    def _separated(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The preconditioner's state and the inner optimiser's."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        sizes = ([len(group["params"]) for group in g] for g in (groups, self.param_groups))
        saved_sizes, own_sizes = sizes
        if saved_sizes != own_sizes:
            raise ValueError(
                f"state_dict: its groups hold {saved_sizes} parameters, those of the optimiser {own_sizes}"
            )
        own = {k.removeprefix(_PREFIX): groups[0].pop(k) for k in list(groups[0]) if k.startswith(_PREFIX)}
        if "skipped_steps" not in own:
            raise ValueError("state_dict: holds no preconditioner's state; was it saved by the inner optimiser alone?")
        saved_key = dict(zip(self._indices(), (k for group in groups for k in group["params"]), strict=True))
        state = {key: dict(value) for key, value in state_dict["state"].items()}
        layers = {}
        for name, anchor in self._anchors().items():
            layers[name] = _split(state.get(saved_key[anchor], {}))
        own["layers"] = layers
        first = next(iter(layers.values()))
        own.update({key: first.pop(key) for key in ("skipped", "nonfinite", "updates", "generator") if key in first})
        for value in state.values():
            _split(value)
        for layer in layers.values():
            layer.pop("steps", None)
        return own, {"state": {k: v for k, v in state.items() if v}, "param_groups": groups}

    def _indices(self) -> dict[int, int]:
        """id(parameter) → its number in a state dict."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {id(p): i for i, p in enumerate(parameters)}

    def _anchors(self) -> dict[str, int]:
        """Layer → id of the parameter that its state is saved with."""
        coverage, parameters = self.pre.coverage(), self.pre.view.parameters
        first = {name: next(m for m in members if m is not None) for name, members in coverage.members.items()}
        return {name: id(parameters[member]) for name, member in first.items()}


def _split(state: dict[str, Any]) -> dict[str, Any]:
    """Take the preconditioner's entries out of a parameter's state."""
    return {key.removeprefix(_PREFIX): state.pop(key) for key in list(state) if key.startswith(_PREFIX)}
