"""The most memory that every stage holds, in plain formulas of shapes: estimates, good to a fifth or so.

On the CPU everything is the host's; on a GPU models, activations and Hessians are the device's. Left out: the
allocators' fragments, the kernels' scratch, what text encoders need beside their weights, and recorded calls, a few
megabytes.
"""

import heapq
from dataclasses import dataclass

from vqdm.calibration.hessian import CHUNK
from vqdm.codecs.encode import encoder_bytes
from vqdm.config.options import QuantizeConfig
from vqdm.metrics.paired import AT_ONCE
from vqdm.models.specs import LayerSpec
from vqdm.stages.plan.forward import LayerInput

PROCESS = 700 << 20  # bytes of a process that has imported torch and diffusers, with no model
CONTEXT = 500 << 20  # bytes of a CUDA context and its libraries' workspaces
HESSIAN_WORKSPACE = 4 * 4 * CHUNK  # bytes: a chunk of rows or patches in fp32, another one shifted, copies
PIXEL_BYTES = 4  # per number of an image: it and its original, each as read and in its batch
SSIM_BYTES = 60  # per number of the images compared at the same time, measured: 48 of tensors, the kernels' scratch


@dataclass(frozen=True)
class Memory:
    """Bytes on the device and on its host; on the CPU all are the host's."""

    device: int
    host: int


def placed(on_device: float, on_host: float, *, device: str) -> Memory:
    """Memory with a process and a CUDA context on top; if the device is the CPU, everything is the host's."""
    if device == "cpu":
        return Memory(0, int(on_device + on_host + PROCESS))
    return Memory(int(on_device + CONTEXT), int(on_host + PROCESS))


@dataclass(frozen=True)
class Model:
    """Sizes of a pipeline."""

    parts: dict[str, int]  # name -> parameters: unet, text_encoder, vae, …
    item_size: int  # bytes of a number in the model's dtype
    activations: float  # bytes of the denoiser's forward, of one sample
    decoder: float  # bytes of the decoder's forward, of one image, in the dtype that it computes in
    decoder_upcast: bool  # `decoder_upcasts`
    image_numbers: int = 0  # of an image: 3 · height · width
    sliced: bool = False  # a batch's images are decoded one after the other

    @property
    def weights(self) -> int:
        return self.item_size * sum(self.parts.values())

    def visitors(self, kind: str = "") -> int:
        """Bytes of the parts beside the denoiser, or of those whose name begins so: text_encoder, vae."""
        names = [name for name in self.parts if name.startswith(("text_encoder", "vae", "image_encoder"))]
        return self.item_size * sum(self.parts[name] for name in names if name.startswith(kind))

    def resident(self, device: str) -> int:
        """Bytes that stay on the device: a GPU's visitors leave it (vqdm/models/placement.py)."""
        return self.weights if device == "cpu" else self.weights - self.visitors()


def decoder_upcasts(vae_config, dtype: str) -> bool:
    """True if the decoder computes in fp32 though the model is fp16, as diffusers' SDXL pipeline decides."""
    return dtype == "float16" and bool(getattr(vae_config, "force_upcast", False))


def sampling_bytes(model: Model, samples: int, images: int, *, device: str) -> float:
    """Bytes of the weights and of the worst moment: text encoders, denoiser or decoder (images=0: no decoding).

    samples: in the denoiser's batch, two for an image under guidance.
    """
    visiting = model.visitors if device != "cpu" else lambda _: 0
    moments = [samples * model.activations, visiting("text_encoder")]
    if images:
        upcast = (4 - model.item_size) * model.parts.get("vae", 0) if model.decoder_upcast else 0
        at_once = 1 if model.sliced else images
        moments.append(visiting("vae") + upcast + at_once * model.decoder + images * 4 * model.image_numbers)
    return model.resident(device) + max(moments)


def generate_memory(model: Model, samples: int, images: int, *, device: str, codes: float = 0) -> Memory:
    """Memory of sampling; the host holds a batch's images as fp32 and as uint8. codes: bytes, of a quantized denoiser
    beside its decoded weights."""
    host = 5 * images * model.image_numbers
    return placed(
        sampling_bytes(model, samples, images, device=device) + codes, loaded(model, host, device), device=device
    )


def loaded(model: Model, on_host: float, device: str) -> float:
    """Bytes on the host, through whose memory a pipeline is loaded to a GPU."""
    return on_host if device == "cpu" else max(on_host, model.weights)


def code_bytes(specs: list[LayerSpec], config: QuantizeConfig) -> float:
    return 0 if config.kind == "none" else config.bits / 8 * sum(spec.size for spec in specs)


def hessian_bytes(group: list[LayerSpec], inputs: dict[str, LayerInput]) -> int:
    """Bytes of a group's Hessians: fp32 [in, in] per tensor read; two, past and present, where layers share it."""
    readers: dict[tuple, list[LayerSpec]] = {}
    for spec in group:
        readers.setdefault((inputs[spec.name].tensor, spec.conv), []).append(spec)
    return sum(4 * specs[0].shape[1] ** 2 * min(len(specs), 2) for specs in readers.values())


def quantize_memory(
    model: Model,
    groups: list[list[LayerSpec]],
    inputs: dict[str, LayerInput],
    *,
    config: QuantizeConfig,
    samples: int,
    workers: int,
    room: int,
    device: str,
    needs_hessians: bool,
    original: int = 0,
) -> Memory:
    """Memory of the worst group: Hessians, and the forward that fills them or the workers that encode its layers.

    original: bytes of the denoiser that stays as it was beside the student, where both read the calls. room: bytes
    that several workers stay within; one alone may take more. On a GPU every worker copies its Hessian to the host. At
    the end the student: decoded weights in the model's dtype beside its codes, and its file in the host's memory.
    """
    copied = 1 if device != "cpu" and needs_hessians else 0
    forward, weights = samples * model.activations, model.resident(device) + original
    on_device, on_host = sampling_bytes(model, samples, 0, device=device) + original, 0.0
    for group in groups:
        held = hessian_bytes(group, inputs) * (2 if original else 1) if needs_hessians else 0
        each = [encoder_bytes(spec.shape, config) + copied * 4 * spec.shape[1] ** 2 for spec in group]
        working = max(min(sum(heapq.nlargest(workers, each)), room), max(each))
        recording = held + forward + (HESSIAN_WORKSPACE if needs_hessians else 0)
        if device == "cpu":
            on_device = max(on_device, weights + max(recording, held + working))
        else:
            on_device, on_host = max(on_device, weights + recording), max(on_host, working)
    codes = code_bytes([spec for group in groups for spec in group], config)
    on_host = loaded(model, max(on_host, 2 * codes), device)
    return placed(max(on_device, weights + codes + forward), on_host, device=device)


def evaluate_memory(image_numbers: int, images: int, *, device: str) -> Memory:
    """Memory of a batch of images and its originals, compared in parts; the metrics' networks are left out."""
    compared = min(images * image_numbers, max(3 * AT_ONCE, image_numbers))
    return placed(SSIM_BYTES * compared, PIXEL_BYTES * images * image_numbers, device=device)
