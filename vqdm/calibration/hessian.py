"""Second moments of layers' inputs: H, the mean of x xᵀ over tokens, fp32 [in, in].

A token of a Linear is a row of its input; of a Conv2d, the patch under one output position, zero padding included, in
the column order of `specs.weight_to_matrix`: [kh·kw·in_channels], channels last.
"""

import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.errors import UserError
from vqdm.models.specs import ConvGeometry, LayerSpec
from vqdm.runs.device import exact_tf32
from vqdm.seeds import torch_generator

CHUNK = 1 << 24  # fp32 numbers held at once as patches or rows
LARGE = 4  # displacements are cheaper than patches from this size on: outputs along each side, in reaches of the kernel


class HessianRecorder:
    """Context that sums the second moments of the inputs of the layers in `specs` while somebody calls the denoiser.

    Layers that read the very same tensors in every call (convolutions: with the same geometry) share one matrix.
    tokens_per_call: this many tokens, drawn at random, stand for all those of a call; None: every token counts.
    wanted: names of the layers whose Hessians are summed; None: all. The draws are those of all `specs`.
    While `enabled` is False, calls are not read.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        specs: Iterable[LayerSpec],
        *,
        tokens_per_call: int | None = None,
        seed: int = 0,
        wanted: Iterable[str] | None = None,
    ):
        if tokens_per_call is not None and tokens_per_call < 1:
            raise UserError(f"tokens_per_call must be at least 1, not {tokens_per_call}")
        self.denoiser, self.specs = denoiser, list(specs)
        for spec in self.specs:
            if spec.conv is not None and (spec.conv.groups != 1 or spec.conv.padding_mode != "zeros"):
                raise ValueError(f"layer {spec.name}: only convolutions of one group, padded by zeros, have a Hessian")
        self.wanted = {spec.name for spec in self.specs} if wanted is None else set(wanted)
        self.tokens_per_call, self.seed = tokens_per_call, seed
        self.enabled = True
        self.tokens: dict[str, int] = {}  # number of tokens in each layer's Hessian, once the recording has ended
        self._problems: list[_Problem] = []
        self._problem_of: dict[str, _Problem] = {}
        self._hooks: list = []
        self._hessians: dict[str, Tensor] | None = None

    def __enter__(self):
        for spec in self.specs:
            layer = self.denoiser.get_submodule(spec.name)
            self._hooks.append(layer.register_forward_pre_hook(partial(self._read, spec), with_kwargs=True))
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def hessians(self) -> dict[str, Tensor]:
        """The wanted Hessians by layer name, in the order of `specs`, on the inputs' device; ends the recording.

        UserError, with the layer's name, if an activation was infinite or NaN, or if the layer was never called.
        """
        self.__exit__()
        if self._hessians is None:
            for problem in list(self._problems):
                self._split(problem, problem.absent())
            wanted = [spec for spec in self.specs if spec.name in self.wanted]
            summed = [problem for problem in self._problems if problem.layers & self.wanted]
            tokens = {problem: problem.token_count() for problem in summed}
            matrices = {problem: problem.mean() for problem in summed}
            for spec in wanted:
                if spec.name not in self._problem_of:
                    raise UserError(f"layer {spec.name} was never called: leave it out of the layer pattern")
                if not bool(torch.isfinite(matrices[self._problem_of[spec.name]].diagonal()).all()):
                    raise UserError(
                        f"the activations that layer {spec.name} reads have infinite or NaN entries: "
                        "load the model in another dtype, such as float32 or bfloat16"
                    )
            self._hessians = {spec.name: matrices[self._problem_of[spec.name]] for spec in wanted}
            self.tokens = {spec.name: tokens[self._problem_of[spec.name]] for spec in wanted}
            self._problems.clear()
            self._problem_of.clear()
        return self._hessians

    @torch.inference_mode(False)  # sums made in inference mode could not be changed outside it
    @torch.no_grad()
    def _read(self, spec: LayerSpec, _layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.enabled:
            return
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        problem = self._problem_of.get(spec.name)
        if problem is None:  # it may share with other layers that have no past yet
            joined = (p for p in self._problems if p.calls == 1 and p.conv == spec.conv and p.reads(inputs))
            problem = next(joined, None) or _Problem(spec.conv, {spec.name})
            self._place(problem, spec.name)
        if spec.name not in problem.readers:
            if problem.reads(inputs):
                problem.readers.add(spec.name)
                self._sum(problem, spec, inputs)
                return
            if problem.readers:  # the other layers read another tensor in this call
                problem = self._split(problem, {spec.name})
        else:  # read a second time: this is the next call, and layers that did not read in the last one no longer share
            self._split(problem, problem.absent())
        problem.start_call(inputs, spec.name)
        self._sum(problem, spec, inputs)

    def _sum(self, problem: "_Problem", spec: LayerSpec, inputs: Tensor) -> None:
        """Add the present call's tokens, once, when the first wanted layer reads them."""
        if problem.is_summed or spec.name not in self.wanted:
            return
        generator = torch_generator(self.seed, "hessian", f"{problem.leader}/{problem.calls}")
        problem.add(inputs, spec.shape[1], self.tokens_per_call, generator)

    def _place(self, problem: "_Problem", layer: str) -> None:
        if problem not in self._problems:
            self._problems.append(problem)
        problem.layers.add(layer)
        self._problem_of[layer] = problem

    def _split(self, problem: "_Problem", layers: set[str]) -> "_Problem | None":
        """A problem for `layers` alone, with the same past but without the present call."""
        if not layers:
            return None
        own = problem.without_present(layers)
        problem.layers -= layers
        for layer in sorted(layers):
            self._place(own, layer)
        return own


class _Problem:
    """Layers that have read the same tensors in every call so far, and the sum over those tensors.

    While several layers share it, the present call's sum is kept apart from that of earlier calls, so that a layer
    that turns out to read another tensor can take the past with it. Sums are pairs (Σ x xᵀ, number of tokens).
    """

    def __init__(self, conv: ConvGeometry | None, layers: set[str]):
        self.conv, self.layers, self.leader = conv, set(layers), min(layers)
        self.readers: set[str] = set()  # the layers that have read the tensor of the present call
        self.calls = 0
        self.is_summed = False  # the present call
        self._past: tuple[Tensor, int] | None = None
        self._present: tuple[Tensor, int] | None = None
        self._tensor, self._version = (lambda: None), -1

    def reads(self, tensor: Tensor) -> bool:
        """True if `tensor` is that of the present call, unchanged (inference tensors cannot tell)."""
        return self._tensor() is tensor and not tensor.is_inference() and self._version == tensor._version

    def absent(self) -> set[str]:
        """The layers that have not read the tensor of the present call, if there is one."""
        return self.layers - self.readers if self.readers else set()

    def start_call(self, tensor: Tensor, layer: str) -> None:
        if len(self.layers) > 1:
            self._past, self._present = _plus(self._past, self._present), None
        self._tensor = weakref.ref(tensor)  # a reference would keep the activations of all layers in memory
        self._version = 0 if tensor.is_inference() else tensor._version
        self.readers = {layer}
        self.calls += 1
        self.is_summed = False

    def add(self, inputs: Tensor, size: int, limit: int | None, generator: torch.Generator) -> None:
        """Add the tokens of one call; if there are more than `limit`, draw that many and let them stand for all."""
        if self._present is None:
            self._present = (torch.zeros(size, size, device=inputs.device), 0)
        total, tokens = self._present
        count = token_count(inputs, self.conv)
        chosen = drawn_tokens(count, limit, generator, inputs.device)
        add_second_moment(total, inputs, self.conv, chosen=chosen)
        self._present = (total, tokens + count)
        self.is_summed = True

    def without_present(self, layers: set[str]) -> "_Problem":
        other = _Problem(self.conv, layers)
        other.calls = self.calls - 1
        other._past = None if self._past is None else (self._past[0].clone(), self._past[1])
        return other

    def token_count(self) -> int:
        return sum(tokens for _, tokens in filter(None, (self._past, self._present)))

    def mean(self) -> Tensor:
        total, tokens = _plus(self._past, self._present)
        return total.div_(tokens)


def _plus(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> tuple[Tensor, int] | None:
    """Add one sum to another, in the memory of the first; None is the empty sum."""
    if one is None or other is None:
        return other if one is None else one
    return one[0].add_(other[0]), one[1] + other[1]


def shrunk(hessian: Tensor, tokens: int) -> Tensor:
    """A Hessian [in, in] from few tokens, shrunk towards its mean diagonal as if by `in` more tokens without direction.

    Otherwise errors go into directions that these tokens do not see but others would (tests/test_transformers.py).
    """
    size = len(hessian)
    share = size / (size + tokens)
    found = hessian * (1 - share)
    found.diagonal().add_(share * hessian.diagonal().mean())
    return found


def token_count(inputs: Tensor, conv: ConvGeometry | None) -> int:
    if conv is None:
        return inputs.numel() // inputs.shape[-1]
    return math.prod(inputs.shape[:-3]) * math.prod(output_size(inputs.shape[-2:], conv))


def add_second_moment(
    total: Tensor, inputs: Tensor, conv: ConvGeometry | None, *, chosen: Tensor | None = None
) -> None:
    """Add Σ x xᵀ over the tokens of `inputs` to fp32 `total` [in, in], in place.

    inputs: [..., in], or [batch, channels, height, width]; chosen: indices of some tokens, whose sum is scaled up to
    stand for all.
    """
    weight = 1.0 if chosen is None else token_count(inputs, conv) / len(chosen)
    if chosen is None and conv is not None and by_displacement(inputs, conv):
        with exact_tf32(inputs.dtype):
            _add_by_displacement(total, inputs.reshape(-1, *inputs.shape[-3:]), conv)
        return
    for part in tokens_of(inputs, conv, chosen):
        with exact_tf32(inputs.dtype):
            total.addmm_(part.T, part, alpha=weight)


def tokens_of(inputs: Tensor, conv: ConvGeometry | None, chosen: Tensor | None = None) -> Iterator[Tensor]:
    """Chunks fp32 [m, in] of all or the `chosen` tokens."""
    for part in _rows(inputs, chosen) if conv is None else _patches(inputs, conv, chosen):
        yield part.float()


def drawn_tokens(count: int, limit: int | None, generator: torch.Generator, device: torch.device) -> Tensor | None:
    """Indices, in order, of `limit` tokens that stand for `count`; None where all do."""
    if limit is None or count <= limit:
        return None
    return torch.randperm(count, generator=generator, device="cpu")[:limit].sort().values.to(device)


def _rows(inputs: Tensor, chosen: Tensor | None) -> tuple[Tensor, ...]:
    """Chunks [m, in] of all or the `chosen` rows of [..., in]."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return (rows if chosen is None else rows[chosen]).split(max(1, CHUNK // rows.shape[1]))


def _padding(conv: ConvGeometry) -> list[tuple[int, int]]:
    """Padding (before, after) for the rows and for the columns."""
    if conv.padding == "same":  # torch puts the odd pixel at the end
        reach = _reach(conv)
        return [(r // 2, r - r // 2) for r in reach]
    return [(p, p) for p in ((0, 0) if conv.padding == "valid" else conv.padding)]


def _reach(conv: ConvGeometry) -> list[int]:
    """Distance from the kernel's first tap to its last, down and across."""
    return [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel, strict=True)]


def output_size(size: Iterable[int], conv: ConvGeometry) -> list[int]:
    along = zip(size, _padding(conv), _reach(conv), conv.stride, strict=True)
    return [(n + sum(padding) - reach - 1) // stride + 1 for n, padding, reach, stride in along]


def _padded(inputs: Tensor, conv: ConvGeometry) -> Tensor:
    """Inputs as [batch, height, width, channels] with zeros around them."""
    rows, columns = _padding(conv)
    return F.pad(inputs, (*columns, *rows)).permute(0, 2, 3, 1).contiguous()


def _patches(inputs: Tensor, conv: ConvGeometry, chosen: Tensor | None) -> Iterator[Tensor]:
    """Chunks [m, kh·kw·channels] of the patches under all or the `chosen` output positions."""
    height, width = output_size(inputs.shape[-2:], conv)
    padded = _padded(inputs.reshape(-1, *inputs.shape[-3:]), conv)
    pixels = padded.flatten(0, 2)
    down, across = (torch.arange(k, device=inputs.device) * d for k, d in zip(conv.kernel, conv.dilation, strict=True))
    taps = (down[:, None] * padded.shape[2] + across).flatten()
    if chosen is None:
        chosen = torch.arange(len(padded) * height * width, device=inputs.device)
    for part in chosen.split(max(1, CHUNK // (len(taps) * padded.shape[3]))):
        image, y, x = part // (height * width), part // width % height, part % width
        corner = (image * padded.shape[1] + y * conv.stride[0]) * padded.shape[2] + x * conv.stride[1]
        yield pixels[corner[:, None] + taps].flatten(1)


def by_displacement(inputs: Tensor, conv: ConvGeometry) -> bool:
    """True if `_add_by_displacement` applies to a convolution and is worth it."""
    sizes = zip(output_size(inputs.shape[-2:], conv), _reach(conv), strict=True)
    return conv.stride == (1, 1) and conv.kernel != (1, 1) and all(n >= LARGE * reach for n, reach in sizes)


def _add_by_displacement(total: Tensor, inputs: Tensor, conv: ConvGeometry) -> None:
    """Add the same sum as by patches, for stride 1, with 13 large products instead of 81 for a 3×3 kernel.

    The block of taps (a, b) is the sum of x_q x_{q+b−a}ᵀ over the pixels q that tap a sees. Blocks with the same
    displacement b − a differ only in strips along the borders: their common window is summed once, then the strips.
    """
    height, width = output_size(inputs.shape[-2:], conv)
    taps = [(y * conv.dilation[0], x * conv.dilation[1]) for y, x in itertools.product(*map(range, conv.kernel))]
    pairs = defaultdict(list)
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(taps), 2):
        pairs[b[0] - a[0], b[1] - a[1]].append((i, j))
    blocks = total.view(len(taps), inputs.shape[1], len(taps), inputs.shape[1])
    per_image = inputs.shape[1] * (height + _reach(conv)[0]) * (width + _reach(conv)[1])
    for part in inputs.split(max(1, CHUNK // per_image)):
        image = _padded(part, conv)
        for shift, members in pairs.items():
            seen = [taps[i] for i, _ in members]
            top, bottom = max(y for y, _ in seen), min(y for y, _ in seen) + height
            left, right = max(x for _, x in seen), min(x for _, x in seen) + width
            common = ((top, bottom, left, right),)
            product = _pixels(image, common).T @ _pixels(image, common, shift)
            for i, j in members:
                y, x = taps[i]
                strips = (
                    (y, top, x, x + width),
                    (bottom, y + height, x, x + width),
                    (top, bottom, x, left),
                    (top, bottom, right, x + width),
                )
                block = torch.addmm(product, _pixels(image, strips).T, _pixels(image, strips, shift))
                blocks[i, :, j] += block
                if i != j:
                    blocks[j, :, i] += block.T


def _pixels(image: Tensor, windows: Iterable[tuple[int, int, int, int]], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """The pixels in windows (top, bottom, left, right) of [batch, height, width, channels], as fp32 [m, channels]."""
    y, x = shift
    parts = (image[:, y + top : y + bottom, x + left : x + right] for top, bottom, left, right in windows)
    return torch.cat([part.flatten(0, 2) for part in parts]).float()
