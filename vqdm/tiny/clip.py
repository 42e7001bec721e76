"""The tiny world's open_clip model: config, tokens, loading through open_clip's own path."""

from pathlib import Path

import torch

CLIP_NAME = "vqdm-tiny"
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 96, "layers": 4, "head_width": 32, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 24, "vocab_size": 678, "width": 96, "heads": 3, "layers": 3},
}


def clip_tokens(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [n, 24], padded with zeros: open_clip pools at the highest id, which is the end-of-text token."""
    length = CLIP_CONFIG["text_cfg"]["context_length"]
    rows = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, ids in zip(rows, tokenizer(captions, truncation=True, max_length=length).input_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return rows


def load_clip(directory: Path):
    """(model, tokenizer) of the evaluators' directory: local config and weights, as open_clip loads any checkpoint."""
    import open_clip
    from transformers import CLIPTokenizer

    open_clip.add_model_config(directory / "open_clip")
    model = open_clip.create_model(CLIP_NAME, pretrained=str(directory / "open_clip" / f"{CLIP_NAME}.safetensors"))
    return model.eval().requires_grad_(False), CLIPTokenizer.from_pretrained(directory / "tokenizer")
