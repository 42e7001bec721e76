"""Published networks of metrics with random weights, saved as their publishers save them; made without a download."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco" / "mini"


class _Bare(FeatureExtractorInceptionV3):
    """The network with the weights that it is built with."""

    def load_state_dict(self, *_, **__):
        pass


def random_inception(directory: Path, *, seed: int = 0) -> Path:
    """inception.pth, and inception.safetensors of the same tensors: signals keep their size through all layers."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    net = _Bare("bare", ["2048"], feature_extractor_weights_path=empty)
    _randomise(net, seed)
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    torch.save(tensors, directory / "inception.pth")
    save_file(tensors, directory / "inception.safetensors")
    return directory / "inception.pth"


def random_alexnet(directory: Path, *, seed: int = 0) -> Path:
    from torchvision.models import alexnet

    net = alexnet(weights=None)
    _randomise(net, seed)
    torch.save(net.state_dict(), directory / "alexnet.pth")
    return directory / "alexnet.pth"


def _randomise(net: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            spread = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * spread)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)


TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def random_open_clip(directory: Path, *, seed: int = 0) -> tuple[str, Path]:
    """(name, weights) of a small model of open_clip's, which then knows it by its name."""
    import open_clip

    (directory / "configs").mkdir()
    (directory / "configs" / "tiny-random.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(directory / "configs")
    model = open_clip.create_model("tiny-random")
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _like(tensor, generator) for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "clip.safetensors")
    return "tiny-random", directory / "clip.safetensors"


def random_transformers_clip(directory: Path, *, seed: int = 0) -> Path:
    """A small CLIP model and its processor as transformers saves them; the tokens are CLIP's, from open_clip's file."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    known = SimpleTokenizer()
    merges = [pair for pair, _ in sorted(known.bpe_ranks.items(), key=lambda item: item[1])]
    vocabulary = {
        token.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): number
        for token, number in known.encoder.items()
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(
        text_config=small | ends, vision_config=small | {"image_size": 48, "patch_size": 8}, projection_dim=32
    )
    model = CLIPModel(config)
    generator = torch.Generator().manual_seed(seed)
    model.load_state_dict({name: _like(tensor, generator) for name, tensor in model.state_dict().items()})
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    model.save_pretrained(directory)
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
    return directory


def _like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor.clone()
    if tensor.ndim < 2:  # gains of norms near 1, biases near 0, and the logit scale
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    return torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5


def textures(count: int, size: tuple[int, int], *, seed: int = 0) -> list[np.ndarray]:
    """Pictures that differ in colour, waves and noise, uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    pictures = []
    for _ in range(count):
        fx, fy, phase = random.uniform((0.02, 0.02, 0), (0.5, 0.5, 6))
        wave = np.sin(fx * columns + fy * rows + phase)[..., None] * random.uniform(10, 90, 3)
        picture = random.uniform(40, 210, 3) + wave + random.normal(0, random.uniform(1, 30), (*size, 3))
        pictures.append(picture.clip(0, 255).astype(np.uint8))
    return pictures


def photographs(count: int) -> list[np.ndarray]:
    """Of COCO, uint8, each in its own size; empty where they are not there."""
    from PIL import Image

    paths = sorted((PHOTOGRAPHS / "val2017").glob("*.jpg"))[:count]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]
