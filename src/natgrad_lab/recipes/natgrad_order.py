"""Figure 3 of [NATGRAD, secs. 6, 8.8]: how much each part of an online training set decides about the outcome."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import natgrad as ng
from natgrad_lab import labelled
from natgrad_lab.deformations import Deformation
from natgrad_lab.recipes.base import Size, recipe
from natgrad_lab.recipes.natgrad_training import glorot_
from natgrad_lab.recipes.run import Run

CLASSES = 10
MSGD, NATURAL = "MSGD", "natural gradient"


@recipe(
    "natgrad-fig3",
    title="variance by resampled part of the data",
    source="[NATGRAD, fig. 3]",
    full=Size(
        360,
        {
            "data": "mnist",
            "side": 14,
            "deformation": {},  # the defaults of natgrad_lab.deformations
            "held out": 2000,
            "hidden": 100,
            "batch": 512,
            "segments": 10,  # of the first half; the second half is as long
            "updates": 10,  # in a segment
            "resamplings": 5,
            "damping": 3.0,  # sec. 8.8
            "lr": 1.0,  # 0.2 in sec. 8.8, for 64 000 updates
            "between": [0.001, 3.0],  # MSGD's learning rate
            "halvings": 10,
        },
    ),
    quick=Size(
        5,
        {
            "data": "digits",
            "side": 8,
            "held out": 200,
            "hidden": 20,
            "batch": 64,
            "segments": 4,
            "updates": 3,
            "resamplings": 3,
            "halvings": 4,
        },
    ),
)
def figure_3(run: Run) -> None:
    """Train on a stream with one segment drawn anew, for every segment; both methods at equal validation error."""
    experiment = Experiment(run)
    equal = run.part("equal validation error", experiment.calibrate)
    rates = {NATURAL: run.configuration["lr"], MSGD: equal["lr"]}
    for method, lr in rates.items():
        for segment in range(run.configuration["segments"]):
            run.part(
                f"{method}, segment {segment + 1}", lambda m=method, lr=lr, s=segment: experiment.resample(m, lr, s)
            )


class Experiment:
    """A stream of deformed digits, a network, and what training on the stream makes of it."""

    def __init__(self, run: Run) -> None:
        c = self.configuration = run.configuration
        self.run = run
        data = labelled.load(c["data"], run.data).resized(c["side"]).to(device=run.device)
        images = (data.x_train.view(-1, c["side"], c["side"]), data.x_test.view(-1, c["side"], c["side"]))
        self.sources = tuple(zip(images, (data.y_train, data.y_test), strict=True))
        self.deformation = Deformation(**c["deformation"])
        self.x, self.y = self.draw(1, c["held out"], (0,))
        self.fixed = [self._segment(i, 0) for i in range(2 * c["segments"])]

    def draw(self, source: int, cases: int, key: tuple[int, ...]) -> tuple[Float[Tensor, "cases pixels"], Tensor]:
        """Deformed digits: of the training images (source 0) or the test images (1), others for every key."""
        words = np.random.SeedSequence([self.run.seed, source, *key]).generate_state(1)
        generator = torch.Generator().manual_seed(int(words[0]))
        images, classes = self.sources[source]
        rows = torch.randint(len(images), (cases,), generator=generator).to(images.device)
        return self.deformation(images[rows], generator).flatten(1), classes[rows]

    def stream(self, segment: int | None = None, resampling: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; those of one segment (None: of none) are other draws for every resampling."""
        c = self.configuration
        for i, kept in enumerate(self.fixed):
            x, y = self._segment(i, 1 + resampling) if i == segment else kept
            yield from zip(x.split(c["batch"]), y.split(c["batch"]), strict=True)

    def _segment(self, i: int, draw: int) -> tuple[Tensor, Tensor]:
        return self.draw(0, self.configuration["updates"] * self.configuration["batch"], (i, draw))

    def train(self, method: str, lr: float, stream: Iterator[tuple[Tensor, Tensor]]) -> nn.Module:
        """The network after the whole stream; it starts from the same parameters whatever the stream."""
        c = self.configuration
        net = nn.Sequential(nn.Linear(c["side"] ** 2, c["hidden"]), nn.Tanh(), nn.Linear(c["hidden"], CLASSES))
        model = glorot_(net, self.run.seed).to(self.x)
        likelihood = ng.Categorical()
        if method == MSGD:
            plain = torch.optim.SGD(model.parameters(), lr=lr)
            for x, y in stream:
                plain.zero_grad()
                likelihood.nll(model(x), y).backward()
                plain.step()
            return model
        natural = ng.NaturalGradient(model, likelihood, lr=lr, damping=c["damping"], rule=None, guard=False)
        for x, y in stream:
            natural.step(x, y)
        return model

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """The validation error, in percent."""
        return 100.0 * float((model(self.x).argmax(-1) != self.y).double().mean())

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """The mean nll of the held-out cases."""
        return float(ng.Categorical().nll(model(self.x), self.y))

    def calibrate(self) -> dict[str, Any]:
        """The learning rate at which MSGD ends with natural gradient's validation error, by halving an interval."""
        c = self.configuration
        with self.run.bar("learning rate of MSGD", 1 + c["halvings"]) as advance:
            natural = self.train(NATURAL, c["lr"], self.stream())
            wanted, tried = self.error(natural), []
            advance()
            low, high = (math.log(end) for end in c["between"])
            for _ in range(c["halvings"]):
                lr = math.exp((low + high) / 2)
                model = self.train(MSGD, lr, self.stream())
                tried.append({"lr": lr, "error": self.error(model), "loss": self.loss(model)})
                if tried[-1]["error"] > wanted:
                    low = math.log(lr)
                else:
                    high = math.log(lr)
                advance()
        nearest = min(tried, key=lambda one: abs(one["error"] - wanted))
        return {"natural": {"error": wanted, "loss": self.loss(natural)}, **nearest, "tried": tried}

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> Float[Tensor, "cases classes"]:
        return model(self.x).double().softmax(-1)

    def resample(self, method: str, lr: float, segment: int) -> Mapping[str, Any]:
        """Train once for every draw of a segment; the variance of the held-out outputs over these networks."""
        outputs, errors = [], []
        times = self.configuration["resamplings"]
        with self.run.bar(f"{method}, segment {segment + 1}", times) as advance:
            for resampling in range(times):
                model = self.train(method, lr, self.stream(segment, resampling))
                outputs.append(self._outputs(model))
                errors.append(self.error(model))
                advance()
        return {"variance": output_variance(torch.stack(outputs)), "errors": errors}


def output_variance(outputs: Float[Tensor, "runs cases classes"]) -> float:
    """The unbiased variance over runs, the mean over cases and classes."""
    return outputs.var(0).mean().item()
