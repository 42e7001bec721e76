"""The checkpoint format: tensors and metadata of a quantized denoiser's safetensors files (docs/format.md).

A file holds tensors of the state dict: packed codes as uint8, all floats in 16 bit. The header's metadata, one JSON
text under the key `vqdm`, give scheme and shape of every quantized layer and a checksum of every tensor as stored. So
the file alone suffices to decode a layer, and an altered file is never taken for a whole one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqdm.acceleration.activations import INPUTS
from vqdm.acceleration.operators import listed, removed_operators
from vqdm.acceleration.stored_cache import CACHE_NAME
from vqdm.errors import UserError
from vqdm.models.finite import LARGEST_STORED, fault_of, is_storable
from vqdm.weights.base import SHARED_NAME, STORED, Scheme
from vqdm.weights.layers import quantized_layers
from vqdm.weights.registry import scheme_from_dict

METADATA = "vqdm"
CODES = (".weight.codes", ".weight.base.codes")
FORMAT_VERSIONS = (1, 2, 3, 4)  # that are read; a file is of the lowest that will do
BESIDE = 3  # the first version that has more than weights: operators that are gone, tensors beside the layers
CHECKSUM_DIGITS = 16
_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_ORDER = list(_NAMES)  # safetensors puts the last of these first in a file


@dataclass(frozen=True)
class LayerGroup:
    """Quantized layers with the same scheme and shape. shape: the original weight's, [out, in] or [out, in, kh, kw]."""

    scheme: Scheme
    shape: tuple[int, ...]
    layers: tuple[str, ...]

    def to_dict(self) -> dict:
        return {"scheme": self.scheme.to_dict(), "shape": list(self.shape), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, fields: Mapping) -> "LayerGroup":
        """Read a group from JSON values; UserError if they are not one."""
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
    """Groups as a file's header holds them: without the numbers that follow from the tensors' shapes.

    The header's length then does not depend on how bits are allotted, and the file's size is known beforehand.
    """
    merged: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for group in groups:
        merged.setdefault((json.dumps(group.scheme.to_header()), group.shape), []).extend(group.layers)
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
    """True if a tensor of the state dict belongs to quantized weights."""
    return name.startswith(f"{SHARED_NAME}.") or name.rpartition(".weight.")[0] in layers


def _stored_dtype(name: str, tensor: Tensor, layers: set[str]) -> torch.dtype:
    """The dtype in which a tensor is stored: fp16 for floats, but bfloat16 stays in layers that are not quantized."""
    keeps = not tensor.is_floating_point() or (tensor.dtype == torch.bfloat16 and not _is_coded(name, layers))
    return tensor.dtype if keeps else STORED


def to_stored(state: Mapping[str, Tensor], groups: Sequence[LayerGroup]) -> dict[str, Tensor]:
    """Tensors as a file holds them, on the CPU. UserError for a number that fp16 cannot hold."""
    layers = {name for group in groups for name in group.layers}
    stored = {}
    for name, tensor in state.items():
        dtype = _stored_dtype(name, tensor, layers)
        if (fault := fault_of(tensor)) is not None:
            raise UserError(f"{name} has {fault} numbers: what cannot be used is not saved; load the original again")
        if dtype != tensor.dtype and not is_storable(tensor):
            raise UserError(
                f"{name} has numbers beyond fp16's {LARGEST_STORED:.0f}: load the model in bfloat16 and save that"
            )
        stored[name] = tensor.detach().to(dtype).cpu().contiguous()
    return stored


@torch.no_grad()
def round_to_stored_(denoiser: nn.Module) -> None:
    """Round every float in place to the value a file will hold, so that the model in use is the one saved."""
    state = denoiser.state_dict()
    for name, tensor in to_stored(state, layer_groups(denoiser)).items():
        state[name].copy_(tensor)


def checksum(name: str, tensor: Tensor) -> str:
    """The checksum of a tensor: first digits of sha256 over `name dtype shape`, a line feed, and the stored bytes."""
    about = f"{name} {_NAMES.get(tensor.dtype, str(tensor.dtype))} {json.dumps(list(tensor.shape))}\n"
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(about.encode() + content.tobytes()).hexdigest()[:CHECKSUM_DIGITS]


def _metadata(
    layout: "_Layout", groups: Sequence[LayerGroup], checksums: Mapping[str, str], removed: Sequence[str]
) -> dict[str, str]:
    """A file's metadata. Checksums are one text: those of all the checkpoint's tensors, sorted by name."""
    about = {
        "version": needed_version(groups, layout.table, removed),
        "groups": described(groups),
        **({"removed": list(removed)} if removed else {}),
        "checksums": "".join(checksums[name] for name in sorted(checksums)),
        "padding": " " * layout.padding(),
    }
    return {METADATA: json.dumps(about, separators=(",", ":"))}


def stored_with_metadata(
    state: Mapping[str, Tensor], groups: Sequence[LayerGroup], removed: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as stored, and the metadata for their file. removed: names of operators that are gone."""
    stored = to_stored(state, groups)
    sums = {name: checksum(name, tensor) for name, tensor in stored.items()}
    return stored, _metadata(_Layout(stored, groups), groups, sums, removed)


class _Layout:
    """Layout of tensors in one safetensors file, computed from dtypes and shapes alone.

    Tensors are sorted by falling alignment, then by name; the header is JSON without spaces, padded to a multiple of 8.
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
        """Number of digits missing to a table whose offsets and code lengths all have as many digits as the largest."""
        digits = len(str(self.bytes))
        numbers = [number for entry in self.table.values() for number in entry["data_offsets"]]
        numbers += [entry["shape"][0] for name, entry in self.table.items() if name.endswith(CODES)]
        return sum(digits - len(str(number)) for number in numbers)

    def header_bytes(self, metadata: Mapping[str, str]) -> int:
        """Bytes of the header, including the eight that tell its length."""
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
    """Exact size of what `save_pretrained` will write, from shapes alone (a denoiser on the meta device will do)."""
    state, groups = denoiser.state_dict(), layer_groups(denoiser)
    layout = _Layout(state, groups)
    sums = dict.fromkeys(state, "0" * CHECKSUM_DIGITS)
    metadata = _metadata(layout, groups, sums, removed_operators(denoiser))
    return CheckpointSize(header=layout.header_bytes(metadata), tensors=layout.bytes)


@dataclass(frozen=True)
class Contents:
    """Contents of a checkpoint's files: groups of quantized layers, all tensors by sorted name, checksums, shapes."""

    where: str
    groups: list[dict]
    names: tuple[str, ...]
    checksums: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # as safetensors calls them
    removed: tuple[str, ...] = ()

    def check_groups(self, groups: Sequence[LayerGroup], removed: Sequence[str] = ()) -> None:
        """Raise UserError unless the files say that they hold exactly these layers and lack these operators."""
        if self.removed != tuple(removed):
            raise UserError(
                f"{self.where} and its config.json name other removed operators: one is damaged or of another model"
            )
        if self.groups != described(groups):
            raise UserError(
                f"{self.where} and its config.json name other quantized layers: one is damaged or of another checkpoint"
            )

    def check_names(self, expected: Iterable[str]) -> None:
        """Raise UserError, with a tensor's name, unless the files hold exactly what is expected."""
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
        """Raise UserError, with a tensor's name, unless the files' tensors have these shapes (meta tensors will do)."""
        for name, tensor in expected.items():
            if self.shapes[name] != tuple(tensor.shape):
                raise UserError(
                    f"{self.where}: tensor {name} is {list(self.shapes[name])} where the model has "
                    f"{list(tensor.shape)}: it, or its config.json, is damaged or of another model"
                )
            fitting = ("F16", "BF16", "F32") if tensor.is_floating_point() else (_NAMES.get(tensor.dtype),)
            if self.dtypes[name] not in fitting:
                raise UserError(
                    f"{self.where}: tensor {name} is of {self.dtypes[name]} instead of {fitting[0]}: it is damaged"
                )

    def check_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Raise UserError, with the tensor's name, unless each tensor is as it was stored."""
        known = dict(zip(self.names, self.checksums, strict=True))
        for name, tensor in state.items():
            if known.get(name) != checksum(name, tensor):
                raise UserError(
                    f"{self.where}: tensor {name} is not as it was saved; the file is damaged, get it again"
                )
            if (fault := fault_of(tensor)) is not None:  # whoever forges a tensor can forge its checksum
                raise UserError(f"{self.where}: tensor {name} has {fault} numbers; get the model again")


def read_contents(files: Sequence[Path]) -> Contents:
    """Read the headers of all files of a checkpoint. UserError for anything but a whole vqdm checkpoint."""
    names: list[str] = []
    texts: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                texts.add((file.metadata() or {}).get(METADATA, ""))
                names += file.keys()
                views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes |= {name: tuple(view.get_shape()) for name, view in views.items()}
                dtypes |= {name: view.get_dtype() for name, view in views.items()}
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}): it is damaged or no safetensors file") from error
    if len(texts) != 1:
        raise UserError(f"{files[0]} and its other shards are of different checkpoints: save the model again")
    where, names = str(files[0]), tuple(sorted(names))
    groups, sums, removed = _parse(where, texts.pop())
    return Contents(where, groups, names, sums, shapes, dtypes, removed)


def is_plain(files: Sequence[Path]) -> bool:
    """True for the files of an ordinary model: none says that it is vqdm's, and none holds codes."""
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                if METADATA in (file.metadata() or {}) or any(name.endswith(CODES) for name in file.keys()):  # noqa: SIM118
                    return False
        except (SafetensorError, OSError, UnicodeDecodeError):
            return False  # read_contents says what is wrong
    return True


def _parse(where: str, text: str) -> tuple[list[dict], tuple[str, ...], tuple[str, ...]]:
    """The groups, the checksums and the removed operators that a file's metadata tell."""
    try:
        about = json.loads(text)
        version, groups, joined = about["version"], list(about["groups"]), str(about["checksums"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} does not say what it holds ({error!r}): it is no vqdm file, or damaged") from error
    check_version(where, version)
    sums = (joined[i : i + CHECKSUM_DIGITS] for i in range(0, len(joined), CHECKSUM_DIGITS))
    return groups, tuple(sums), tuple(listed(about.get("removed", [])))


def needed_version(groups: Sequence[LayerGroup], names: Iterable[str] = (), others: object = None) -> int:
    """The lowest version of the format that has all of these. others: anything else that is not nothing."""
    other = others or any(name.startswith(f"{CACHE_NAME}.") or f".{INPUTS}." in name for name in names)
    beside = BESIDE if other else FORMAT_VERSIONS[0]
    return max([beside, *(group.scheme.format_version for group in groups)])


def check_version(where: str, version: object) -> None:
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise UserError(
            f"{where} has format version {str(version)[:80]}, this vqdm reads {FORMAT_VERSIONS}: update vqdm"
        )
