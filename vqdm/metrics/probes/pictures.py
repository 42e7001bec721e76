"""Edits, reconstruction and the worth of a caption on pictures of one's own, for pipelines of SDXL's kind.

No network judges them here: what is read is PSNR outside the mask, inside it where the truth of the edit is given, the
reconstruction, and how much better the picture's own caption predicts its noise than the edited one.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.drawn import STEPS
from vqdm.metrics.probes.edits import edit_pictures, psnr_where
from vqdm.metrics.probes.inversion import Ddim
from vqdm.metrics.probes.records import WHITE, read_records, square
from vqdm.metrics.probes.recovery import prediction_errors
from vqdm.seeds import torch_generator

SEED = 0  # of the noise in which captions are compared


class Pictures:
    """Extractor of a model: columns {picture_…} with a row for each record, by its id.

    path: the file of records, checked already. guidance: that of the model's own sampler.
    """

    def __init__(self, pipeline, path: Path, *, guidance: float):
        self.asked, self.guidance = Asked(pipeline, "pictures"), guidance
        self.ddim = Ddim(pipeline.scheduler, steps=STEPS, device=self.asked.device)
        self.records = {record.id: record for record in read_records(path)}
        self.size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor

    @torch.no_grad()
    def columns(self, prompts: list[list[str]]) -> dict[str, Tensor]:
        """Columns of prompts, each the id and the caption of a record."""
        records = [self.records[name] for name, _ in prompts]
        before = self._squares([record.image for record in records])
        inside = self._squares([record.mask for record in records], mode="L") >= WHITE
        given = records[0].truth is not None
        truth = self._squares([record.truth for record in records]) if given else before
        captions = [record.caption for record in records], [record.edited for record in records]
        found = edit_pictures(self.asked, self.ddim, before, captions, changed=inside, guidance=self.guidance)
        errors = np.array([self._errors(record, picture) for record, picture in zip(records, before, strict=True)])
        scores = {"picture_error": errors[:, 0], "picture_gap": errors[:, 1] - errors[:, 0]}
        return {name: torch.from_numpy(column) for name, column in scores.items()} | {
            "picture_reconstruction_psnr": found.reconstruction,
            **{
                f"picture_{name}_psnr_{where}": psnr_where(mask, pictures, truth)
                for name, pictures in found.edited.items()
                for where, mask in found.regions.items()
                if given or where == "out"
            },
        }

    def _squares(self, paths: list[Path], mode: str = "RGB") -> np.ndarray:
        return np.stack([square(path, self.size, where="probes.path", mode=mode) for path in paths])

    def _errors(self, record, picture: np.ndarray) -> list[float]:
        """Errors of the noise predicted with the picture's own caption and with the edited one."""
        noise = torch_generator(SEED, "pictures", record.id)
        latent = self.asked.latents(picture[None])
        return prediction_errors(self.asked, latent, [record.caption, record.edited], noise=noise)
