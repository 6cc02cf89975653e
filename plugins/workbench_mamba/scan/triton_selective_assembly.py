"""PTX that sums over channels within a warp, for the gradients of B and C.

A warp holds 16 channels: lane 16 h + c has those of channel c's states whose number is h modulo 2.
Of 8 of its states it wants 16 sums over the channels: of the products for B, and of those for C.
Reducing each on its own takes four exchanges; these reduce all together, so that every exchange
halves what is left, and lane 16 h + i ends up with sum i.

An assembly block's operands are 8 outputs, of which only the first is used (Triton wants as many
as inputs of one kind), and then 2 x 8 inputs.
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
    """A block with 8 outputs, the registers of a result of which only the first matters."""
    unused = [f"mov.f32 ${i}, 0f00000000;" for i in range(1, 8)]
    return "{\n" + "\n".join([*lines, f"mov.f32 $0, {result};", *unused]) + "\n}"


def exchange_assembly() -> str:
    """PTX that adds 16 values over 16 lanes: lane 16 h + i gets its half's sum of value i."""
    lines = [".reg .pred p;", ".reg .u32 lane, bit;", ".reg .f32 keep, send, v<16>;"]
    lines += ["mov.u32 lane, %laneid;", *(f"mov.f32 v{i}, ${8 + i};" for i in range(16))]
    for width in (8, 4, 2, 1):
        lines += _fold([(f"v{i}", f"v{i + width}") for i in range(width)], width)
    return _assembly(lines, "v0")


def matrix_assembly() -> str:
    """The same on the matrix units, which keep 11 bits of each value and add in float32.

    A value is an 8 × 4 quarter of the left operand, lane 4 r + k at (r, k). The right operand, of
    zeros and ones, adds up the four k and puts quarters beside each other apart: after the q-th
    product, columns 2 q and 2 q + 1 hold values q, q + 4 (in the lower rows), q + 8 and q + 12,
    yet to be added over the two lower bits of r, which are lane bits 2 and 3.
    """
    lines = [".reg .pred p;", ".reg .b32 lane, row, bit, even, odd, w<4>;"]
    lines += [".reg .f32 keep, send, b<4>;", "mov.u32 lane, %laneid;", "shr.u32 row, lane, 2;"]
    lines += [f"mov.f32 b{i}, 0f00000000;" for i in range(4)]
    total = ", ".join(f"b{i}" for i in range(4))
    for q in range(4):
        for column, name in ((2 * q, "even"), (2 * q + 1, "odd")):
            lines += [f"setp.eq.u32 p, row, {column};", f"selp.b32 {name}, 0x3f800000, 0, p;"]
        lines += [f"mov.b32 w{i}, ${8 + q + 4 * i};" for i in range(4)]
        lines.append(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            f"{{{total}}}, {{w0, w1, w2, w3}}, {{even, odd}}, {{{total}}};"
        )
    lines += _fold([("b0", "b2"), ("b1", "b3")], 4) + _fold([("b0", "b1")], 8)
    return _assembly(lines, "b0")
