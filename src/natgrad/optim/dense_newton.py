"""Newton's method with the dense Hessian, whole or in blocks, for small problems."""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.damping import check_damping
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.autodiff import Hessian
from natgrad.operators.sandwich import check_likelihood
from natgrad.optim.of_model import OptimizerOfModel
from natgrad.optim.stats import Stats

Structure = Literal["full", "block_diagonal"]
_LARGEST = 10_000  # parameters of a block: 800 MB in double precision


class Newton(OptimizerOfModel):
    r"""``θ ← θ − lr (H + ε I)^{-1} ∇h`` with H the Hessian of ``likelihood.nll`` [THESIS, sec. 3.1].

    ``structure="full"`` is Newton's step [THESIS, eq. 3.1.1], with ε > 0 the Tikhonov-regularised one [THESIS, sec.
    3.1.3]. ``"block_diagonal"`` keeps the block of each module's own parameters, ``H_i^{-1} ∇_i h`` [THESIS, sec.
    3.1.5]. H is dense, and indefinite away from a minimum: the step then leads to a saddle point unless ε exceeds the
    most negative eigenvalue. For small problems, and as a twin for what approximates it.

    Args:
        model: any module with a double backward.
        likelihood: p(y | z).
        lr: multiplies the step.
        damping: ε.
        structure: as above.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.

    Attributes:
        stats: ``loss``, ``updates``, ``skipped`` (batches whose loss or step was not finite).

    Raises:
        ValueError: a setting out of range, or a block of more than 10000 parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 1.0,
        damping: float = 0.0,
        structure: Structure = "full",
        forward: Forward | None = None,
    ) -> None:
        check_damping(damping)
        check_likelihood(likelihood)
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr={lr}: expected a finite number of at least 0; 1 takes the computed step")
        if structure not in get_args(Structure):
            raise ValueError(f"structure={structure!r}: Newton knows 'full' and 'block_diagonal'")
        self.view, self.likelihood = ModelView(model, forward), likelihood
        self.structure = structure
        self._blocks = _blocks(self.view, structure)
        largest = max(len(block) for block in self._blocks)
        if largest > _LARGEST:
            raise ValueError(
                f"model: a block of {largest} parameters has a Hessian too large to be held; use natgrad.HessianFree "
                "or natgrad.NaturalGradient"
            )
        group = {"lr": lr, "damping": float(damping), "updates": 0, "skipped": 0}
        super().__init__(list(self.view.parameters.items()), group)
        self.stats = Stats()

    @torch.no_grad()
    def step(  # pyrefly: ignore[bad-override] - Newton evaluates the model itself
        self, inputs: Any = None, targets: Any = None, closure: Any = None
    ) -> Float[Tensor, ""]:
        """Evaluate loss, gradient and Hessian of a batch and make one step.

        Args:
            inputs: one batch, as the model or ``forward`` takes it.
            targets: what the likelihood compares z with.
            closure: not supported.

        Returns:
            the loss before the step. Where it or the step is not finite nothing changes.

        Raises:
            TypeError: a closure is given, or inputs are missing.
            ValueError: a block of the Hessian is singular; a damping is proposed, and nothing was changed.
        """
        if closure is not None or inputs is None:
            raise TypeError("Newton.step(inputs, targets) evaluates the model itself and takes no closure")
        group = self.param_groups[0]
        with torch.enable_grad():
            loss = self.likelihood.nll(self.view(inputs), targets)
            parameters = list(self.view.parameters.values())
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([g.reshape(-1) for g in found]).to(self.view.dtype)
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())
        if finite:
            hessian = Hessian(self.view, self.likelihood, inputs, targets)
            step = torch.zeros_like(gradient)
            for index in self._blocks:
                step[index] = _solve(_block(hessian, index), float(group["damping"]), gradient[index])
            finite = bool(torch.isfinite(step).all())
            if finite:
                for name, part in self.view.to_dict(step).items():
                    self.view.parameters[name].add_(part, alpha=-float(group["lr"]))
        group["updates"] += 1
        group["skipped"] += not finite
        self.stats = Stats({"loss": loss.detach(), "updates": group["updates"], "skipped": group["skipped"]})
        return loss.detach()


def _blocks(view: ModelView, structure: str) -> list[Tensor]:
    """Where the parameters of every block stand in a vector over them; a shared one belongs to its first module."""
    index = view.to_dict(torch.arange(view.num_parameters, device=view.device))
    if structure == "full":
        return [torch.cat([part.reshape(-1) for part in index.values()])]
    position = {id(p): index[name].reshape(-1) for name, p in view.parameters.items()}
    blocks = []
    for module in view.module.modules():
        own = [position.pop(id(p)) for p in module._parameters.values() if p is not None and id(p) in position]
        if own:
            blocks.append(torch.cat(own))
    return blocks


def _block(hessian: Hessian, index: Tensor) -> Tensor:
    """A diagonal block, by products with its own unit vectors."""
    units = torch.zeros(hessian.shape[1], len(index), dtype=hessian.dtype, device=hessian.device)
    units[index, torch.arange(len(index), device=index.device)] = 1
    return (hessian @ units)[index]


def _solve(H: Tensor, damping: float, gradient: Tensor) -> Tensor:
    damped = (H + H.T) / 2
    damped.diagonal().add_(damping)
    solution, info = torch.linalg.solve_ex(damped, gradient)
    values = torch.linalg.eigvalsh(damped).abs()
    if bool(info != 0) or bool(values.min() <= values.max() * torch.finfo(H.dtype).eps * len(H)):
        raise ValueError(
            f"a block of {len(H)} parameters of the Hessian is singular with damping={damping:g}; pass a damping, for "
            f"example {max(1e-3 * float(values.mean()), 1e-8):.1e}"
        )
    return solution
