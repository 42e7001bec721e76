"""Cost of one forward of a module, from shapes alone: the module and its inputs are on the meta device.

FLOPs are counted by torch's own counter, a multiply-add as two. Memory is that of the tensors made in between while
they live; parameters, inputs and the kernels' scratch are not included.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from vqdm.models.live_bytes import CONVOLUTIONS, LiveBytes
from vqdm.models.specs import LayerSpec


def _product_flops(_total: torch.Size, one: torch.Size, other: torch.Size, *_, **__) -> int:
    return 2 * one[0] * one[1] * other[1]


UNCOUNTED = {torch.ops.aten.addmm_: _product_flops}  # torch's counter leaves out this one, by which Hessians are summed


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs by kind; bytes that all other operations write; the most bytes of activations that live at once."""

    matmul_flops: float = 0
    convolution_flops: float = 0
    attention_flops: float = 0
    written_bytes: float = 0
    peak_bytes: float = 0

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.convolution_flops + self.attention_flops

    def times(self, factor: float) -> "ForwardCost":
        """Cost of a batch so many times as large: every term is linear in the batch."""
        return ForwardCost(*(factor * value for value in dataclasses.astuple(self)))


def measure(module_call: Callable[[], object]) -> ForwardCost:
    """The cost of a call without gradients; on meta it computes nothing, elsewhere all but attention."""
    with torch.no_grad(), FusedAttention() as attention:
        counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        with counter, LiveBytes() as live:
            kept = module_call()
        del kept
    counts = counter.get_flop_counts().get("Global", {})
    convolution = sum(counts.get(operation, 0) for operation in CONVOLUTIONS)
    return ForwardCost(
        matmul_flops=sum(counts.values()) - convolution,
        convolution_flops=convolution,
        attention_flops=attention.flops,
        written_bytes=live.written,
        peak_bytes=live.peak,
    )


class FusedAttention(TorchFunctionMode):
    """Context in which attention is one kernel that keeps no [tokens, tokens] matrix; its output is left empty.

    flops: 4 · batch · heads · queries · keys · size, the two products.
    """

    flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = named["query"], named["key"], named["value"]
        self.flops += 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])


@dataclass(frozen=True)
class LayerInput:
    """What a layer reads in one call: the shape of the tensor and its number, the same for layers that share it."""

    shape: tuple[int, ...]
    tensor: int


@contextmanager
def inputs_of(denoiser: nn.Module, specs: Iterable[LayerSpec]) -> Iterator[dict[str, LayerInput]]:
    """Context that fills a dict by layer, in the order of first execution, while somebody calls the denoiser."""
    found: dict[str, LayerInput] = {}
    numbers = WeakIdKeyDictionary()

    def read(name: str, _layer: nn.Module, args: tuple, kwargs: dict) -> None:
        tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
        number = numbers.setdefault(tensor, len(found))
        found.setdefault(name, LayerInput(tuple(tensor.shape), number))

    hooks = [
        denoiser.get_submodule(spec.name).register_forward_pre_hook(partial(read, spec.name), with_kwargs=True)
        for spec in specs
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class DenoiserCost:
    """One sample of a denoiser's batch (guidance takes two for every image), and what its layers read of it."""

    sample: ForwardCost
    inputs: dict[str, LayerInput]  # of a batch of BATCH


BATCH = 2


_measured: dict[str, DenoiserCost | None] = {}  # by what tells denoisers apart


def measure_denoiser(
    denoiser: nn.Module, specs: Iterable[LayerSpec], *, size: int | None = None
) -> DenoiserCost | None:
    """The cost of a denoiser on meta, for images of `size` pixels (None: the model's own); None for an unknown kind.

    Measured once in a process for denoisers alike: rows of a table share theirs.
    """
    specs, shapes = list(specs), {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    alike = repr([type(denoiser), denoiser.config, shapes, denoiser.dtype, [spec.name for spec in specs], size])
    if alike not in _measured:
        _measured[alike] = measure_call(denoiser, specs, size=size)
    return _measured[alike]


def measure_call(
    denoiser: nn.Module, specs: Iterable[LayerSpec], *, size: int | None, timestep: float | None = None
) -> DenoiserCost | None:
    """`measure_denoiser` of this very call. timestep: for a denoiser whose calls differ by it, as under a cache."""
    arguments = denoiser_inputs(denoiser, batch=BATCH, size=size)
    if arguments is None:
        return None
    if timestep is not None:
        arguments["timestep"] = timestep
    with inputs_of(denoiser, specs) as inputs:
        cost = measure(lambda: denoiser(**arguments, return_dict=False))
    return DenoiserCost(cost.times(1 / BATCH), inputs)


def measure_decoder(vae: nn.Module, latents: tuple[int, int], *, dtype: torch.dtype) -> ForwardCost:
    """Cost of decoding latents (height, width) of one image; vae: AutoencoderKL on meta, which computes in `dtype`."""
    nn.Module.to(vae, dtype=dtype)  # its own method warns of parts that would have to stay in fp32
    sample = torch.empty(1, vae.config.latent_channels, *latents, dtype=dtype, device=vae.device)
    return measure(lambda: vae.decode(sample, return_dict=False))


def latent_size(denoiser: nn.Module, size: int | None, *, vae_scale: int = 8) -> tuple[int, int]:
    """Height and width of the latents of images of `size` pixels, or of the model's own size."""
    own = getattr(denoiser.config, "sample_size", None) or 128  # Flux names none: 1024 pixels, its usual
    if size is not None:
        return size // vae_scale, size // vae_scale
    return (own, own) if isinstance(own, int) else tuple(own)


def denoiser_inputs(denoiser: nn.Module, *, batch: int, size: int | None = None) -> dict | None:
    """Zeros for all arguments that the pipeline calls this denoiser with, on its device; None for an unknown class.

    batch: samples of the denoiser, two for an image under guidance. size: pixels.
    """
    make = _INPUTS.get(type(denoiser).__name__)
    first = next(denoiser.parameters())
    zeros = partial(torch.zeros, dtype=first.dtype, device=first.device)
    return None if make is None else make(denoiser, zeros, batch, latent_size(denoiser, size))


CLIP_TOKENS, SIZES = 77, 6  # of a prompt; numbers of SDXL's size conditioning
PIXART_TOKENS, SD3_TOKENS, FLUX_TOKENS = 300, 77 + 256, 512  # as the pipelines pad prompts by default


def _unet_inputs(unet: nn.Module, zeros, batch: int, latents: tuple[int, int]) -> dict | None:
    config = unet.config
    if config.addition_embed_type not in (None, "text_time") or not isinstance(config.cross_attention_dim, int):
        return None
    found = {
        "sample": zeros(batch, config.in_channels, *latents),
        "timestep": zeros(()),
        "encoder_hidden_states": zeros(batch, CLIP_TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {"text_embeds": zeros(batch, pooled), "time_ids": zeros(batch, SIZES)}
    return found


def _pixart_inputs(transformer: nn.Module, zeros, batch: int, latents: tuple[int, int]) -> dict | None:
    config = transformer.config
    if config.caption_channels is None or transformer.use_additional_conditions:
        return None
    return {
        "hidden_states": zeros(batch, config.in_channels, *latents),
        "encoder_hidden_states": zeros(batch, PIXART_TOKENS, config.caption_channels),
        "timestep": zeros(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3_inputs(transformer: nn.Module, zeros, batch: int, latents: tuple[int, int]) -> dict:
    config = transformer.config
    return {
        "hidden_states": zeros(batch, config.in_channels, *latents),
        "encoder_hidden_states": zeros(batch, SD3_TOKENS, config.joint_attention_dim),
        "pooled_projections": zeros(batch, config.pooled_projection_dim),
        "timestep": zeros(batch),
    }


def _flux_inputs(transformer: nn.Module, zeros, batch: int, latents: tuple[int, int]) -> dict:
    config = transformer.config
    tokens = math.prod(latents) // 4  # patches of 2 × 2
    found = {
        "hidden_states": zeros(batch, tokens, config.in_channels),
        "encoder_hidden_states": zeros(batch, FLUX_TOKENS, config.joint_attention_dim),
        "pooled_projections": zeros(batch, config.pooled_projection_dim),
        "timestep": zeros(batch),
        "img_ids": zeros(tokens, 3),
        "txt_ids": zeros(FLUX_TOKENS, 3),
    }
    return found | ({"guidance": zeros(batch)} if config.guidance_embeds else {})


_INPUTS = {
    "UNet2DConditionModel": _unet_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
    "SD3Transformer2DModel": _sd3_inputs,
    "FluxTransformer2DModel": _flux_inputs,
}
