"""Cosines and image features of CLIP models: open_clip for published CLIPs and HPS v2, transformers for PickScore."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqdm.models.foreign import without_bars
from vqdm.runs.device import full_float32


class OpenClip:
    """An open_clip model with weights from a local file, and open_clip's own preprocessing for it."""

    def __init__(self, name: str, weights: Path, *, device: str):
        import open_clip

        self.device = device
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(name, pretrained=str(weights))
        self.tokenize = open_clip.get_tokenizer(name)
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    @full_float32()
    def columns(self, images: list[np.ndarray], captions: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Columns of images, uint8 [h, w, 3]: {"image": unit vectors [n, d], with captions "cosine": [n]}, float32."""
        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images]).to(self.device)
        seen = self.model.encode_image(pixels, normalize=True)
        found = {"image": seen.float().cpu()}
        if captions is not None:
            read = self.model.encode_text(self.tokenize(captions).to(self.device), normalize=True)
            found["cosine"] = (seen * read).sum(-1).float().cpu()
        return found


class PickScore:
    """PickScore v1 (Kirstain et al. 2023), a transformers CLIP model in a directory with its processor's files."""

    def __init__(self, directory: Path, *, device: str):
        from transformers import CLIPModel, CLIPProcessor

        self.device = device
        with without_bars():
            self.model = CLIPModel.from_pretrained(directory, local_files_only=True, use_safetensors=True)
        self.processor = CLIPProcessor.from_pretrained(directory, local_files_only=True)
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    @full_float32()
    def columns(self, images: list[np.ndarray], captions: list[str]) -> dict[str, torch.Tensor]:
        """Columns of images, uint8 [h, w, 3]: {"cosine": [n], "scaled": [n], cosine × the logit scale}, float32."""
        pictures = [Image.fromarray(image) for image in images]
        fitted = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        inputs = self.processor(text=captions, images=pictures, **fitted)
        found = self.model(**inputs.to(self.device))
        cosine = (found.image_embeds * found.text_embeds).sum(-1).float().cpu()  # both are unit vectors
        return {"cosine": cosine, "scaled": cosine * float(self.model.logit_scale.exp())}
