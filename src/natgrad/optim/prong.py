"""Projected natural gradient descent: a model whose linear layers see whitened inputs."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from natgrad.damping import check_damping
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import cover
from natgrad.layers.whitened import WhitenedLinear
from natgrad.model_view import ModelView
from natgrad.optim.stats import Stats


class PRONG:
    r"""Natural neural networks: rewrites the linear layers of a model as ``a = V U (h − μ) + d`` [THESIS, sec. 6.5.2].

    The layers are changed in place and compute what they computed before; V and d are the parameter objects that W and
    b were, so that any optimiser trains them::

        prong = ng.PRONG(model, every=100, damping=1e-2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...                     # an ordinary training loop
        prong.remove()          # an ordinary model again, with the same outputs

    U = ``(C + ε I)^{-1/2}`` and μ come from the inputs of each layer on one minibatch: they are renewed before the
    first forward pass in training mode, and before the first one after every ``every``-th update, by a forward pass of
    their own on its inputs. V and d change with them so that the network computes what it did before. A gradient step
    in (V, d) is a step ``E[∇_a l (h − μ)ᵀ] (C + ε I)^{-1}`` in W: that of :class:`natgrad.ACP` with α = 1, κ = ε and an
    undamped bias.

    What an optimiser remembers (momentum, second moments) stays as it is, in the coordinates before the renewal.
    Compiled models are not renewed by themselves: call :meth:`rewhiten` with inputs.

    Args:
        model: any module with ``nn.Linear`` layers; subclasses of ``nn.Linear`` and layers with frozen or shared
            weights are left alone.
        every: N, updates between two renewals. An update is seen by the change of a parameter.
        damping: ε, the coefficient of the identity beside C.
        examples: in a layer of more than twice as many inputs, C is that of so many leading rows of the minibatch, 200
            as in [THESIS, sec. 6.6.2]. Then U is a multiple of the identity and a matrix of that rank, whose products
            are cheaper; h_e is white on those rows. None: C is always that of all rows, which narrower layers have
            anyway.

    Attributes:
        layers: the rewritten layers by name.
        stats: ``updates``, ``renewals``, ``failed`` (layers, counted at each renewal, that kept their U because the
            covariance had no inverse root).

    Raises:
        ValueError: a setting out of range, or no layer to rewrite.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, damping: float = 1e-2, examples: int | None = 200
    ) -> None:
        check_damping(damping)
        if every < 1:
            raise ValueError(f"every={every}: expected a positive number of updates")
        if examples is not None and examples < 1:
            raise ValueError(f"examples={examples}: expected a positive number of rows, or None")
        self.view = ModelView(model)
        self.every, self.damping, self.examples = every, float(damping), examples
        covered = cover(self.view, uncovered="identity", structure="layerwise")
        plain = {
            name: layer
            for name, layer in covered.layers.items()
            if type(layer) is nn.Linear and covered.members[name][0] is not None
        }
        if not plain:
            raise ValueError(
                f"model: {type(self.view.module).__name__} has no nn.Linear layer with a trained weight of its own to "
                "rewrite (or PRONG rewrote them already)"
            )
        self.layers = {name: WhitenedLinear.convert(layer, examples, self.damping) for name, layer in plain.items()}
        self._capture = Capture(model, self.layers)
        self._updates = self._renewals = self._failed = 0
        self._started = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._seen = self._version()
        self._busy = False
        module = self.view.module
        self._hook = module.register_forward_pre_hook(_BeforeForward(self, module), with_kwargs=True)

    @property
    def stats(self) -> Stats:
        """Counters."""
        return Stats({"updates": self._updates, "renewals": self._renewals, "failed": self._failed})

    @torch.no_grad()
    def rewhiten(self, *inputs: Any, **named: Any) -> None:
        """Renew U and μ now, without changing what the network computes.

        Args:
            inputs: a minibatch, as the model is called: ``rewhiten(x)`` for ``model(x)``. Without any, the inputs of
                the last forward pass in training mode.
            named: the model's keyword arguments.

        Raises:
            RuntimeError: no inputs were given and none were seen; or several ranks, whose statistics would differ; or
                the layers were given back by :meth:`remove`.
        """
        if not self.layers:
            raise RuntimeError("rewhiten: this PRONG was removed; make a new one")
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RuntimeError(
                "PRONG: several ranks would whiten by their own examples each; that is not supported yet"
            )
        if inputs or named:
            self._inputs = inputs, named
        if self._inputs is None:
            raise RuntimeError("rewhiten: no inputs yet; pass a minibatch, or call the model in training mode first")
        arguments, keywords = self._inputs
        self._busy = True
        try:
            with self.view.curvature_pass(), self.view.snapshot(), self._capture.record() as record:
                self.view.module(*arguments, **keywords)
            for name, found in record.inputs.items():
                rows = found[0] if len(found) == 1 else torch.cat([h.reshape(-1, h.shape[-1]) for h in found])
                self._failed += not self.layers[name].rewhiten(rows, self.damping)
        finally:
            self._busy = False
        self._started = True
        self._renewals += 1
        self._seen = self._version()

    def remove(self) -> nn.Module:
        """Give back an ordinary model: the same parameter objects in ``nn.Linear`` layers, the same outputs.

        Returns:
            the model.
        """
        self._hook.remove()
        self._capture.remove()
        for layer in self.layers.values():
            layer.restore()
        self.layers = {}
        self._inputs = None
        return self.view.model

    def state_dict(self) -> dict[str, Any]:
        """The counters; U and μ are buffers of the model and belong to its own ``state_dict``."""
        return {
            "updates": self._updates,
            "renewals": self._renewals,
            "failed": self._failed,
            "started": self._started,
            "changed": self._seen != self._version(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, after the model has loaded its own.

        Raises:
            ValueError: an entry is missing or unknown; nothing was changed.
        """
        own = self.state_dict()
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(own):
            raise ValueError(f"state_dict: expected a mapping with the keys {sorted(own)} from PRONG.state_dict()")
        self._updates, self._renewals = int(state_dict["updates"]), int(state_dict["renewals"])
        self._failed, self._started = int(state_dict["failed"]), bool(state_dict["started"])
        self._seen = -1 if state_dict["changed"] else self._version()

    def _version(self) -> int:
        """Changes whenever an optimiser writes to a rewritten layer's parameters."""
        return sum(p._version for layer in self.layers.values() for p in layer.parameters(recurse=False))

    def _before(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._busy or not torch.is_grad_enabled():
            return
        self._inputs = arguments, keywords
        version = self._version()
        changed = self._started and version != self._seen
        self._updates += changed
        self._seen = version
        if not self._started or (changed and self._updates % self.every == 0):
            self.rewhiten()


class _BeforeForward:
    """Keeps its PRONG alive, for the layers that it rewrote outlive a forgotten name; copies are inert."""

    def __init__(self, prong: PRONG | None, module: nn.Module | None = None) -> None:
        self._prong = prong
        self._module = weakref.ref(module) if module is not None else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._prong is None or not module.training:
            return
        # A backward pass that recomputes (activation checkpointing) is no forward pass; nor is one under a transform.
        if torch._C._current_graph_task_id() != -1 or torch._C._are_functorch_transforms_active():
            return
        if self._module is not None and self._module() is module:
            self._prong._before(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_BeforeForward":
        return _BeforeForward(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _BeforeForward, (None,)
