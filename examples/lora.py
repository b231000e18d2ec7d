"""Fine-tuning with low-rank adapters over a frozen network: AdamW, and momentum SGD with a preconditioner.

A small network learns the digits 0 to 4. Then all of it is frozen, each linear layer gets an adapter (Hu et al. 2021:
W x + B A x, with two thin `nn.Linear`s), and the adapters learn the digits 5 to 9. Preconditioning sees to the adapters
alone: frozen layers have no factors and cost nothing.

    python examples/lora.py --out lora.png
"""

import torch
from comparison import Clock, Run, arguments, compare, due, positive
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng

# Equally many for every method, a factor of about 3 apart; `--rates` takes the first ones.
RATES = {"AdamW": (1e-2, 3e-3, 3e-2), "preconditioned SGD": (0.03, 0.1, 0.01)}
FIRST, SECOND = range(0, 5), range(5, 10)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it, which is 0 at first."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + B A x."""
        return self.base(x) + self.up(self.down(x))


def load(digits: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [cases, 64] of these digits and which of them they show: for training, then for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(data.data).float()[order] / 8 - 1, torch.from_numpy(data.target).long()[order]
    wanted = (y >= digits[0]) & (y <= digits[-1])
    x, y = x[wanted], y[wanted] - digits[0]
    cut = 4 * len(x) // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


def pretrained(width: int, steps: int, seed: int) -> nn.Sequential:
    """A network that knows the first five digits."""
    x, y, _, _ = load(FIRST)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def adapted(model: nn.Sequential, rank: int, seed: int) -> nn.Sequential:
    """The same network, frozen, with adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*(Adapted(layer, rank) if isinstance(layer, nn.Linear) else layer for layer in model))


def train(method: str, lr: float, *, width: int, rank: int, steps: int, batch: int, evaluations: int, seed: int) -> Run:
    """One run over the second five digits; the learning rate falls to 0 as half a cosine."""
    x, y, x_there, y_there = load(SECOND)
    model = adapted(pretrained(width, 300, seed), rank, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    likelihood = ng.Categorical()
    pre = None
    if method == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=lr)
    else:
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9)
        pre = ng.Preconditioner(model, likelihood)  # natgrad: only what is trained has factors
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    run, clock = Run(method, lr), Clock()
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        z = model(x[rows])
        loss = likelihood.nll(z, y[rows])
        if pre is not None:
            pre.observe(z)  # natgrad: curvature of this batch, when it is due
        loss.backward()
        if pre is not None:
            pre.step()  # natgrad: gradients become preconditioned gradients
        optimizer.step()
        scheduler.step()
        if due(step, steps, evaluations):
            seconds = clock.pause()
            with torch.no_grad():
                z = model(x_there)
            right = float((z.argmax(1) == y_there).float().mean())
            run.add(step, seconds, float(likelihood.nll(z, y_there)), f"{right:.1%} right")
            clock.resume()
    return run


def main(words: list[str] | None = None) -> dict[str, Run]:
    """Train with every method and learning rate, draw, and return the best run of each method."""
    parser = arguments(__doc__, "lora.png", steps=200, batch=128)
    parser.add_argument("--width", type=positive, default=128, help="of the hidden layers")
    parser.add_argument("--rank", type=positive, default=4, help="of the adapters")
    options = parser.parse_args(words)
    same = {key: getattr(options, key) for key in ("width", "rank", "steps", "batch", "evaluations", "seed")}
    model = adapted(pretrained(options.width, 1, 0), options.rank, 0)
    print(ng.Preconditioner(model, ng.Categorical()).coverage())
    return compare(options, RATES, lambda method, lr: train(method, lr, **same), "validation loss")


if __name__ == "__main__":
    main()
