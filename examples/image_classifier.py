"""A residual network on small images: momentum SGD, alone and with a preconditioner in front of it, AdamW, EigenAdam.

The loop is an ordinary one; what natgrad adds or changes is marked. The images are a part of CIFAR-10 where the
environment variable NATGRAD_DATA names a folder that holds cifar10/cifar10_subset.npz, else the digits of scikit-learn.

    python examples/image_classifier.py --out image-classifier.png
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from comparison import Clock, Run, arguments, compare, due, positive
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng

# Equally many for every method, a factor of about 3 apart; `--rates` takes the first ones.
RATES = {
    "SGD": (0.1, 0.03, 0.3, 0.01),
    "AdamW": (1e-2, 3e-3, 3e-2, 1e-3),
    "preconditioned SGD": (0.3, 0.1, 1.0, 0.03),
    "EigenAdam": (3e-2, 1e-2, 1e-1, 3e-3),
}


@dataclass
class Images:
    """Images [cases, channels, height, width], normalised, and their classes."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load(name: str | None = None) -> Images:
    """CIFAR-10's subset where it is, else digits; or the one that is named."""
    path = Path(os.environ.get("NATGRAD_DATA", "")) / "cifar10" / "cifar10_subset.npz"
    if name is None:
        name = "cifar10" if path.is_file() else "digits"
    if name == "cifar10":
        with np.load(path) as file:
            x_train, x_test = (torch.from_numpy(file[key]).float().view(-1, 3, 32, 32) for key in ("x_train", "x_test"))
            y_train, y_test = (torch.from_numpy(file[key]).long() for key in ("y_train", "y_test"))
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
        x, y = torch.from_numpy(digits.images).float()[order, None], torch.from_numpy(digits.target).long()[order]
        x_train, y_train, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]
    mean, std = x_train.mean((0, 2, 3), keepdim=True), x_train.std((0, 2, 3), keepdim=True)
    return Images(name, (x_train - mean) / std, y_train, (x_test - mean) / std, y_test)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def make_model(channels: int, width: int, blocks: int, seed: int) -> nn.Module:
    """ResNet-20 with ``blocks=3`` and ``width=16``: three stages, each twice as wide as the one before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
        for stage in range(3):
            for i in range(blocks):
                layers.append(Block(before, width * 2**stage, stride=2 if stage > 0 and i == 0 else 1))
                before = width * 2**stage
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to an eighth and, where that leaves the class alone (colour images), mirrored."""
    most = x.shape[-1] // 8
    dx, dy = (int(torch.randint(0, 2 * most + 1, (), generator=generator)) for _ in range(2))
    height, width = x.shape[-2:]
    x = F.pad(x, [most] * 4)[..., dy : dy + height, dx : dx + width]
    if x.shape[1] == 3:
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x.flip(-1), x)
    return x


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    with torch.no_grad():
        z = torch.cat([model(part) for part in x.split(256)])
    model.train()
    return float(F.cross_entropy(z, y)), float((z.argmax(1) == y).float().mean())


def train(
    data: Images,
    method: str,
    lr: float,
    *,
    width: int,
    blocks: int,
    steps: int,
    batch: int,
    evaluations: int,
    seed: int,
) -> Run:
    """One run; the learning rate falls to 0 as half a cosine."""
    model = make_model(data.x_train.shape[1], width, blocks, seed)
    likelihood = ng.Categorical()
    if method == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    elif method == "EigenAdam":
        optimizer = ng.EigenAdam(  # natgrad: with statistics that keep up with a short run
            model,
            likelihood,
            lr=lr,
            weight_decay=0.05,
            width=64,
            subsets=ng.Subsets(1 / 4, 1 / 4),
            periods=ng.Periods(inverses=10, statistics=5, early=(1, 3, 6)),
            decay=0.8,
        )
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pre = None
    if method == "preconditioned SGD":
        pre = ng.Preconditioner(model, likelihood, periods=ng.Renewal(inverses=50, statistics=10))  # natgrad
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.x_train), generator=generator)
    run, clock = Run(method, lr), Clock()
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(data.x_train), generator=generator)
        rows, order = order[:batch], order[batch:]
        x, y = augmented(data.x_train[rows], generator), data.y_train[rows]
        if isinstance(optimizer, ng.EigenAdam):
            optimizer.step(x, y)  # natgrad: evaluates the model itself
        else:
            optimizer.zero_grad()
            z = model(x)
            loss = likelihood.nll(z, y)
            if pre is not None:
                pre.observe(z)  # natgrad: curvature of this batch, when it is due
            loss.backward()
            if pre is not None:
                pre.step()  # natgrad: gradients become preconditioned gradients
            optimizer.step()
        scheduler.step()
        if due(step, steps, evaluations):
            seconds = clock.pause()
            loss_test, accuracy = evaluate(model, data.x_test, data.y_test)
            run.add(step, seconds, loss_test, f"{accuracy:.1%} right")
            clock.resume()
    return run


def main(words: list[str] | None = None) -> dict[str, Run]:
    """Train with every method and learning rate, draw, and return the best run of each method."""
    parser = arguments(__doc__, "image-classifier.png", steps=200, batch=128)
    parser.add_argument("--data", choices=("cifar10", "digits"), help="by default CIFAR-10 where it is found")
    parser.add_argument("--width", type=positive, default=8, help="channels of the first stage; ResNet-20 has 16")
    parser.add_argument("--blocks", type=positive, default=3, help="in each of the three stages; ResNet-20 has 3")
    options = parser.parse_args(words)
    data = load(options.data)
    print(f"{data.name}: {len(data.x_train)} images for training, {len(data.x_test)} for validation")
    same = {key: getattr(options, key) for key in ("width", "blocks", "steps", "batch", "evaluations", "seed")}
    return compare(options, RATES, lambda method, lr: train(data, method, lr, **same), "validation loss")


if __name__ == "__main__":
    main()
