"""The tiny world's two text encoders, trained contrastively against renders.

They are built like SDXL's: a CLIPTextModel and a CLIPTextModelWithProjection whose penultimate hidden states are
joined. The image tower exists for this training only; no evaluator takes part.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from vqdm.seeds import seeded_initialisation
from vqdm.stages.tiny_train.loop import fit
from vqdm.tiny.data import SceneSet
from vqdm.tiny.tokenizer import MAX_TOKENS, build_tokenizer


def _config(width: int, tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class ContrastivePair(nn.Module):
    """Both text encoders and a small convolutional image tower with one head for each."""

    def __init__(self, tokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModel(_config(64, tokenizer))
        self.text_encoder_2 = CLIPTextModelWithProjection(_config(128, tokenizer))
        channels = (3, 32, 64, 128)
        blocks = [
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2, padding=1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
            )
            for a, b in itertools.pairwise(channels)
        ]
        self.image_tower = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, 192))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Sum of the two symmetric contrastive losses."""
        targets = torch.arange(len(images))
        seen = self.image_tower(images).split((64, 128), dim=-1)
        read = (self.text_encoder(ids).pooler_output, self.text_encoder_2(ids).text_embeds)
        loss = 0.0
        for image, text in zip(seen, read, strict=True):
            logits = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T * self.log_scale.exp()
            loss = loss + F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)
        return loss / 2


def token_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [n, MAX_TOKENS], padded and cut as the pipeline does it."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def train_text_encoders(scenes: SceneSet, *, directory: Path, steps: int, batch_size: int, seed: int):
    """Train and return (tokenizer, text_encoder, text_encoder_2), in evaluation mode."""
    tokenizer = build_tokenizer()
    with seeded_initialisation(seed, "text_encoders"):
        pair = ContrastivePair(tokenizer)
    ids = token_ids(tokenizer, scenes.captions)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = scenes.pick(batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16):
            return pair(scenes.images(rows), ids[rows])

    average = fit(
        pair,
        loss_of,
        purpose="text_encoders",
        directory=directory,
        steps=steps,
        learning_rate_peak=1e-3,
        seed=seed,
        weight_decay=0.01,
        average_decay=0.99,
    )
    pair.load_state_dict(average, strict=False)
    pair.eval().requires_grad_(False)
    return tokenizer, pair.text_encoder, pair.text_encoder_2
