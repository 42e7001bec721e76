"""The worked example of docs/format.md, made by vqdm: `worked_example()` is the block of text that the page shows."""

import json

import torch
from quantized import checkpoint_bytes
from torch import Tensor, nn

from vqdm.models.specs import spec_of
from vqdm.weights.bitpack import pack
from vqdm.weights.layers import swap
from vqdm.weights.scalar import ScalarScheme, ScalarWeight
from vqdm.weights.trellis import TrellisScheme, TrellisTable, TrellisWeight
from vqdm.weights.trellis_codes import unpack_states

CODES = [5, 2, 7, 0, 1]
TRELLIS_CODES = "e1 00 e2 c4 1b 9d 72 05 3f"


def example_model() -> nn.Module:
    """`a`: 2 × 4 scalar codes of 3 bits in groups of 2; `b`: 16 × 2 trellis codes of 1 and 2.5 bits."""
    model = nn.ModuleDict({"a": nn.Linear(4, 2, device="meta"), "b": nn.Linear(2, 16, bias=False, device="meta")})
    model["a"].bias = nn.Parameter(torch.tensor([0.5, -1.0]))
    scalar = ScalarWeight.from_parts(
        ScalarScheme(bits=3, group_size=2),
        torch.tensor([[5, 2, 7, 0], [1, 6, 3, 4]]),
        scales=torch.tensor([[0.25, 0.5], [1.0, 2.0]]),
        zeros=torch.tensor([[3.0, 4.0], [0.0, 7.0]]),
    )
    table = TrellisTable.from_values(torch.arange(4096) / 1024 - 2)
    trellis = TrellisWeight(TrellisScheme(bits=11.25), (16, 2), table)
    trellis.codes.copy_(torch.tensor(list(bytes.fromhex(TRELLIS_CODES)), dtype=torch.uint8))
    trellis.scales.data.copy_(torch.tensor([1.0, 2.0] * 8 + [0.5, 0.25]))
    for name, weight in (("a", scalar), ("b", trellis)):
        swap(model, spec_of(name, model[name]), weight)
    return model


def _hex(data: Tensor | bytes) -> str:
    content = data if isinstance(data, bytes) else data.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return content.hex(" ")


def _numbers(values: Tensor) -> str:
    return " ".join(f"{float(value):g}" for value in values)


@torch.no_grad()
def worked_example() -> str:
    """Codes, a file with two layers, and what they decode to."""
    model = example_model()
    content = checkpoint_bytes(model)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    trellis = model["b"].weight
    rates = trellis.unpacked_rates()
    states = unpack_states(trellis.stream, rates, 16)
    lines = [
        f"codes {CODES} of 3 bits: {_hex(pack(torch.tensor(CODES), 3))}",
        "",
        f"metadata vqdm: {header.pop('__metadata__')['vqdm']}",
        "",
    ]
    start = len(content) - max(entry["data_offsets"][1] for entry in header.values())
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        data = content[start + first : start + end]
        shown = _hex(data) if len(data) < 64 else f"{_hex(data[:8])} … {_hex(data[-4:])}"
        lines.append(f"{name} {entry['dtype']} {entry['shape']} at {first}: {shown}")
    lines += ["", *(f"a, row {i}: {_numbers(row)}" for i, row in enumerate(model["a"].decoded(torch.float32)))]
    for j, rate in enumerate(rates.tolist()):
        lines += ["", f"b, column {j}: {rate} quarter bits per value"]
        lines += [f"states {' '.join(f'{state:03x}' for state in states[j].tolist())}"]
        lines += [f"weights {_numbers(model['b'].decoded(torch.float32)[:, j])}"]
    return "\n".join(lines)
