"""A world's two text encoders, trained contrastively against renders.

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
from vqdm.stages.tiny_train.loop import fast_precision, fit, plain_attention
from vqdm.tiny.data import SceneSet
from vqdm.tiny.tokenizer import build_tokenizer
from vqdm.tiny.world import World

SIZES = {  # widths of the two encoders, projection of the second; layers of each; channels of the image tower
    "tiny": {"widths": (64, 128), "layers": 3, "channels": (3, 32, 64, 128)},
    "small": {"widths": (96, 128), "layers": 4, "channels": (3, 32, 64, 96, 128)},
}


def _config(width: int, tokenizer, *, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=128,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class ContrastivePair(nn.Module):
    """Both text encoders and a small convolutional image tower with one head for each."""

    def __init__(self, tokenizer, world: World):
        super().__init__()
        sizes = SIZES[world.name]
        self.widths, channels = sizes["widths"], sizes["channels"]
        one, two = (_config(width, tokenizer, layers=sizes["layers"]) for width in self.widths)
        self.text_encoder = CLIPTextModel(one)
        self.text_encoder_2 = CLIPTextModelWithProjection(two)
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
        self.image_tower = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, sum(self.widths)))
        self.log_scale = nn.Parameter(torch.tensor(2.5, device="cpu"))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Sum of the two symmetric contrastive losses."""
        targets = torch.arange(len(images), device="cpu")
        seen = self.image_tower(images).split(self.widths, dim=-1)
        read = (self.text_encoder(ids).pooler_output, self.text_encoder_2(ids).text_embeds)
        loss = 0.0
        for image, text in zip(seen, read, strict=True):
            logits = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T * self.log_scale.exp()
            loss = loss + F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)
        return loss / 2


def token_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [n, the tokenizer's length], padded and cut as the pipeline does it."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def text_states(text_encoder, text_encoder_2, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Penultimate states of both encoders [n, tokens, width], and pooled text of the second [n, 128]."""
    first = text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = text_encoder_2(ids, output_hidden_states=True)
    return first, second.hidden_states[-2], second.text_embeds


def train_text_encoders(scenes: SceneSet, *, directory: Path, steps: int, batch_size: int, seed: int):
    """Train and return (tokenizer, text_encoder, text_encoder_2), in evaluation mode."""
    tokenizer = build_tokenizer(scenes.world)
    with seeded_initialisation(seed, "text_encoders"):
        pair = ContrastivePair(tokenizer, scenes.world)
    ids = token_ids(tokenizer, scenes.captions)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = scenes.pick(batch_size, generator)
        with fast_precision(), plain_attention(scenes.world):
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
