"""Second moments against loops over rows."""

import pytest
import torch

from natgrad.layers.factors import input_moment, second_moment, with_ones


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3), (2, 1, 5, 3), (1, 3), (3,)])
@pytest.mark.parametrize("bias", [False, True])
def test_input_moment_is_a_sum_over_rows(shape, bias):
    a = rows(*shape)
    found = input_moment(a, bias=bias)
    total = torch.zeros(3 + bias, 3 + bias, dtype=torch.float64)
    for row in a.reshape(-1, 3):
        row = torch.cat([row, torch.ones(1, dtype=torch.float64)]) if bias else row
        total += torch.outer(row, row)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(second_moment(with_ones(a, bias)), total)
    assert found.is_contiguous()


def test_input_moment_of_a_frozen_weight_is_the_number_of_rows():
    assert torch.equal(input_moment(rows(2, 4, 3), weight=False), torch.full((1, 1), 8.0, dtype=torch.float64))


def test_input_moment_of_strided_inputs():
    a = rows(3, 7).T
    torch.testing.assert_close(input_moment(a), second_moment(with_ones(a, True)))


def test_second_moment_adds_to_an_accumulator_in_place():
    x, total = rows(5, 3), torch.ones(3, 3, dtype=torch.float64)
    found = second_moment(x, out=total)
    assert found is total
    torch.testing.assert_close(total, 1 + x.T @ x)


def test_dtype_follows_the_rows():
    assert input_moment(rows(4, 2).float()).dtype == torch.float32
