"""Drawn models: the same from the same seed, whole after a stop, and pipelines like any other."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.errors import UserError
from vqdm.models import drawn
from vqdm.models.drawn import drawn_identity, make_drawn
from vqdm.models.loader import load_pipeline, sample
from vqdm.models.location import model_identity
from vqdm.models.shipped import builtin_directory, shipped_configs
from vqdm.runs.files import files_below, sha256_file
from vqdm.seeds import torch_generator

TINY = builtin_directory("tiny")


def hashes(directory):
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files_below(directory)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_drawn(TINY, tmp_path_factory.mktemp("models") / "drawn", seed=0)


def test_a_drawn_model_samples(made):
    sampler = SamplerConfig(steps=1)
    config = ModelConfig(path=str(made), configs=str(TINY), random_seed=0, dtype="bfloat16", sampler=sampler)
    pipeline = load_pipeline(config, device="cpu")
    for name, tensor in load_file(made / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, pipeline.unet.state_dict()[name])
        if tensor.ndim > 1:  # the variance of torch's own start
            assert float(tensor.float().var()) * 3 * tensor[0].numel() == pytest.approx(1, rel=0.3)
    (image,) = sample(pipeline, ["noise"], sampler=sampler, generators=[torch_generator(0, "image")])
    assert image.size == (32, 32)


def test_what_was_stopped_goes_on_and_gives_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "SHARD", 1 << 20)
    place, written = tmp_path / "drawn", drawn.atomic_write

    def stop(path, data):
        if len(list(files_below(place / "unet"))) == 2:
            raise KeyboardInterrupt
        written(path, data)

    monkeypatch.setattr(drawn, "atomic_write", stop)
    with pytest.raises(KeyboardInterrupt):
        make_drawn(TINY, place, seed=0)
    assert not (place / "model_index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in files_below(place) if path.suffix == ".safetensors"}
    assert len(before) > 1
    damaged = min(before)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setattr(drawn, "atomic_write", written)
    make_drawn(TINY, place, seed=0)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != damaged)
    shards = [load_file(path) for path in sorted((place / "unet").glob("*-of-*.safetensors"))]
    whole = load_file(made / "unet" / "diffusion_pytorch_model.safetensors")
    assert len(shards) > 5 and sorted(name for shard in shards for name in shard) == sorted(whole)
    assert all(torch.equal(tensor, whole[name]) for shard in shards for name, tensor in shard.items())
    config = ModelConfig(path=str(place), configs=str(TINY), random_seed=0, dtype="bfloat16")
    unet = load_pipeline(config, device="cpu").unet.state_dict()
    assert all(torch.equal(unet[name], tensor) for name, tensor in whole.items())


def test_the_identity_needs_no_files(made, tmp_path):
    def config(path, seed=0):
        return ModelConfig(path=str(path), configs=str(TINY), random_seed=seed)

    known = model_identity(config(made), cache=tmp_path / "cache")
    assert model_identity(config(tmp_path / "absent"), cache=tmp_path / "cache") == known == drawn_identity(TINY, 0)
    assert model_identity(config(made, seed=1), cache=tmp_path / "cache") != known
    assert not (tmp_path / "absent").exists()


def test_another_seed_takes_the_place_of_drawn_weights_and_of_no_others(made, tmp_path):
    place = shutil.copytree(made, tmp_path / "drawn")
    make_drawn(TINY, place, seed=1)
    changed = {name for name, sha in hashes(place).items() if sha != hashes(made)[name]}
    assert changed == {name for name in hashes(made) if name.endswith(".safetensors")}
    trained = shutil.copytree(TINY, tmp_path / "trained")
    with pytest.raises(UserError, match="not drawn"):
        make_drawn(TINY, trained, seed=0)
    assert {name: sha for name, sha in hashes(trained).items() if name != ".lock"} == hashes(TINY)


def test_a_full_disk_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 10_000_000))
    with pytest.raises(UserError, match=r"0\.01 GB on disk, where 0\.01 GB are free: free space"):
        make_drawn(TINY, tmp_path / "drawn", seed=0)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sdxl_takes_what_its_configuration_says(tmp_path):
    files = list(drawn._files(shipped_configs("sdxl"), tmp_path))
    assert sum(file.bytes for file in files) == 6_937_675_734  # 3,468,837,867 numbers of U-Net, text encoders and VAE
    assert max(file.bytes for file in files) <= drawn.SHARD
