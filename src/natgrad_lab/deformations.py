"""Digits, deformed at random: an endless supply of labelled images from a finite one."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Deformation:
    """How much images change. Each image gets a map of its own from its pixels to places in the original.

    The map is a rotation, after a stretching of the two axes, a shear and a shift, plus a smooth field of
    displacements: independent normal vectors on a coarse grid over the image, interpolated bicubically. Places between
    pixels are interpolated bilinearly; outside of the original it is black. Then the ink fades and noise is added.

    Args:
        rotation: Largest angle, in degrees; uniform in ± that.
        stretch: Standard deviation of the logarithm of each axis' factor.
        shear: Largest shear; uniform in ± that.
        shift: Largest shift of each axis, as a share of the side; uniform in ± that.
        field: Standard deviation of the displacements on the grid, as a share of the side.
        grid: Points of the grid along a side.
        fade: The ink is multiplied by a number uniform between 1 − fade and 1.
        noise: Standard deviation of the noise of a pixel; the result is cut to [0, 1].
    """

    rotation: float = 25.0
    stretch: float = 0.1
    shear: float = 0.3
    shift: float = 0.08
    field: float = 0.04
    grid: int = 4
    fade: float = 0.5
    noise: float = 0.1

    def __call__(
        self, images: Float[Tensor, "cases side side"], generator: torch.Generator
    ) -> Float[Tensor, "cases side side"]:
        """Deformed copies.

        Args:
            images: Square ones, in [0, 1].
            generator: On the CPU; all that is random.
        """
        n, side, _ = images.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=generator) - 1

        angle = torch.deg2rad(self.rotation * uniform(n))
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
        shape = torch.diag_embed((self.stretch * normal(n, 2)).exp())
        shape[:, 0, 1] = self.shear * uniform(n)
        affine = torch.cat([turn @ shape, 2 * self.shift * uniform(n, 2, 1)], 2)  # a side is 2 long
        field = torch.nn.functional.interpolate(
            2 * self.field * normal(n, 2, self.grid, self.grid), size=(side, side), mode="bicubic", align_corners=True
        )
        places = torch.nn.functional.affine_grid(affine, [n, 1, side, side], align_corners=False)
        places = places + field.permute(0, 2, 3, 1)
        fade = 1 - self.fade * torch.rand(n, 1, 1, generator=generator)
        noise = self.noise * normal(n, side, side)
        found = torch.nn.functional.grid_sample(
            images[:, None], places.to(images), padding_mode="zeros", align_corners=False
        )
        return (found[:, 0] * fade.to(images) + noise.to(images)).clamp(0, 1)
