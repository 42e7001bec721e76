"""What a pipeline directory lacks is said in one line, by name."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.models.loader import denoiser_on_meta, load_pipeline
from vqdm.models.shipped import builtin_directory

MISSING = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(builtin_directory("tiny"), tmp_path / "model")


def test_a_weight_that_is_not_there(copied):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights[MISSING]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the weight {MISSING} of the unet"):
        load_pipeline(ModelConfig(path=str(copied)), device="cpu")


def test_a_denoiser_that_diffusers_does_not_know(copied):
    file = copied / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "NextYearsModel"}))
    with pytest.raises(UserError, match=r"says _class_name='NextYearsModel' where model_index.json says UNet2D"):
        denoiser_on_meta(ModelConfig(path=str(copied)))
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["diffusers", "NextYearsModel"]}))
    with pytest.raises(UserError, match="names NextYearsModel, which diffusers"):
        denoiser_on_meta(ModelConfig(path=str(copied)))
