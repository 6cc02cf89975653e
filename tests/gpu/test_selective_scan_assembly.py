"""The scan's PTX blocks add up what they claim to: run here by a small PTX machine, on any CPU."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from workbench_mamba.scan.triton_selective_assembly import exchange_assembly, matrix_assembly

LANE = torch.arange(32)


def constant(text: str) -> Tensor:
    if text == "%laneid":
        return LANE
    floats = {"0f00000000": 0.0, "0x3f800000": 1.0}
    if text in floats:
        return torch.full((32,), floats[text], dtype=torch.float64)
    return torch.full((32,), int(text))


def matrix_product(registers: dict[str, Tensor], operands: str) -> None:
    """mma.m16n8k8 with the fragments that the PTX manual gives for tf32."""
    result, left, right, start = (
        [name.strip() for name in group.split(",")] for group in re.findall(r"\{(.*?)\}", operands)
    )
    row, column = LANE // 4, LANE % 4
    a, b = torch.zeros(16, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    for i, name in enumerate(left):
        a[row + 8 * (i % 2), column + 4 * (i // 2)] = registers[name]
    for i, name in enumerate(right):
        b[column + 4 * i, row] = registers[name]
    product = a @ b
    for i, name in enumerate(result):
        here = product[row + 8 * (i // 2), 2 * column + i % 2]
        registers[name] = registers[start[i]] + here


def run(assembly: str, values: Tensor) -> Tensor:
    """The first output for 16 inputs, `[input, lane]`."""
    registers = {f"${8 + i}": value for i, value in enumerate(values)}
    for line in assembly.strip("{}\n").split("\n"):
        operation, operands = line.rstrip(";").split(" ", 1)
        if operation == ".reg":
            continue
        if operation.startswith("mma"):
            matrix_product(registers, operands)
            continue
        target, *names = (name.strip() for name in operands.split(","))
        inputs = [registers[name] if name in registers else constant(name) for name in names]
        match operation.split("."):
            case ["mov", *_]:
                registers[target] = inputs[0]
            case ["shr", *_]:
                registers[target] = inputs[0] >> inputs[1]
            case ["and", *_]:
                registers[target] = inputs[0] & inputs[1]
            case ["add", *_]:
                registers[target] = inputs[0] + inputs[1]
            case ["setp", "ne", _]:
                registers[target] = inputs[0] != inputs[1]
            case ["setp", "eq", _]:
                registers[target] = inputs[0] == inputs[1]
            case ["selp", *_]:
                registers[target] = torch.where(inputs[2], inputs[0], inputs[1])
            case ["shfl", "sync", "bfly", _]:
                registers[target] = inputs[0][LANE ^ inputs[1]]
            case _:
                pytest.fail(f"unknown instruction {line}")
    return registers["$0"]


@pytest.mark.parametrize("assembly", [exchange_assembly, matrix_assembly])
def test_lane_i_gets_its_halfs_sum_of_value_i(assembly):
    values = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([values[:, :16].sum(1), values[:, 16:].sum(1)])
    torch.testing.assert_close(run(assembly(), values), wanted)
