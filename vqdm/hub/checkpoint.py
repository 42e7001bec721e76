"""The checkpoint format: what a quantized denoiser's safetensors files hold and say of themselves (docs/format.md).

A file holds tensors of the state dict: packed codes as uint8, all floats in 16 bit. The header's metadata, one JSON
text under the key `vqdm`, name scheme and shape of every quantized layer and a checksum of every tensor as stored, so
that the file alone suffices to decode a layer, and that nothing altered is taken for whole.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from vqdm.errors import UserError
from vqdm.weights.base import LARGEST, SHARED_NAME, STORED, Scheme
from vqdm.weights.layers import quantized_layers
from vqdm.weights.registry import scheme_from_dict

METADATA = "vqdm"
CODES = ".weight.codes"
FORMAT_VERSION = 1
CHECKSUM_DIGITS = 16
_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_ORDER = list(_NAMES)  # safetensors puts the last of these first in a file


@dataclass(frozen=True)
class LayerGroup:
    """Quantized layers that share scheme and shape. shape: of the original weight, [out, in] or [out, in, kh, kw]."""

    scheme: Scheme
    shape: tuple[int, ...]
    layers: tuple[str, ...]

    def to_dict(self) -> dict:
        return {"scheme": self.scheme.to_dict(), "shape": list(self.shape), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, fields: Mapping) -> "LayerGroup":
        """UserError for what is none."""
        try:
            shape, layers = tuple(fields["shape"]), tuple(fields["layers"])
            scheme = scheme_from_dict(fields["scheme"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"not a group of quantized layers: {str(fields)[:200]} ({error!r})") from error
        if len(shape) not in (2, 4) or not all(type(n) is int and n > 0 for n in shape):
            raise UserError(f"not the shape of a weight: {list(shape)} of layer {layers[:1]}")
        if not layers or not all(isinstance(name, str) for name in layers) or len(set(layers)) != len(layers):
            raise UserError(f"not a list of layer names, each once: {str(fields['layers'])[:200]}")
        return cls(scheme, shape, layers)


def described(groups: Sequence[LayerGroup]) -> list[dict]:
    """The groups as a file's header has them: without the numbers that the tensors' own shapes tell.

    So a header is as long whichever way bits are allotted to layers, and the file's size is known before.
    """
    merged: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for group in groups:
        scheme = {k: v for k, v in group.scheme.to_dict().items() if k not in group.scheme.told_by_shapes}
        merged.setdefault((json.dumps(scheme), group.shape), []).extend(group.layers)
    return [
        {"scheme": json.loads(scheme), "shape": list(shape), "layers": sorted(layers)}
        for (scheme, shape), layers in merged.items()
    ]


def layer_groups(denoiser: nn.Module) -> list[LayerGroup]:
    """The quantized layers of a denoiser, in module order."""
    groups: dict[tuple[Scheme, tuple[int, ...]], list[str]] = {}
    for name, layer in quantized_layers(denoiser).items():
        groups.setdefault((layer.weight.scheme, layer.original_shape), []).append(name)
    return [LayerGroup(scheme, shape, tuple(names)) for (scheme, shape), names in groups.items()]


def _is_coded(name: str, layers: set[str]) -> bool:
    """Whether a tensor of the state dict decodes quantized weights."""
    return name.startswith(f"{SHARED_NAME}.") or name.rpartition(".weight.")[0] in layers


def _stored_dtype(name: str, tensor: Tensor, layers: set[str]) -> torch.dtype:
    """fp16 for floats; bfloat16 stays in what is not quantized."""
    keeps = not tensor.is_floating_point() or (tensor.dtype == torch.bfloat16 and not _is_coded(name, layers))
    return tensor.dtype if keeps else STORED


def to_stored(state: Mapping[str, Tensor], groups: Sequence[LayerGroup]) -> dict[str, Tensor]:
    """The tensors as a file holds them, on the CPU. UserError for a number that fp16 cannot hold."""
    layers = {name for group in groups for name in group.layers}
    stored = {}
    for name, tensor in state.items():
        dtype = _stored_dtype(name, tensor, layers)
        if dtype != tensor.dtype and bool((tensor.detach().abs() > LARGEST).any()):
            raise UserError(f"{name} has numbers beyond fp16's {LARGEST:.0f}: load the model in bfloat16 and save that")
        stored[name] = tensor.detach().to(dtype).cpu().contiguous()
    return stored


@torch.no_grad()
def round_to_stored_(denoiser: nn.Module) -> None:
    """Give every float the value that a file will hold of it, in place: the model that is used is the one saved."""
    state = denoiser.state_dict()
    for name, tensor in to_stored(state, layer_groups(denoiser)).items():
        state[name].copy_(tensor)


def checksum(name: str, tensor: Tensor) -> str:
    """The first digits of sha256 over `name dtype shape`, a line feed, and the stored bytes."""
    about = f"{name} {_NAMES.get(tensor.dtype, str(tensor.dtype))} {json.dumps(list(tensor.shape))}\n"
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(about.encode() + content.tobytes()).hexdigest()[:CHECKSUM_DIGITS]


def _metadata(layout: "_Layout", groups: Sequence[LayerGroup], checksums: Mapping[str, str]) -> dict[str, str]:
    """What a file says of itself. Checksums are one text, those of all tensors of the checkpoint by sorted name."""
    about = {
        "version": FORMAT_VERSION,
        "groups": described(groups),
        "checksums": "".join(checksums[name] for name in sorted(checksums)),
        "padding": " " * layout.padding(),
    }
    return {METADATA: json.dumps(about, separators=(",", ":"))}


def stored_with_metadata(
    state: Mapping[str, Tensor], groups: Sequence[LayerGroup]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as stored and the metadata that go into their file."""
    stored = to_stored(state, groups)
    sums = {name: checksum(name, tensor) for name, tensor in stored.items()}
    return stored, _metadata(_Layout(stored, groups), groups, sums)


def checkpoint_bytes(denoiser: nn.Module) -> bytes:
    """A whole denoiser, or a part of one, as one file's content."""
    stored, metadata = stored_with_metadata(denoiser.state_dict(), layer_groups(denoiser))
    return to_bytes(stored, {"format": "pt"} | metadata)


class _Layout:
    """Where the tensors lie in one safetensors file, from dtypes and shapes alone.

    They come by falling alignment, then by name; the header is JSON without spaces, padded to a multiple of 8.
    """

    def __init__(self, state: Mapping[str, Tensor], groups: Sequence[LayerGroup]):
        layers = {name for group in groups for name in group.layers}
        dtypes = {name: _stored_dtype(name, tensor, layers) for name, tensor in state.items()}
        self.table: dict[str, dict] = {}
        self.bytes = 0
        for name in sorted(state, key=lambda name: (-_ORDER.index(dtypes[name]), name)):
            shape, start = list(state[name].shape), self.bytes
            self.bytes += state[name].numel() * dtypes[name].itemsize
            self.table[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, self.bytes]}

    def padding(self) -> int:
        """Digits that the table is short of one whose offsets and lengths of codes are all as long as the largest."""
        digits = len(str(self.bytes))
        numbers = [number for entry in self.table.values() for number in entry["data_offsets"]]
        numbers += [entry["shape"][0] for name, entry in self.table.items() if name.endswith(CODES)]
        return sum(digits - len(str(number)) for number in numbers)

    def header_bytes(self, metadata: Mapping[str, str]) -> int:
        """Of the header and of the eight bytes that tell its length."""
        header = {"__metadata__": {"format": "pt"} | metadata} | self.table
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + -(-length // 8) * 8


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one safetensors file."""

    header: int
    tensors: int

    @property
    def total(self) -> int:
        return self.header + self.tensors


def checkpoint_size(denoiser: nn.Module) -> CheckpointSize:
    """What `save_pretrained` will write, to the byte, from shapes alone (a denoiser on the meta device will do)."""
    state, groups = denoiser.state_dict(), layer_groups(denoiser)
    layout = _Layout(state, groups)
    metadata = _metadata(layout, groups, dict.fromkeys(state, "0" * CHECKSUM_DIGITS))
    return CheckpointSize(header=layout.header_bytes(metadata), tensors=layout.bytes)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's files say and hold: the groups of quantized layers, all tensors by sorted name, checksums.

    shapes: of the tensors, by name.
    """

    where: str
    groups: list[dict]
    names: tuple[str, ...]
    checksums: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def check_groups(self, groups: Sequence[LayerGroup]) -> None:
        """UserError unless these are the quantized layers of which the files say that they hold them."""
        if self.groups != described(groups):
            raise UserError(
                f"{self.where} and its config.json name other quantized layers: one is damaged or of another checkpoint"
            )

    def check_names(self, expected: Iterable[str]) -> None:
        """UserError, with a tensor's name, unless the files hold what is expected, neither more nor less."""
        missing, extra = sorted(set(expected) - set(self.names)), sorted(set(self.names) - set(expected))
        for kind, names in (("lacks the tensor", missing), ("has the unknown tensor", extra)):
            if names:
                raise UserError(
                    f"{self.where} {kind} {names[0]} ({len(names)} in all): it is damaged or of another model"
                )
        if len(self.names) != len(self.checksums):
            raise UserError(
                f"{self.where} has {len(self.checksums)} checksums for {len(self.names)} tensors: it is damaged"
            )

    def check_shapes(self, expected: Mapping[str, Tensor]) -> None:
        """UserError, with a tensor's name, unless the files' tensors have these shapes (of meta tensors will do)."""
        for name, tensor in expected.items():
            if self.shapes[name] != tuple(tensor.shape):
                raise UserError(
                    f"{self.where}: tensor {name} is {list(self.shapes[name])} where the model has "
                    f"{list(tensor.shape)}: it, or its config.json, is damaged or of another model"
                )

    def check_tensors(self, state: Mapping[str, Tensor]) -> None:
        """UserError, with the tensor's name, unless each is as it was stored."""
        known = dict(zip(self.names, self.checksums, strict=True))
        for name, tensor in state.items():
            if known.get(name) != checksum(name, tensor):
                raise UserError(
                    f"{self.where}: tensor {name} is not as it was saved; the file is damaged, get it again"
                )


def read_contents(files: Sequence[Path]) -> Contents:
    """From the headers of all files of a checkpoint. UserError for anything but a whole vqdm checkpoint."""
    names: list[str] = []
    texts: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                texts.add((file.metadata() or {}).get(METADATA, ""))
                names += file.keys()
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}): it is damaged or no safetensors file") from error
    if len(texts) != 1:
        raise UserError(f"{files[0]} and its other shards are of different checkpoints: save the model again")
    return _parse(str(files[0]), texts.pop(), names, shapes)


def _parse(where: str, text: str, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Contents:
    try:
        about = json.loads(text)
        version, groups, joined = about["version"], list(about["groups"]), str(about["checksums"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} does not say what it holds ({error!r}): it is no vqdm file, or damaged") from error
    check_version(where, version)
    sums = (joined[i : i + CHECKSUM_DIGITS] for i in range(0, len(joined), CHECKSUM_DIGITS))
    return Contents(where, groups, tuple(sorted(names)), tuple(sums), shapes)


def check_version(where: str, version: object) -> None:
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {str(version)[:80]}, this vqdm reads version {FORMAT_VERSION}: update vqdm"
        )
