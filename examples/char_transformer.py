"""A character transformer: AdamW, alone and with a preconditioner in front of it, and EigenAdam.

The text is Tiny Shakespeare where the environment variable NATGRAD_DATA names a folder that holds
tinyshakespeare/input.txt, else two poems below. What natgrad adds to or changes in the loop is marked.

    python examples/char_transformer.py --out char-transformer.png
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from comparison import Clock, Run, arguments, compare, due, positive
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng

# Equally many for every method, a factor of about 3 apart; `--rates` takes the first ones.
RATES = {
    "AdamW": (3e-2, 1e-2, 1e-1),
    "preconditioned AdamW": (3e-2, 1e-2, 1e-1),
    "EigenAdam": (3e-2, 1e-2, 1e-1),
}

POEMS = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou owest;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou growest:
So long as men can breathe or eyes can see,
So long lives this and this gives life to thee.

My mistress' eyes are nothing like the sun;
Coral is far more red than her lips' red;
If snow be white, why then her breasts are dun;
If hairs be wires, black wires grow on her head.
I have seen roses damask'd, red and white,
But no such roses see I in her cheeks;
And in some perfumes is there more delight
Than in the breath that from my mistress reeks.
I love to hear her speak, yet well I know
That music hath a far more pleasing sound;
I grant I never saw a goddess go;
My mistress, when she walks, treads on the ground:
And yet, by heaven, I think my love as rare
As any she belied with false compare.
"""


@dataclass
class Text:
    """Character numbers, split into training and validation text, and the characters themselves."""

    name: str
    train: Tensor
    validation: Tensor
    characters: str

    def windows(self, part: Tensor, context: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random pieces of `context` characters, and for each of their characters the next one."""
        starts = torch.randint(len(part) - context, (count, 1), generator=generator)
        piece = part[starts + torch.arange(context + 1)]
        return piece[:, :-1], piece[:, 1:]


def load(name: str | None = None) -> Text:
    """Tiny Shakespeare where it is, else two sonnets; or the one that is named."""
    path = Path(os.environ.get("NATGRAD_DATA", "")) / "tinyshakespeare" / "input.txt"
    if name is None:
        name = "tinyshakespeare" if path.is_file() else "sonnets"
    text = path.read_text(encoding="ascii") if name == "tinyshakespeare" else POEMS
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    cut = int(0.9 * len(ids))
    return Text(name, ids[:cut], ids[cut:], characters)


class Block(nn.Module):
    """Attention to what came before, and a small network at every position; both added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] → the same."""
        normed = self.norm1(x)
        q, k, v = (
            f(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters [batch, time] → logits of the next one [batch, time, characters]."""

    def __init__(self, characters: int, context: int, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits."""
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make_model(characters: int, context: int, width: int, layers: int, seed: int) -> Transformer:
    """A fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformer(characters, context, width, layers)


def evaluate(model: nn.Module, text: Text, context: int) -> float:
    """Validation loss, nats per character, over the same windows every time."""
    x, y = text.windows(text.validation, context, 128, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def train(
    text: Text, method: str, lr: float, *, width: int, layers: int, context: int, steps: int, batch: int,
    evaluations: int, seed: int,
) -> Run:  # fmt: skip
    """One run; the learning rate rises over the first twentieth and then falls to 0 as half a cosine."""
    model = make_model(len(text.characters), context, width, layers, seed)
    likelihood = ng.Categorical("element")  # the mean over all characters of the batch
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    pre = None
    if method == "preconditioned AdamW":
        pre = ng.Preconditioner(model, likelihood, periods=ng.Renewal(inverses=50, statistics=10))  # natgrad
    elif method == "EigenAdam":
        optimizer = ng.EigenAdam(  # natgrad: with statistics that keep up with a short run
            model,
            likelihood,
            lr=lr,
            weight_decay=0.1,
            width=64,
            subsets=ng.Subsets(1 / 4, 1 / 4),
            periods=ng.Periods(inverses=10, statistics=5, early=(1, 3, 6)),
            decay=0.8,
        )
    warmup = max(1, steps // 20)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
    generator = torch.Generator().manual_seed(seed)
    run, clock = Run(method, lr), Clock()
    for step in range(1, steps + 1):
        x, y = text.windows(text.train, context, batch, generator)
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
            loss_there = evaluate(model, text, context)
            run.add(step, seconds, loss_there, f"{loss_there:.3f} nats")
            clock.resume()
    return run


def main(words: list[str] | None = None) -> dict[str, Run]:
    """Train with every method and learning rate, draw, and return the best run of each method."""
    parser = arguments(__doc__, "char-transformer.png", steps=400, batch=32)
    parser.add_argument("--data", choices=("tinyshakespeare", "sonnets"), help="by default the first, where it is")
    parser.add_argument("--width", type=positive, default=48, help="of the embedding")
    parser.add_argument("--layers", type=positive, default=2, help="blocks")
    parser.add_argument("--context", type=positive, default=32, help="characters in a window")
    options = parser.parse_args(words)
    text = load(options.data)
    print(f"{text.name}: {len(text.train)} characters for training, {len(text.validation)} for validation")
    names = ("width", "layers", "context", "steps", "batch", "evaluations", "seed")
    same = {key: getattr(options, key) for key in names}
    return compare(
        options, RATES, lambda method, lr: train(text, method, lr, **same), "validation loss, nats per character"
    )


if __name__ == "__main__":
    main()
