"""Every option of convolutions against derivatives, and the memory that patches take."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.layers import draw, kronecker, softmax_fisher
from torch import Tensor, nn

import natgrad as ng
from natgrad.layers import convolution, patches, shifts

CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(2, 3, 2), (4, 4)),
    "stride and padding": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 4)),
    "dilation": (lambda: nn.Conv2d(1, 2, 2, dilation=(2, 1)), (4, 4)),
    "no bias": (lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False), (4, 3)),
    "same, even kernel": (lambda: nn.Conv2d(1, 2, (2, 3), padding="same"), (3, 4)),
    "valid": (lambda: nn.Conv2d(1, 2, 2, padding="valid"), (3, 3)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (3, 4)),
    "circular, same": (lambda: nn.Conv2d(1, 2, 2, padding="same", padding_mode="circular"), (3, 3)),
    "reflect": (lambda: nn.Conv2d(1, 2, 3, padding=(2, 1), padding_mode="reflect"), (4, 4)),
    "replicate": (lambda: nn.Conv2d(1, 2, 3, padding=1, stride=2, padding_mode="replicate"), (5, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (3, 3)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3, padding=1), (3, 3)),
    "depthwise with a multiplier": (lambda: nn.Conv2d(2, 4, 2, groups=2, bias=False), (3, 3)),
    "1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (5,)),
    "3d": (lambda: nn.Conv3d(1, 2, 2), (3, 3, 3)),
    "1x1": (lambda: nn.Conv2d(3, 2, 1), (2, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (3, 2)),
    "transposed, dilated": (lambda: nn.ConvTranspose2d(2, 2, 2, dilation=2), (3, 3)),
    "transposed, cropped": (lambda: nn.ConvTranspose1d(2, 2, 2, stride=1, padding=2), (6,)),
    "transposed, groups": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (3,)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(1, 2, 2, bias=False), (2, 2, 2)),
}


class Net(nn.Module):
    """A convolution, tanh, and a linear map of all that comes out."""

    def __init__(self, layer: nn.Module, size: tuple[int, ...], outputs: int = 3) -> None:
        super().__init__()
        self.conv = layer
        channels = layer.in_channels  # pyrefly: ignore
        self.head = nn.Linear(layer(torch.zeros(1, channels, *size)).numel(), outputs)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def make(name: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    layer, size = CONVOLUTIONS[name]
    net = Net(layer(), size)
    return net, draw(3, net.conv.in_channels, *size)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_factors_are_those_of_the_definition(name: str, sharing: str) -> None:
    net, x = make(name)
    k = ng.kronecker_fisher(net, ng.Categorical(), x, sharing=sharing)
    A, G = kronecker(net, net.conv, x, softmax_fisher, sharing)
    torch.testing.assert_close(k.factors["conv"].A, A)
    torch.testing.assert_close(k.factors["conv"].G, G)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_block_acts_on_the_weight_as_torch_stores_it(name: str) -> None:
    """One linear convolution under Gaussian noise with one position: K-FAC's block is the Fisher matrix itself."""
    torch.manual_seed(0)
    layer = CONVOLUTIONS[name][0]().double()
    kernel = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    layer.stride = (1,) * len(kernel)
    if transposed:  # one position: crop all others
        layer.output_padding, size = (0,) * len(kernel), kernel
        layer.padding = tuple(k - 1 for k in kernel)
    else:
        layer.padding_mode, layer.padding, size = "zeros", (0,) * len(kernel), kernel
        layer._reversed_padding_repeated_twice = [0] * (2 * len(kernel))
    x = draw(5, layer.in_channels, *size)
    assert layer(x).flatten(2).shape[2] == 1
    k = ng.kronecker_fisher(layer, ng.Gaussian(0.5), x)
    torch.testing.assert_close(k.to_dense(), ng.Fisher(layer, ng.Gaussian(0.5), x).to_dense())
    v = draw(k.shape[0], 2, seed=1)
    torch.testing.assert_close(k @ v, k.to_dense() @ v)
    eye = torch.eye(k.shape[0], dtype=v.dtype)
    for kind in ("exact", "factored"):
        inverse = k.inverse(0.3, kind=kind)
        torch.testing.assert_close(inverse @ v, inverse.to_dense() @ v)
    torch.testing.assert_close(k.inverse(0.3, kind="exact").to_dense(), torch.linalg.inv(k.to_dense() + 0.3 * eye))


@pytest.mark.parametrize("name", ["circular", "depthwise", "transposed, groups", "3d", "stride and padding"])
@pytest.mark.parametrize("elements", [1, 40, 300])
def test_any_number_of_patches_at_a_time(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make(name)
    expected = ng.kronecker_fisher(net, ng.Categorical(), x).factors["conv"].A
    monkeypatch.setattr(patches, "_ELEMENTS_CPU", elements)
    sizes = {"patch_matrices": [], "parts_of": []}

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def kept(*args: Any) -> Any:
            for part in original(*args):
                sizes[name].append(part.numel())
                yield part

        monkeypatch.setattr(module, name, kept)

    watched(convolution, "patch_matrices")
    watched(shifts, "parts_of")
    found = ng.kronecker_fisher(net, ng.Categorical(), x).factors["conv"].A
    torch.testing.assert_close(found, expected)
    view, d = net.conv(x).shape, expected.shape[-1] - 1
    line = expected.numel() // (d + 1) ** 2 * d * view[3:].numel()  # one line of output positions at a time
    if sizes["patch_matrices"]:
        assert max(sizes["patch_matrices"]) <= max(line, elements) and not sizes["parts_of"]
        assert elements > 1 or len(sizes["patch_matrices"]) == len(x) * view[2]
    else:  # a line of the input is what the rest of the kernel sees of it; three times the overlap, and one
        taps = net.conv.kernel_size[0]
        assert max(sizes["parts_of"]) <= max(line // taps * (3 * (taps - 1) + 1), elements)
    assert bool(sizes["patch_matrices"]) == (name == "stride and padding"), sizes


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(5, 11), st.integers(5, 7)),
    elements=st.sampled_from([1, 200, 10**6]),
    channels_last=st.booleans(),
)
def test_products_of_lines_are_shared(
    kernel: Any, stride: Any, dilation: Any, groups: int, size: Any, elements: int, channels_last: bool
) -> None:
    """Sums and moments of all patches, written out and by lines, whatever the options and the number of parts."""
    x = draw(3, 4, *size)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    view = patches.patch_view(x, kernel, stride, dilation)
    lines = shifts.lines_of(view, groups)
    assert (lines is None) == (
        kernel[0] == 1 or dilation[0] % stride[0] > 0 or view.shape[4] <= dilation[0] // stride[0] * (kernel[0] - 1)
    )
    if lines is not None:
        p = torch.cat(list(patches.patch_matrices(view, groups)), dim=2)
        sums, moment = shifts.moments_of(lines, elements, True, p.dtype)
        torch.testing.assert_close(moment, p @ p.mT)
        torch.testing.assert_close(sums, p.sum(2))


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    size=st.integers(5, 7),
)
def test_rows_and_gradients_give_the_gradient_of_the_weight(
    kernel: int, stride: int, padding: int, dilation: int, groups: int, mode: str, size: int
) -> None:
    """``∇W = Σ g pᵀ`` over all positions."""
    layer = nn.Conv1d(2, 4, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    block = ng.layers.registry.block_of("conv", layer)
    x, out = draw(3, 2, size), layer(draw(3, 2, size))
    g = draw(*out.shape, seed=1)
    use = ng.layers.Use(layer, x, out.shape)
    p = torch.cat(list(patches.patch_matrices(block.rule.patches(use), groups)), dim=2)
    rows = g.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
    V = torch.cat([rows @ p.mT, rows.sum(2, keepdim=True)], dim=2)
    found = block.from_matrix(V if groups > 1 else V[0])
    expected = torch.autograd.grad(out, [layer.weight, layer.bias], g)
    torch.testing.assert_close(found["weight"], expected[0])
    torch.testing.assert_close(found["bias"], expected[1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("features", [5, 13, 300])
def test_half_a_product_is_the_whole_one(features: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_ROWS_OF_A_BLOCK", 3)
    p, total = draw(groups, features, 7), torch.zeros(groups, features, features, dtype=torch.float64)
    for part in p.split(4, dim=2):
        patches.add_lower(part, total)
    torch.testing.assert_close(patches.mirror(total), p @ p.mT)
