"""Linear, Conv2d and Embedding layers whose weight is a QuantizedWeight, and functions that put them into a model."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec, matrix_to_weight
from vqdm.weights.base import SHARED_NAME, QuantizedWeight, Scheme, SharedPart, state_of
from vqdm.weights.registry import empty_shared, empty_weight
from vqdm.weights.text_memory import TEXT_LAYERS, TextMemory

DECODE_MODES = ("per_call", "cached")
NOT_CAST = "casting to 8 bits would round the scales of quantized weights: leave layerwise casting out, or dequantize()"


def check_decode(decode: str) -> None:
    if decode not in DECODE_MODES:
        raise UserError(f"decode must be one of {', '.join(DECODE_MODES)}, not {decode!r}")


class _QuantizedLayer(nn.Module):
    """A layer whose `weight` is a QuantizedWeight (with the `.dtype` and `.device` that diffusers asks for).

    decode: "per_call" decodes in every forward; "cached" keeps the decoded weight, outside the state_dict, until any
    tensor it came from changes. While gradients flow to the quantized weight, it is decoded in every forward.
    Layers for the prompt's embedding also keep their last output (`text_memory`), either way; keeps_texts=False is for
    those whose output for one input changes from step to step, as with activations quantized per step.
    """

    keeps_texts = True

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, spec: LayerSpec, *, decode: str):
        nn.Module.__init__(self)  # not that of nn.Linear or nn.Conv2d, which would make a weight of their own
        check_decode(decode)
        if weight.shape != spec.shape:
            raise ValueError(f"layer {spec.name} is {spec.shape}, the quantized weight {weight.shape}")
        self.weight = weight
        self.register_parameter("bias", bias)
        self.spec = spec
        self.decode = decode
        self._cache: tuple | None = None  # (state of the sources, decoded weight)
        self._forget_text()

    def _forget_text(self) -> None:
        self._texts = TextMemory() if TEXT_LAYERS.search(self.spec.name) else None

    @property
    def original_shape(self) -> tuple[int, ...]:
        """Shape of the weight that the layer's codes stand for."""
        return self.weight.original_shape

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in its own geometry."""
        if self.decode == "per_call" or (torch.is_grad_enabled() and any(t.requires_grad for t in self._sources())):
            return matrix_to_weight(self.weight(), self.spec).to(dtype)
        # A weight decoded in inference mode must not be used where gradients are recorded.
        state = (dtype, torch.is_inference_mode_enabled(), *(state_of(tensor) for tensor in self._sources()))
        if self._cache is None or self._cache[0] != state:
            self._cache = (state, matrix_to_weight(self.weight(), self.spec).detach().to(dtype))
        return self._cache[1]

    @torch.no_grad()
    def _filled(self, layer):
        layer.weight = nn.Parameter(matrix_to_weight(self.weight(), self.spec), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def _sources(self) -> list[Tensor]:
        """Every tensor that the decoded weight depends on, the shared part included."""
        modules = (self.weight, *self.weight.shared)
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def to(self, *args, **kwargs):
        """UserError for a dtype of 8 bits, which diffusers' layerwise casting asks of one layer after another."""
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is not None and dtype.itemsize < 2:
            raise UserError(f"layer {self.spec.name}: {NOT_CAST}")
        return super().to(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self._cache = None
        self._forget_text()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        self._cache = None
        self._forget_text()
        return super().train(mode)

    def __getstate__(self):
        return {**self.__dict__, "_cache": None, "_texts": None}  # copies decode for themselves

    def __setstate__(self, state):
        super().__setstate__(state)
        self._forget_text()

    def extra_repr(self) -> str:
        return f"{self.spec.kind}, bias={self.bias is not None}, decode={self.decode}"


class QuantizedLinear(_QuantizedLayer, nn.Linear):
    """nn.Linear with a quantized weight [out, in]. Being a subclass, it takes peft's LoRA adapters like any other."""

    def __init__(
        self, weight: QuantizedWeight, bias: nn.Parameter | None, spec: LayerSpec, *, decode: str = "per_call"
    ):
        super().__init__(weight, bias, spec, decode=decode)
        self.out_features, self.in_features = weight.shape
        self.product: nn.Module | None = None  # computes with the codes themselves (vqdm/acceleration/products.py)

    def dequantized(self) -> nn.Linear:
        """The same layer with the decoded weight."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return self._filled(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        if self._texts is None or torch.compiler.is_compiling() or not self.keeps_texts:
            return self._product(inputs)
        bias = [] if self.bias is None else [self.bias]
        return self._texts.recall(self._product, inputs, [*self._sources(), *bias], decode=self.decode)

    def _product(self, inputs: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(inputs, self._bias(inputs.dtype))
        return F.linear(inputs, self.decoded(inputs.dtype), self._bias(inputs.dtype))


class QuantizedConv2d(_QuantizedLayer, nn.Conv2d):
    """nn.Conv2d with a quantized weight, the matrix [out, kh·kw·in_channels].

    UserError for grouped convolutions and for padding with anything but zeros.
    """

    def __new__(cls, *arguments, **options):
        """Make a plain nn.Conv2d from the arguments of one: peft takes the layer's type for a LoRA's convolutions."""
        if arguments and isinstance(arguments[0], int):
            return nn.Conv2d(*arguments, **options)
        return super().__new__(cls)

    def __init__(
        self, weight: QuantizedWeight, bias: nn.Parameter | None, spec: LayerSpec, *, decode: str = "per_call"
    ):
        super().__init__(weight, bias, spec, decode=decode)
        conv = spec.conv
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise UserError(
                f"layer {spec.name} is a convolution with groups={conv.groups}, padding_mode={conv.padding_mode}; only "
                "groups=1 with zeros can be quantized: leave it out of the pattern"
            )
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] // (conv.kernel[0] * conv.kernel[1])
        self.kernel_size, self.stride, self.padding = conv.kernel, conv.stride, conv.padding
        self.dilation, self.groups, self.padding_mode = conv.dilation, conv.groups, conv.padding_mode
        self.transposed, self.output_padding = False, (0, 0)
        weight.original_shape = (self.out_channels, self.in_channels, *self.kernel_size)

    def dequantized(self) -> nn.Conv2d:
        """The same layer with the decoded weight."""
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            bias=self.bias is not None,
            device="meta",
        )
        return self._filled(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = self.decoded(inputs.dtype), self._bias(inputs.dtype)
        return F.conv2d(inputs, weight, bias, stride=self.stride, padding=self.padding, dilation=self.dilation)


class QuantizedEmbedding(_QuantizedLayer, nn.Embedding):
    """nn.Embedding with a quantized weight [tokens, width]; a token's row is decoded when it is read."""

    def __init__(self, weight: QuantizedWeight, bias: None, spec: LayerSpec, *, decode: str = "per_call"):
        super().__init__(weight, bias, spec, decode=decode)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.scale_grad_by_freq = self.sparse = False

    def dequantized(self) -> nn.Embedding:
        """The same layer with the decoded weight."""
        layer = nn.Embedding(*self.weight.shape, device="meta")
        layer.weight = nn.Parameter(self.weight().detach(), requires_grad=False)
        return layer.train(self.training)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight.rows(tokens)


_KINDS = {"linear": QuantizedLinear, "conv": QuantizedConv2d, "embedding": QuantizedEmbedding}
QuantizedLayer = QuantizedLinear | QuantizedConv2d | QuantizedEmbedding


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    """The denoiser's quantized layers by name, in module order."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, _QuantizedLayer)}


def dequantize_layers(denoiser: nn.Module) -> nn.Module:
    """Replace quantized layers in place by plain ones with the decoded weights."""
    for name, layer in quantized_layers(denoiser).items():
        replace_layer(denoiser, name, layer.dequantized())
    denoiser._modules.pop(SHARED_NAME, None)
    return denoiser


def replace_layer(denoiser: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`. AttributeError if there is none."""
    denoiser.get_submodule(name)
    parent, _, child = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), child, module)


def swap(denoiser: nn.Module, spec: LayerSpec, weight: QuantizedWeight, *, decode: str = "per_call") -> QuantizedLayer:
    """Replace the layer of `spec` by one with `weight` and the same bias; returns the new layer.

    A weight's shared part is registered at the denoiser's root. ValueError if another one is there already.
    """
    old = denoiser.get_submodule(spec.name)
    layer = _KINDS[spec.kind](weight, getattr(old, "bias", None), spec, decode=decode)
    for shared in weight.shared:
        share(denoiser, weight.scheme.shared_key, shared)
    replace_layer(denoiser, spec.name, layer.train(old.training))
    return layer


def share(denoiser: nn.Module, key: str, part: SharedPart) -> None:
    """Register a shared part at the denoiser's root. ValueError if another one has this key already."""
    parts = _shared_parts(denoiser)
    if key not in parts:
        parts[key] = part
    elif parts[key] is not part:
        raise ValueError(f"the denoiser has another shared part {key} already")


def _shared_parts(denoiser: nn.Module) -> nn.ModuleDict:
    if SHARED_NAME not in denoiser._modules:
        denoiser.add_module(SHARED_NAME, nn.ModuleDict())
    return denoiser.get_submodule(SHARED_NAME)


def swap_empty(
    denoiser: nn.Module, schemes: Iterable[tuple[LayerSpec, Scheme]], *, decode: str = "per_call"
) -> nn.Module:
    """Replace layers in place by empty quantized ones on the same device, to load into or, on meta, to count bytes.

    UserError, with the layer's name, for a group size that does not divide its inputs.
    """
    for spec, scheme in schemes:
        device = denoiser.get_submodule(spec.name).weight.device
        with device:
            shared = _empty_shared(denoiser, scheme)
            try:
                weight = empty_weight(scheme, spec.shape, shared)
            except UserError as error:
                raise UserError(f"layer {spec.name}: {error}") from error
        swap(denoiser, spec, weight, decode=decode)
    return denoiser


def _empty_shared(denoiser: nn.Module, scheme: Scheme) -> SharedPart | None:
    """The denoiser's shared part for a scheme, or an empty one if it has none yet; None if the scheme needs none."""
    if scheme.shared_key is None:
        return None
    parts = _shared_parts(denoiser)
    return parts[scheme.shared_key] if scheme.shared_key in parts else empty_shared(scheme)
