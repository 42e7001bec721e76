"""The most memory that every stage holds, in plain formulas of shapes: estimates, good to a fifth or so.

On the CPU everything is the host's; on a GPU models, activations and Hessians are the device's. Left out: the
allocators' fragments, the kernels' scratch, what text encoders need beside their weights, and recorded calls, a few
megabytes.

Weights whose file holds the dtype that is asked for are used where they lie, in the mapped file: a system takes such
pages back when it likes and reads them again. What of them is resident says little, so memory is told without them too.
"""

import heapq
from dataclasses import dataclass

from vqdm.calibration.hessian import CHUNK
from vqdm.codecs.encode import encoder_bytes
from vqdm.config.options import ModelConfig, QuantizeConfig
from vqdm.errors import UserError
from vqdm.metrics.paired import AT_ONCE
from vqdm.models.foreign import safetensors_header
from vqdm.models.location import denoiser_directory, model_directory, single_file
from vqdm.models.specs import LayerSpec
from vqdm.stages.plan.forward import LayerInput

PROCESS = 700 << 20  # bytes of a process that has imported torch and diffusers, with no model
LIBRARIES = 220 << 20  # bytes of them in mapped files: the libraries
CONTEXT = 500 << 20  # bytes of a CUDA context and its libraries' workspaces
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # as safetensors calls them
VARIANTS = {None: "float32", "fp16": "float16", "bf16": "bfloat16"}  # of the hub's files
HESSIAN_WORKSPACE = 4 * 4 * CHUNK  # bytes: a chunk of rows or patches in fp32, another one shifted, copies
PIXEL_BYTES = 4  # per number of an image: it and its original, each as read and in its batch
SSIM_BYTES = 60  # per number of the images compared at the same time, measured: 48 of tensors, the kernels' scratch


@dataclass(frozen=True)
class Memory:
    """Bytes on the device and on its host; on the CPU all are the host's.

    anonymous: of the host's, without mapped files. host: with all of these resident, as where nothing is taken back.
    """

    device: int
    host: int
    anonymous: int


def placed(on_device: float, on_host: float, *, device: str, mapped: float = 0, loading: float = 0) -> Memory:
    """Memory with a process and a CUDA context on top; if the device is the CPU, everything is the host's.

    mapped: bytes on the device that, on the CPU, lie in mapped files. loading: bytes of the model, which is loaded to a
    GPU through the host's memory.
    """
    if device == "cpu":
        whole = on_device + on_host + PROCESS
        return Memory(0, int(whole), int(whole - mapped - LIBRARIES))
    own = on_host + PROCESS - LIBRARIES
    return Memory(int(on_device + CONTEXT), int(max(on_host, loading) + PROCESS), int(own))


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
    in_files: bool = False  # `used_in_files`
    packed: int = 0  # bytes of the denoiser's largest convolution, which a CPU's kernel copies in every call

    @property
    def weights(self) -> int:
        return self.item_size * sum(self.parts.values())

    def visitors(self, kind: str = "") -> int:
        """Bytes of the parts beside the denoiser, or of those whose name begins so: text_encoder, vae."""
        names = [name for name in self.parts if name.startswith(("text_encoder", "vae", "image_encoder"))]
        return self.item_size * sum(self.parts[name] for name in names if name.startswith(kind))

    @property
    def mapped(self) -> int:
        """Bytes of the weights that are used in mapped files, on the CPU."""
        return self.weights if self.in_files else 0

    def forward(self, samples: float, device: str) -> float:
        """Bytes of a forward of the denoiser beside its weights."""
        return samples * self.activations + (self.packed if device == "cpu" else 0)

    def resident(self, device: str) -> int:
        """Bytes that stay on the device: a GPU's visitors leave it (vqdm/models/placement.py)."""
        return self.weights if device == "cpu" else self.weights - self.visitors()


def used_in_files(config: ModelConfig) -> bool:
    """True if the model's weights are not copied when they are loaded: if their files hold its dtype.

    Files of the hub go by their variant, fp16 or full; a single file counts as copied.
    """
    if config.random_seed is not None:
        return config.dtype == "bfloat16"
    if config.hub_id is not None:
        return config.dtype == VARIANTS.get(config.variant)
    if single_file(config) is not None:
        return False
    try:
        files = sorted(denoiser_directory(model_directory(config)).glob("*.safetensors"))
        tensors = [entry for name, entry in safetensors_header(files[0]).items() if name != "__metadata__"]
    except (UserError, OSError, IndexError):  # is said when the model is loaded
        return False
    return any(DTYPES.get(entry["dtype"]) == config.dtype for entry in tensors)


def decoder_upcasts(vae_config, dtype: str) -> bool:
    """True if the decoder computes in fp32 though the model is fp16, as diffusers' SDXL pipeline decides."""
    return dtype == "float16" and bool(getattr(vae_config, "force_upcast", False))


def sampling_bytes(model: Model, samples: int, images: int, *, device: str) -> float:
    """Bytes of the weights and of the worst moment: text encoders, denoiser or decoder (images=0: no decoding).

    samples: in the denoiser's batch, two for an image under guidance.
    """
    visiting = model.visitors if device != "cpu" else lambda _: 0
    moments = [model.forward(samples, device), visiting("text_encoder")]
    if images:
        upcast = (4 - model.item_size) * model.parts.get("vae", 0) if model.decoder_upcast else 0
        at_once = 1 if model.sliced else images
        moments.append(visiting("vae") + upcast + at_once * model.decoder + images * 4 * model.image_numbers)
    return model.resident(device) + max(moments)


def generate_memory(model: Model, samples: int, images: int, *, device: str, codes: float = 0) -> Memory:
    """Memory of sampling; the host holds a batch's images as fp32 and as uint8. codes: bytes, of a quantized denoiser
    beside its decoded weights; they stay in their file, and the decoded weights are in none."""
    used = sampling_bytes(model, samples, images, device=device) + codes
    mapped = codes + (model.visitors() if model.in_files else 0) if codes else model.mapped
    host = 5 * images * model.image_numbers
    return placed(used, host, device=device, mapped=mapped, loading=model.weights)


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
    student: bool = True,
) -> Memory:
    """Memory of the worst group: Hessians, and the forward that fills them or the workers that encode its layers.

    original: bytes of the denoiser that stays as it was beside the student, where both read the calls. room: bytes
    that several workers stay within; one alone may take more. On a GPU every worker copies its Hessian to the host. At
    the end the student: decoded weights in the model's dtype beside its codes, which its file is written from. Mapped
    files of the originals stay mapped, as biases and norms in them are used. student=False: none is made.
    """
    copied = 1 if device != "cpu" and needs_hessians else 0
    forward, weights = model.forward(samples, device), model.resident(device) + original
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
    if student:
        specs = [spec for group in groups for spec in group]
        codes, kept = code_bytes(specs, config), device == "cpu" and model.in_files
        decoded = model.item_size * sum(spec.size for spec in specs) if kept else 0
        on_device = max(on_device, weights + codes + forward + decoded)
        on_host = on_host if device == "cpu" else max(on_host, codes)
    return placed(on_device, on_host, device=device, mapped=model.mapped, loading=model.weights)


def evaluate_memory(image_numbers: int, images: int, *, device: str) -> Memory:
    """Memory of a batch of images and its originals, compared in parts; the metrics' networks are left out."""
    compared = min(images * image_numbers, max(3 * AT_ONCE, image_numbers))
    return placed(SSIM_BYTES * compared, PIXEL_BYTES * images * image_numbers, device=device)
