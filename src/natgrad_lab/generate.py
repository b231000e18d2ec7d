"""The two data sets that have to be made: CURVES, and the FACES patches from the Olivetti photographs.

Both follow G. Hinton and R. Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 313
(2006) and its supplement. Their random choices are unknown, so errors are near the published ones, not equal to them.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIDE = 28
LOW, HIGH, GAP = 2.0, 26.0, 2.0  # range of the coordinates of a curve's points; least distance in x
POINTS = 60  # inked points along a curve
INK = 0.74  # of one point
SPREAD = 0.7  # share of the ink that one pass of the kernel moves to the eight neighbours
PASSES = 2
FINE = 400  # points at which a curve is evaluated to measure its length
CHUNK = 2000

PATCH = 25
ANGLE = math.pi / 2  # rotations are uniform in [-ANGLE, ANGLE]
SCALE = (1.4, 1.8)  # source pixels per pixel of a patch; at 1.8 a patch turned by 45° still fits into 64 x 64


def curves(n: int, seed: int = 0) -> Tensor:
    """Images of random smooth curves, the set CURVES.

    Each image shows the natural cubic spline y(x) through three random points: coordinates uniform in [2, 26], each x
    at least 2 above the one before. 60 points at equal arc length are inked, the ink of each divided among its four
    nearest pixels by bilinear interpolation; a 3 x 3 kernel is applied twice, and intensities are clipped at 1. Ink
    and kernel were chosen to match two published numbers: the squared distance to the mean (16 to 18; these have 17.2)
    and the error of PCA with 18 components (5.90; these have 6.2).

    Args:
        n: How many; the first images do not depend on it.
        seed: Which set.

    Returns:
        uint8 [n, 784], intensity 1 as 255.

    Raises:
        ValueError: negative `n`.
    """
    if n < 0:
        raise ValueError(f"n is {n}; expected a number of images of at least 0")
    draws = torch.from_numpy(np.random.default_rng(seed).random((n, 6)))
    # Sorted uniform numbers spread by the least gap are uniform among all triples with that gap.
    x = LOW + (HIGH - LOW - 2 * GAP) * draws[:, :3].sort(dim=1).values + GAP * torch.arange(3, dtype=torch.float64)
    y = LOW + (HIGH - LOW) * draws[:, 3:]
    images = [_ink(*_equidistant(x[i : i + CHUNK], y[i : i + CHUNK])) for i in range(0, n, CHUNK)]
    return torch.cat(images) if images else torch.empty(0, SIDE * SIDE, dtype=torch.uint8)


def natural_spline(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The cubic spline through three points whose second derivative vanishes at both ends.

    With h_i = x_{i+1} - x_i and slopes d_i = (y_{i+1} - y_i) / h_i, its second derivative M in the middle is given by
    2 (h_0 + h_1) M = 6 (d_1 - d_0), and on piece i, at a distance u from the left and w from the right end,
    y = (y_i w + y_{i+1} u) / h - M h² (r - r³) / 6, where r = u / h on the left piece and w / h on the right one.

    Args:
        x: [n, 3], increasing.
        y: [n, 3].
        t: [n, k], within [x_0, x_2].

    Returns:
        [n, k].
    """
    h, d = x.diff(dim=1), y.diff(dim=1) / x.diff(dim=1)
    middle = 3.0 * (d[:, 1] - d[:, 0]) / (h[:, 0] + h[:, 1])
    left = t <= x[:, 1:2]

    def pick(columns: Tensor) -> Tensor:
        return torch.where(left, columns[:, 0:1], columns[:, 1:2])

    width = pick(h)
    share = (t - pick(x)) / width
    r = torch.where(left, share, 1.0 - share)
    chord = pick(y) * (1.0 - share) + pick(y[:, 1:]) * share
    return chord - middle[:, None] * width.square() * (r - r**3) / 6.0


def _equidistant(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`POINTS` points at equal distances along each curve, the ends included: x [n, 60] and y [n, 60]."""
    t = x[:, :1] + (x[:, 2:] - x[:, :1]) * torch.linspace(0, 1, FINE, dtype=torch.float64)
    height = natural_spline(x, y, t).clamp(0.0, SIDE - 1.0)  # a spline may overshoot its points, and the image
    length = functional.pad(torch.hypot(t.diff(dim=1), height.diff(dim=1)).cumsum(dim=1), (1, 0))
    wanted = length[:, -1:] * torch.linspace(0, 1, POINTS, dtype=torch.float64)
    right = torch.searchsorted(length, wanted).clamp(1, FINE - 1)
    before, after = length.gather(1, right - 1), length.gather(1, right)
    share = (wanted - before) / (after - before)

    def between(values: Tensor) -> Tensor:
        return torch.lerp(values.gather(1, right - 1), values.gather(1, right), share)

    return between(t), between(height)


def _ink(x: Tensor, y: Tensor) -> Tensor:
    """Images [n, 784] of inked points x, y [n, points] in pixel units, the centre of pixel (row, column) at (y, x)."""
    n = len(x)
    image = torch.zeros(n, SIDE * SIDE, dtype=torch.float64)
    column, row = x.floor().clamp(0, SIDE - 2), y.floor().clamp(0, SIDE - 2)
    dx, dy = x - column, y - row
    for down in (0, 1):
        for across in (0, 1):
            share = (dy if down else 1.0 - dy) * (dx if across else 1.0 - dx)
            image.scatter_add_(1, ((row + down) * SIDE + column + across).long(), INK * share)
    edge, corner = SPREAD / 6.0, SPREAD / 12.0
    kernel = torch.tensor([[corner, edge, corner], [edge, 1.0 - SPREAD, edge], [corner, edge, corner]])
    image = image.view(n, 1, SIDE, SIDE).float()
    for _ in range(PASSES):
        image = functional.conv2d(image, kernel[None, None], padding=1)
    return image.clamp_(max=1.0).mul_(255.0).round_().to(torch.uint8).view(n, SIDE * SIDE)


def face_patches(faces: Tensor, per_face: int, seed: int = 0) -> Tensor:
    """Patches of 25 x 25 pixels, cut out of faces at random positions, turned and scaled, the raw set FACES.

    Rotations are uniform in ±90°, scales uniform in 1.4 to 1.8 source pixels per pixel, positions uniform among those
    where the turned patch lies inside the photograph; pixels are interpolated bilinearly.

    Args:
        faces: [images, height, width], any floating dtype.
        per_face: Patches of each.
        seed: Which set.

    Returns:
        [images * per_face, 625], image by image, before any shift or scale of the pixels.

    Raises:
        ValueError: photographs too small for a patch turned by 45° at the largest scale.
    """
    count, height, width = faces.shape
    reach = (PATCH - 1) / 2 * SCALE[1] * math.sqrt(2.0)
    if min(height, width) - 1 < 2 * reach:
        raise ValueError(f"faces are {height} x {width} pixels; patches need at least {math.ceil(2 * reach) + 1}")
    draws = torch.from_numpy(np.random.default_rng(seed).random((count, per_face, 4)))
    offset = torch.arange(PATCH, dtype=torch.float64) - (PATCH - 1) / 2
    down, across = torch.meshgrid(offset, offset, indexing="ij")
    patches = []
    for face, draw in zip(faces, draws, strict=True):
        angle = ANGLE * (2.0 * draw[:, 0] - 1.0)
        scale = SCALE[0] + (SCALE[1] - SCALE[0]) * draw[:, 1]
        cos, sin = (scale * angle.cos())[:, None, None], (scale * angle.sin())[:, None, None]
        # Half of the side of the upright square around the turned patch: how far its centre is from every border.
        half = (PATCH - 1) / 2 * (cos.abs() + sin.abs())
        x = half + (width - 1 - 2 * half) * draw[:, 2, None, None] + cos * across - sin * down
        y = half + (height - 1 - 2 * half) * draw[:, 3, None, None] + sin * across + cos * down
        grid = torch.stack([2.0 * x / (width - 1) - 1.0, 2.0 * y / (height - 1) - 1.0], dim=-1).to(faces.dtype)
        source = face.expand(per_face, 1, height, width)
        patches.append(functional.grid_sample(source, grid, padding_mode="border", align_corners=True).flatten(1))
    return torch.cat(patches)
