"""PTX that sums over the lanes of a warp, for the gradients of B and C.

A warp holds 32 channels, one a lane, and wants 32 sums over them (of the 16 states' products for B,
and of those for C). Reducing each on its own takes five exchanges; these reduce all together, so
that every exchange halves what is left, and lane i ends up with sum i.

An assembly block's operands are 16 outputs, of which only the first is used (Triton wants as many
as inputs of one kind), and then 2 x 16 inputs.
"""


def _fold(pairs: list[tuple[str, str]], width: int) -> list[str]:
    """PTX: lanes without bit `width` add up the first of each pair, the others the second."""
    lines = [f"and.b32 bit, lane, {width};", "setp.ne.u32 p, bit, 0;"]
    for low, high in pairs:
        lines += [
            f"selp.f32 keep, {high}, {low}, p;",
            f"selp.f32 send, {low}, {high}, p;",
            f"shfl.sync.bfly.b32 send, send, {width}, 31, -1;",
            f"add.f32 {low}, keep, send;",
        ]
    return lines


def _assembly(lines: list[str], result: str) -> str:
    """A block with 16 outputs, the registers of a result of which only the first matters."""
    unused = [f"mov.f32 ${i}, 0f00000000;" for i in range(1, 16)]
    return "{\n" + "\n".join([*lines, f"mov.f32 $0, {result};", *unused]) + "\n}"


def exchange_assembly() -> str:
    """PTX that adds 32 values over the 32 lanes of a warp: lane i gets the sum of value i."""
    lines = [".reg .pred p;", ".reg .u32 lane, bit;", ".reg .f32 keep, send, v<32>;"]
    lines += ["mov.u32 lane, %laneid;", *(f"mov.f32 v{i}, ${16 + i};" for i in range(32))]
    for width in (16, 8, 4, 2, 1):
        lines += _fold([(f"v{i}", f"v{i + width}") for i in range(width)], width)
    return _assembly(lines, "v0")


def matrix_assembly() -> str:
    """The same on the matrix units, which keep 11 bits of each value and add in float32.

    A value is an 8 × 4 quarter of the left operand, lane 4 r + k at (r, k). The right operand, of
    zeros and ones, adds up the four k and puts quarters above each other apart: after the q-th
    product, columns 2 q and 2 q + 1 hold values q, q + 4, q + 8 and q + 12, yet to be added
    over r, which is over the lanes' three higher bits.
    """
    lines = [".reg .pred p;", ".reg .b32 lane, row, bit, even, odd, w<4>;"]
    lines += [
        ".reg .f32 keep, send, b<4>, c<4>;",
        "mov.u32 lane, %laneid;",
        "shr.u32 row, lane, 2;",
    ]
    lines += [f"mov.f32 {sums}{i}, 0f00000000;" for sums in "bc" for i in range(4)]
    for q in range(4):
        for column, name in ((2 * q, "even"), (2 * q + 1, "odd")):
            lines += [f"setp.eq.u32 p, row, {column};", f"selp.b32 {name}, 0x3f800000, 0, p;"]
        for sums, first in (("b", 16), ("c", 32)):
            lines += [f"mov.b32 w{i}, ${first + q + 4 * i};" for i in range(4)]
            total = ", ".join(f"{sums}{i}" for i in range(4))
            lines.append(
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                f"{{{total}}}, {{w0, w1, w2, w3}}, {{even, odd}}, {{{total}}};"
            )
    lines += _fold([(f"b{i}", f"c{i}") for i in range(4)], 16)
    lines += _fold([("b0", "b1"), ("b2", "b3")], 8) + _fold([("b0", "b2")], 4)
    return _assembly(lines, "b0")
