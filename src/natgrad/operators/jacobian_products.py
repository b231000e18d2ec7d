"""Products with the Jacobian of a model's output: J v and Jᵀ u for several vectors at once, at fixed parameters.

The forward pass runs once, when the object is made; its graph serves every Jᵀ u, and the same buffers and dropout masks
are replayed for every J v. Forward-mode differentiation is vmapped over the columns; where an operation of the model
does not support that, J v comes from differentiating Jᵀ u by u, which gives the same numbers more slowly.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.model_view import Forward, ModelView, batch_size, tensor_leaves

# What the columns of one pass may occupy together, roughly, before they are split into several passes.
_COLUMN_BYTES = 2**30


def affordable_columns(numbers: int, size: int) -> int:
    """How many columns one pass may treat, at least one.

    Args:
        numbers: that a column needs room for.
        size: of a number, in bytes.
    """
    return max(1, _COLUMN_BYTES // (size * numbers))


def as_view(model: nn.Module | ModelView, forward: Forward | None = None) -> ModelView:
    """A `ModelView` of a model, or the given one.

    Raises:
        ValueError: ``forward`` is given beside a view, which has its own.
    """
    if not isinstance(model, ModelView):
        return ModelView(model, forward)
    if forward is not None and forward is not model.forward:
        raise ValueError("forward: the ModelView given as model has its own; pass one or the other")
    return model


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Gradients recorded inside, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def batched_grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Float[Tensor, "k ..."]]
) -> list[Float[Tensor, "k ..."]]:
    """Vector-Jacobian products for k cotangents in one pass, or in k passes where an operation has no batching rule.

    The graph is kept. Inputs that the outputs do not depend on get zeros.
    """
    columns = cotangents[0].shape[0]

    def grads(cotangent: list[Tensor], batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, inputs, cotangent, retain_graph=True, is_grads_batched=batched, materialize_grads=True
        )

    if columns > 1:
        try:
            return [g.expand(columns, *i.shape) for g, i in zip(grads(list(cotangents), True), inputs, strict=True)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
    each = [grads([cotangent[k] for cotangent in cotangents], False) for k in range(columns)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def refuse_sparse(view: ModelView) -> None:
    """Refuse embeddings whose gradients are sparse tensors.

    Raises:
        ValueError: with the module's name.
    """
    for name, module in view.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"model: {type(module).__name__} {name!r} has sparse gradients, with which no curvature can be "
                "multiplied; make it with sparse=False"
            )


class JacobianProducts:
    """J = dz/dθ at the parameters, buffers and random state of the moment of construction.

    Args:
        view: the model.
        inputs: one batch.
        chunk_size: how many columns to treat in one pass; by default as many as fit into about 1 GiB.

    Attributes:
        parameters: copies of the parameters at which J is taken; they require gradients.
        output: z ``[batch, ...]`` as a function of those copies.
        z: the same, detached.

    Raises:
        ValueError: an empty batch; an output that is not finite, has no batch dimension or does not depend on the
            parameters.
    """

    def __init__(self, view: ModelView, inputs: Any, chunk_size: int | None = None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least one column per pass, got {chunk_size}")
        refuse_sparse(view)
        rows = batch_size(inputs)
        self.view = view
        self.inputs = inputs
        self._replay = view.snapshot()
        with differentiable():
            self.parameters = {n: p.detach().clone().requires_grad_() for n, p in view.parameters.items()}
            with view.curvature_pass(), self._replay:
                self.output = view.functional(self.parameters, inputs)
        self.z = self.output.detach()
        self._check_output()
        self.chunk_size = chunk_size or self._affordable_columns(rows)
        # In the order of speed. Functions, not methods: those would hold this object, and with it the graph with all
        # its activations, until the garbage collector comes by.
        kind = type(self)
        self._ways = [kind._jvp_vmapped, kind._jvp_looped, kind._jvp_by_transposing_twice]
        self._transposed: tuple[Tensor, list[Tensor]] | None = None

    def chunks(self, v: Float[Tensor, "n k"]) -> Iterator[slice]:
        """The columns of v in groups that one pass treats."""
        for start in range(0, v.shape[1], self.chunk_size):
            yield slice(start, min(start + self.chunk_size, v.shape[1]))

    def jvp(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "k batch ..."]:
        """J v for every column of v, each shaped like z."""
        directions = self.split(v)
        with torch.inference_mode(False):
            while True:
                way = self._ways[0]
                try:
                    return way(self, directions)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    if len(self._ways) == 1:
                        raise ValueError(self.not_differentiable()) from error
                    # Once an operation of this model has refused, it will refuse again.
                    self._ways.pop(0)

    def vjp(self, u: Float[Tensor, "k batch ..."]) -> Float[Tensor, "P k"]:
        """Jᵀ u for every u, each shaped like z."""
        with torch.inference_mode(False), self.view.curvature_pass():
            grads = batched_grad([self.output], list(self.parameters.values()), [u.to(self.output.dtype)])
        return self.flat(grads)

    def flat(self, grads: Sequence[Float[Tensor, "k ..."]]) -> Float[Tensor, "P k"]:
        """The inverse of `split`."""
        rows = torch.empty(grads[0].shape[0], self.view.num_parameters, dtype=self.view.dtype, device=grads[0].device)
        places = rows.split([p.numel() for p in self.parameters.values()], dim=1)
        for place, g in zip(places, grads, strict=True):
            place.unflatten(1, g.shape[1:] or (1,)).copy_(g if g.ndim > 1 else g[:, None])
        return rows.T

    def split(self, v: Float[Tensor, "P k"]) -> dict[str, Float[Tensor, "k ..."]]:
        """The columns of v as directions for each parameter, in the parameter's dtype."""
        parts = v.T.contiguous().split([p.numel() for p in self.parameters.values()], dim=1)
        return {
            name: part.reshape(-1, *p.shape).to(p.dtype)
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }

    def _tangent(self, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        point = {name: p.detach() for name, p in self.parameters.items()}
        z, tangent, *_ = torch.func.jvp(
            lambda values: self.view.functional(values, self.inputs), (point,), (direction,)
        )
        return z, tangent

    def _jvp_vmapped(self, directions: dict[str, Tensor]) -> Tensor:
        if _columns(directions) == 1:
            return self._jvp_looped(directions)
        with torch.no_grad(), self.view.curvature_pass(), self._replay:
            z, tangents = torch.func.vmap(self._tangent, randomness="same")(directions)
        return self._same_function(z[0], tangents)

    def _jvp_looped(self, directions: dict[str, Tensor]) -> Tensor:
        tangents: list[Tensor] = []
        for k in range(_columns(directions)):
            with torch.no_grad(), self.view.curvature_pass(), self._replay:
                z, tangent = self._tangent({name: part[k] for name, part in directions.items()})
            tangents.append(self._same_function(z, tangent))
        return torch.stack(tangents)

    def _jvp_by_transposing_twice(self, directions: dict[str, Tensor]) -> Tensor:
        """J v as the derivative of (Jᵀ u)·v by u: needs double backward only, on the graph that is there."""
        with differentiable(), self.view.curvature_pass():
            if self._transposed is None:
                u = torch.zeros_like(self.output, requires_grad=True)
                grads = torch.autograd.grad(
                    self.output, list(self.parameters.values()), u, create_graph=True, materialize_grads=True
                )
                self._transposed = u, list(grads)
            u, grads = self._transposed
            pairs = [(g, v) for g, v in zip(grads, directions.values(), strict=True) if g.requires_grad]
            return batched_grad([g for g, _ in pairs], [u], [v for _, v in pairs])[0]

    def _same_function(self, z: Tensor, tangents: Tensor) -> Tensor:
        """Refuses a tangent of another function, one whose random numbers the replay did not bring back."""
        difference = (z - self.z).abs().max()
        if difference > 1e-3 * self.z.abs().max() + 1e-6:
            raise RuntimeError("the model returned another output for the same inputs, parameters and random state")
        return tangents

    def _affordable_columns(self, rows: int) -> int:
        p = self.view.num_parameters
        widths = sum(parameter.shape[0] for parameter in self.parameters.values() if parameter.ndim > 1)
        activations = rows * widths + self.z.numel() + sum(leaf.numel() for leaf in tensor_leaves(self.inputs))
        return affordable_columns(3 * p + activations, self.z.element_size())

    def _check_output(self) -> None:
        z = self.output
        if z.ndim == 0 or not z.is_floating_point():
            raise ValueError(
                f"model: expected a real output z [batch, ...], got shape {list(z.shape)}, dtype {z.dtype}"
            )
        if not z.requires_grad:
            raise ValueError(
                "model: the output does not depend on any trainable parameter; if forward= is given, it must call the "
                "model that it receives, without torch.no_grad() and without a copy of its own"
            )
        if not bool(torch.isfinite(self.z).all()):
            raise ValueError("model: the output is not finite; look for NaN or infinity in the inputs and parameters")

    def not_differentiable(self) -> str:
        """What to say when no way of differentiating works."""
        bags = [name for name, module in self.view.module.named_modules() if isinstance(module, nn.EmbeddingBag)]
        what = f"EmbeddingBag {bags[0]!r}" if bags else "an operation of the model"
        return (
            f"{what} supports neither forward-mode differentiation nor double backward, so that the Jacobian cannot be "
            "applied; replace it, or freeze the parameters before it"
        )


def _columns(directions: dict[str, Tensor]) -> int:
    return next(iter(directions.values())).shape[0]


def join_columns(parts: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n k"]:
    """The columns of several passes side by side; those of a single pass are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat([part.T for part in parts]).T
