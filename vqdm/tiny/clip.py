"""The open_clip models of the worlds: config, tokens, loading through open_clip's own path."""

from pathlib import Path

import torch

CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 96, "layers": 4, "head_width": 32, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 24, "vocab_size": 678, "width": 96, "heads": 3, "layers": 3},
}
CLIP_CONFIGS = {  # open_clip's name of the model: its config
    "vqdm-tiny": CLIP_CONFIG,
    "vqdm-small": {
        "embed_dim": 96,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "layers": 4,
            "head_width": 32,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {"context_length": 40, "vocab_size": 753, "width": 128, "heads": 4, "layers": 3},
    },
}


def clip_tokens(tokenizer, captions: list[str], *, length: int) -> torch.Tensor:
    """Token ids int64 [n, length], padded with zeros: open_clip pools at the highest id, the end-of-text token's."""
    rows = torch.zeros(len(captions), length, dtype=torch.int64, device="cpu")
    for row, ids in zip(rows, tokenizer(captions, truncation=True, max_length=length).input_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids, device="cpu")
    return rows


def load_clip(directory: Path):
    """(model, tokenizer) of the evaluators' directory: local config and weights, as open_clip loads any checkpoint."""
    import open_clip
    from transformers import CLIPTokenizer

    weights = next((directory / "open_clip").glob("*.safetensors"))
    open_clip.add_model_config(directory / "open_clip")
    model = open_clip.create_model(weights.stem, pretrained=str(weights))
    return model.eval().requires_grad_(False), CLIPTokenizer.from_pretrained(directory / "tokenizer")
