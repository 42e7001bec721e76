import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.models.location import (
    check_original,
    check_pipeline_directory,
    full_precision_bytes,
    local_directory,
    model_identity,
)
from vqdm.models.shipped import builtin_directory, evaluators_directory

REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
DOWNLOAD = """
import sys
from vqdm.config.options import ModelConfig
from vqdm.errors import UserError
from vqdm.models.location import download, full_precision_bytes
config = ModelConfig(name="sdxl", hub_id=sys.argv[1], revision=sys.argv[2])
for find in (download, full_precision_bytes):
    try:
        print(find(config))
    except UserError as error:
        print(error)
print("torch" in sys.modules)
"""


def pipeline_directory(directory, *, part="unet", index=None):
    """The files of a pipeline that say what it is, with one weight."""
    (directory / part).mkdir(parents=True)
    (directory / part / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file({"a.weight": torch.zeros(1)}, directory / part / "diffusion_pytorch_model.safetensors")
    content = {"_class_name": "P", part: ["diffusers", "UNet2DConditionModel"]} if index is None else index
    (directory / "model_index.json").write_text(json.dumps(content))
    return directory


def error_of(directory):
    with pytest.raises(UserError) as caught:
        local_directory(ModelConfig(path=str(directory)))
    message = str(caught.value)
    assert str(directory) in message
    assert len(message.splitlines()) == 1
    return message


def test_a_good_directory_is_given_back(tmp_path):
    for part in ("unet", "transformer"):
        directory = pipeline_directory(tmp_path / part, part=part)
        assert local_directory(ModelConfig(path=str(directory))) == directory
    assert local_directory(ModelConfig(hub_id="a/b", revision="c")) is None


def test_no_directory(tmp_path):
    assert "is no directory; give" in error_of(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "is no .safetensors file" in error_of(tmp_path / "file")


def test_no_model_index(tmp_path):
    assert "has no model_index.json; give" in error_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"unet": ', b"\xff\xfe\x00", b"not json\nat all"])
def test_a_broken_model_index(content, tmp_path):
    pipeline_directory(tmp_path)
    (tmp_path / "model_index.json").write_bytes(content)
    assert "is not JSON" in error_of(tmp_path)


@pytest.mark.parametrize("index", [{}, {"vae": ["diffusers", "AutoencoderKL"]}, [], ["unet"], None, 3, "unet"])
def test_a_model_index_without_denoiser(index, tmp_path):
    pipeline_directory(tmp_path, index={})
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = "holds no denoiser (unet/config.json or transformer/config.json)"
    assert (said if isinstance(index, dict) else "where an object should be") in error_of(tmp_path)


def test_a_denoiser_that_is_named_but_not_there(tmp_path):
    pipeline_directory(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    assert "holds no denoiser" in error_of(tmp_path)


def test_a_builtin_model_that_is_not_shipped():
    with pytest.raises(UserError, match=r"model\.builtin='nonesuch' is not shipped; there are "):
        builtin_directory("nonesuch")
    with pytest.raises(UserError):
        builtin_directory("../tiny")


def test_evaluators_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"give evaluate\.evaluators=DIR") as caught:
        evaluators_directory(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "attribute_net.safetensors").write_bytes(b"")
    assert evaluators_directory(str(tmp_path)) == tmp_path


def test_identity_of_a_local_model_is_its_files_and_of_a_hub_model_its_revision(tmp_path):
    cache = tmp_path / "cache.json"
    config = ModelConfig(path=str(pipeline_directory(tmp_path / "one")))
    copy = ModelConfig(path=str(pipeline_directory(tmp_path / "two")))
    identity = model_identity(config, cache=cache)
    assert model_identity(copy, cache=cache) == identity
    settings = {"_class_name": "UNet2DConditionModel", "sample_size": 4}
    (tmp_path / "two" / "unet" / "config.json").write_text(json.dumps(settings))
    assert model_identity(copy, cache=cache) != identity
    assert model_identity(ModelConfig(hub_id="a/b", revision="c"), cache=cache) == "a/b@c"


@pytest.mark.parametrize(
    ("variant", "expected"),
    [(None, [0, 1]), ("fp16", [2]), ("bf16", [3, 4]), ("int8", [0, 1])],  # diffusers takes those of no variant for int8
)
def test_bytes_are_those_of_the_variants_own_files(variant, expected, tmp_path):
    directory = pipeline_directory(tmp_path)
    (directory / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    names = ("-00001-of-00002", "-00002-of-00002", ".fp16", ".bf16-00001-of-2", ".bf16-00002-of-2")
    files = [directory / "unet" / f"diffusion_pytorch_model{name}.safetensors" for name in names]
    for index, file in enumerate(files):
        save_file({"a": torch.zeros(10**index)}, file)
    (directory / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x" * 5000)
    size = sum(files[index].stat().st_size for index in expected)
    assert full_precision_bytes(ModelConfig(path=str(directory), variant=variant)) == size


def download_offline(home, hub_id):
    """Each line that `download` and `full_precision_bytes` end in, without network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, hub_id, REVISION],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, torch_imported = done.stdout.splitlines()
    assert torch_imported == "False"
    return lines


def test_a_hub_model_that_is_not_here_offline(tmp_path):
    lines = download_offline(tmp_path, "someone/some-model")
    assert len(lines) == 2
    for line, why in zip(lines, ("cannot be downloaded", "is not in the hub's cache"), strict=True):
        assert line.startswith(f"someone/some-model {why}")
        assert f"hf download someone/some-model --revision {REVISION} --local-dir models/sdxl`" in line
        assert line.endswith("add `model.hub_id=null model.path=models/sdxl` to this command")


def test_a_hub_id_that_is_none(tmp_path):
    lines = download_offline(tmp_path, "https://huggingface.co/someone/some-model")
    assert lines == ["model.hub_id='https://huggingface.co/someone/some-model' is no hub id; give owner/name"] * 2


def test_a_hub_model_of_the_cache_is_found_offline(tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--some-model" / "snapshots" / REVISION
    pipeline_directory(snapshot)
    size = (snapshot / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert download_offline(tmp_path, "someone/some-model") == [str(snapshot), str(size)]
    assert check_pipeline_directory(snapshot) == snapshot


@pytest.mark.parametrize(("method", "said"), [("vqdm", "by vqdm"), ("bitsandbytes", "by bitsandbytes")])
def test_a_model_that_is_quantized_already_is_refused(method, said, tmp_path):
    directory = pipeline_directory(tmp_path / "model")
    assert check_original(directory) == directory
    (directory / "unet" / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DConditionModel", "quantization_config": {"quant_method": method}})
    )
    with pytest.raises(UserError, match=said):
        local_directory(ModelConfig(path=str(directory)))
