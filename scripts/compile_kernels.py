"""Compile the GPU's decode kernels without a GPU, and count what the machine code takes.

    python scripts/compile_kernels.py [--targets 80 89 90] [--json kernels.json]

Triton compiles every kernel for NVIDIA's sm_80 (A100), sm_89 (RTX 4090, L4) and sm_90 (H100, H200) with the ptxas that
it brings. Printed are registers per thread, bytes of local memory (registers that did not fit), of shared memory, and
instructions per weight: those of a thread, which have no loop, over the weights that it decodes. Arguments are as for a
layer of SDXL in fp16: pointers, inputs and outputs divisible by 16. Exit code 1 where a kernel takes more than 64
registers, any local memory, or for trellis codes more than 30 instructions per weight. Needs triton, on Linux.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.errors import UserError
from vqdm.runs.files import atomic_write

TARGETS = (80, 89, 90)
MOST_REGISTERS, MOST_TRELLIS_INSTRUCTIONS = 64, 30
FLAT = {"starts": "*i32", "rates": "*u8", "codes": "*u8"}  # the other pointers are to floats


@dataclass(frozen=True)
class Case:
    """A kernel with its constants. weights: that one program decodes."""

    name: str
    kernel: Callable
    constants: dict
    weights: int


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes: registers per thread, bytes, and instructions per weight (fractional)."""

    kernel: str
    target: str
    registers: int
    local_bytes: int
    shared_bytes: int
    instructions_per_weight: float

    @property
    def fault(self) -> str | None:
        """The limit that it breaks, in words."""
        if self.registers > MOST_REGISTERS or self.local_bytes:
            return f"{self.registers} registers, {self.local_bytes} bytes of local memory"
        if self.kernel.startswith("trellis") and self.instructions_per_weight > MOST_TRELLIS_INSTRUCTIONS:
            return f"{self.instructions_per_weight} instructions per weight"
        return None


def cases() -> list[Case]:
    """Every kernel as SDXL's layers call it. UserError without triton."""
    try:
        from vqdm.weights import triton_kernels as kernels
    except ModuleNotFoundError as error:
        raise UserError("triton is missing: pip install triton (Linux)") from error
    trellis = kernels.TRELLIS_TILE | {"BY_HAND": False}
    groups = {"LANES": 8, "ROWS": 4, "GROUPS": kernels.ADDITIVE_VALUES // 32, "BY_HAND": False}
    additive = groups | {"HAS_INPUT_SCALES": False, "WIDTH": 8, "BOOKS": 3, "SIZE": 8}
    scalar = kernels.SCALAR_TILE | {"SPLIT": False, "ALIGNED": True, "BY_HAND": False}
    tiles = [4 * math.prod(kernels.TRELLIS_TILE.values()), 8 * math.prod(kernels.SCALAR_TILE.values())]
    return [
        Case("trellis, wide columns", kernels.trellis_kernel, trellis | {"BYTE": False}, tiles[0]),
        Case("trellis, byte columns", kernels.trellis_kernel, trellis | {"BYTE": True}, tiles[0]),
        Case("additive, 3x8g8", kernels.additive_kernel, additive, kernels.ADDITIVE_VALUES),
        *(
            Case(f"scalar, {bits} bits", kernels.scalar_kernel, scalar | {"WIDTH": bits}, tiles[1])
            for bits in (3, 4, 8)
        ),
    ]


def compile_case(case: Case, target: int) -> Compiled:
    """Compile one kernel for sm_<target>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vqdm.weights.triton_kernels import OPTIONS

    names = case.kernel.arg_names
    arguments = [name for name in names if name not in case.constants]
    pointers = ("codes", "starts", "rates", "table", "codebooks", "scales", "input_scales", "zeros", "weight")
    kinds = {name: FLAT.get(name, "*fp16") if name in pointers else "i32" for name in arguments}
    constants = dict(case.constants)
    if "out_size" in kinds:  # 1, which Triton makes a constant
        kinds["out_size"], constants["out_size"] = "constexpr", 1
    signature = {name: kinds.get(name, "constexpr") for name in names}
    even = [name for name in arguments if name in (*pointers, "inputs", "outputs", "group_size")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(OPTIONS)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    if ".ftz" in made.asm["ptx"]:
        raise RuntimeError(f"{case.name}: small numbers would be flushed to zero, which the CPU does not do")
    registers, local, instructions = _read_binary(made.asm["cubin"], Path(triton.__file__).parent)
    per_weight = instructions * 32 * options["num_warps"] / case.weights
    return Compiled(case.name, f"sm_{target}", registers, local, made.metadata.shared, round(per_weight, 1))


def _read_binary(binary: bytes, triton: Path) -> tuple[int, int, int]:
    """Registers per thread, bytes of local memory (stack included), and instructions up to the last EXIT."""
    dump = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        read = [subprocess.run([dump, option, file.name], capture_output=True, text=True, check=True).stdout
                for option in ("--dump-resource-usage", "-sass")]  # fmt: skip
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", read[0])}
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", read[1], re.MULTILINE)
    end = max(i for i, (_, line) in enumerate(lines) if "EXIT" in line)
    for address, line in lines[: end + 1]:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) <= int(address, 16):
            raise RuntimeError("the code has a loop: its instructions cannot be counted by reading it")
    count = sum(not line.startswith("NOP") for _, line in lines[: end + 1])
    return usage["REG"], usage["STACK"] + usage["LOCAL"], count


def to_markdown(found: list[Compiled]) -> str:
    """A row per kernel, targets in one cell each with strokes between."""
    by_kernel: dict[str, list[Compiled]] = {}
    for one in found:
        by_kernel.setdefault(one.kernel, []).append(one)
    targets = " / ".join(one.target for one in next(iter(by_kernel.values())))
    heads = f"kernel ({targets})", "registers", "local memory", "shared memory", "instructions per weight"
    lines = ["| " + " | ".join(heads) + " |", "|---" * 5 + "|"]
    for kernel, row in by_kernel.items():
        fields = ("registers", "local_bytes", "shared_bytes", "instructions_per_weight")
        cells = [" / ".join(str(getattr(one, field)) for one in row) for field in fields]
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="compute capabilities")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args(arguments)
    try:
        found = [compile_case(case, target) for case in cases() for target in options.targets]
    except UserError as error:
        sys.exit(f"error: {error}")
    print(to_markdown(found))
    if options.json:
        atomic_write(options.json, json.dumps([asdict(one) for one in found], indent=1).encode())
    faults = [f"{one.kernel}, {one.target}: {one.fault}" for one in found if one.fault]
    if faults:
        sys.exit("error: " + "; ".join(faults))


if __name__ == "__main__":
    run_script(main)
