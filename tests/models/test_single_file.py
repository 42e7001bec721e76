import gzip
import importlib.util
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
)
from safetensors.torch import load_file, save_file
from unets import SDXL, small_unet

from vqdm.errors import UserError
from vqdm.models import single_file
from vqdm.models.original_keys import COMPONENTS, to_original
from vqdm.models.shipped import builtin_directory, shipped_configs
from vqdm.models.single_file import (
    clip_tokenizer,
    component_on_meta,
    default_configs,
    denoiser_bytes,
    load_single_file,
)

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
TINY = builtin_directory("tiny")
SHIPPED = ("sdxl", "sdxl_turbo")
CAPTIONS = ("a photo of a cat", "Hello, World; it's 2024", "naïve café — 日本 x", "  TWO   dogs\non a (red) sofa. ")
ATTENTION = "first_stage_model.encoder.mid.attn_1.q.weight"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import to_single_file

        yield to_single_file
        sys.modules.pop("to_single_file")


@pytest.fixture(scope="module")
def file(script, tmp_path_factory):
    """The tiny pipeline, in 16 bit as it is shipped."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    script.write_single_file(TINY, path, dtype=torch.float16)
    assert [path.name] == [p.name for p in path.parent.iterdir()]
    return path


@pytest.fixture(scope="module")
def tiny():
    return DiffusionPipeline.from_pretrained(TINY, dtype=torch.float32, local_files_only=True)


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to connect fails, and the hub's offline switch does not hide one."""

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def changed(file, path, *, without=(), **extra):
    weights = {key: w for key, w in load_file(file).items() if not key.startswith(tuple(without) or "\0")}
    save_file(weights | {key.replace("__", "."): w for key, w in extra.items()}, path)
    return path


def assert_same(pipeline, other):
    for name in COMPONENTS:
        found, expected = getattr(pipeline, name).state_dict(), getattr(other, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not getattr(pipeline, name).training


def error_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def load_error(path, configs=TINY):
    message = error_of(load_single_file, path, configs=configs, dtype=torch.float32)
    assert str(path) in message or str(configs) in message
    return message


def test_the_tiny_pipeline_comes_back_bit_for_bit_and_offline(file, tiny, no_network):
    pipeline = load_single_file(file, configs=TINY, dtype=torch.float32)
    assert_same(pipeline, tiny)
    assert type(pipeline) is type(tiny)
    assert pipeline.scheduler.config == tiny.scheduler.config
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(pipeline, name)("a red cat").input_ids == getattr(tiny, name)("a red cat").input_ids


def test_surplus_keys_and_other_layouts_do_no_harm(file, tiny, tmp_path):
    surplus = {
        "conditioner__embedders__0__transformer__text_model__embeddings__position_ids": torch.arange(24)[None],
        "conditioner__embedders__1__model__logit_scale": torch.tensor(4.6),
        "denoiser__sigmas": torch.ones(1000),
        ATTENTION: load_file(file)[ATTENTION][:, :, 0, 0].contiguous(),
    }
    path = changed(file, tmp_path / "x.safetensors", **surplus)
    assert_same(load_single_file(path, configs=TINY, dtype=torch.float32), tiny)


def test_the_dtype_is_that_asked_for(file):
    pipeline = load_single_file(file, configs=TINY, dtype=torch.bfloat16)
    for name in COMPONENTS:
        assert {weight.dtype for weight in getattr(pipeline, name).parameters()} == {torch.bfloat16}


def test_denoiser_bytes_are_those_of_its_tensors(file, tiny):
    assert denoiser_bytes(file) == 2 * sum(weight.numel() for weight in tiny.unet.parameters())


def test_the_command_writes_the_file(script, file, tmp_path, monkeypatch, capsys):
    for option, size in (("--fp16", 2), (None, 4)):
        path = tmp_path / f"{size}.safetensors"
        monkeypatch.setattr(sys, "argv", ["x", str(TINY), str(path), *([option] if option else [])])
        script.main()
        assert f"wrote {path}" in capsys.readouterr().out
        weights = load_file(path)
        assert {weight.element_size() for weight in weights.values()} == {size}
        assert all(torch.equal(weight.half(), weights[key].half()) for key, weight in load_file(file).items())


def test_the_command_refuses_in_one_line(script, tmp_path):
    assert "must be named" in error_of(script.write_single_file, TINY, tmp_path / "x.ckpt", dtype=torch.float16)
    path = tmp_path / "x.safetensors"
    assert "is no directory" in error_of(script.write_single_file, tmp_path / "none", path, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 3},
        {"layers_per_block": 2, "transformer_layers_per_block": (1, 2)},
        {
            "layers_per_block": 2,
            "block_out_channels": (16, 32, 32, 48),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            "use_linear_projection": False,
        },
    ],
)
def test_other_block_structures_convert_back(changes):
    unet = small_unet(**changes)
    original = to_original("unet", unet.state_dict(), unet.config)
    assert len(original) == len(unet.state_dict())
    back = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert back.keys() == unet.state_dict().keys()
    assert all(torch.equal(back[key], weight) for key, weight in unet.state_dict().items())


def test_what_the_original_format_has_no_name_for_is_refused():
    unet = small_unet()
    assert "no name in the original" in error_of(to_original, "unet", {"ip_adapter.x.weight": None}, unet.config)
    uneven = small_unet(layers_per_block=(1, 2))
    assert "layers_per_block" in error_of(to_original, "unet", uneven.state_dict(), uneven.config)


@torch.no_grad()
def test_open_clip_itself_takes_the_second_text_encoder(tiny):
    from open_clip.model import CLIPTextCfg, _build_text_tower

    ours = tiny.text_encoder_2
    settings = ours.config
    shape = CLIPTextCfg(
        context_length=settings.max_position_embeddings,
        vocab_size=settings.vocab_size,
        width=settings.hidden_size,
        heads=settings.num_attention_heads,
        layers=settings.num_hidden_layers,
        mlp_ratio=settings.intermediate_size / settings.hidden_size,
    )
    theirs = _build_text_tower(settings.projection_dim, shape).eval()
    original = to_original("text_encoder_2", ours.state_dict(), settings)
    theirs.load_state_dict({key.removeprefix(COMPONENTS["text_encoder_2"][0]): w for key, w in original.items()})
    ids = tiny.tokenizer_2(["a red circle", "blue"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(theirs(ids), ours(ids).text_embeds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_those_of_sdxl(name):
    configs = shipped_configs(name)
    counts = {part: sum(w.numel() for w in component_on_meta(configs / part).parameters()) for part in COMPONENTS}
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    settings = json.loads((configs / "unet" / "config.json").read_text())
    assert settings | json.loads(json.dumps(SDXL)) == settings | {"sample_size": 128}
    assert settings["sample_size"] == {"sdxl": 128, "sdxl_turbo": 64}[name]


def test_sdxl_has_the_keys_that_diffusers_takes_for_sdxl():
    configs = shipped_configs("sdxl")
    file = {}
    for part in COMPONENTS:
        module = component_on_meta(configs / part)
        file |= to_original(part, module.state_dict(), module.config)
    assert infer_diffusers_model_type(file) == "xl_base"
    assert file["model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"].shape == (640, 2048)
    assert file["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    for part, convert in {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}.items():
        module = component_on_meta(configs / part)
        back = convert(config=dict(module.config), checkpoint=file)
        assert {k: w.shape for k, w in back.items()} == {k: w.shape for k, w in module.state_dict().items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_schedulers_load(name):
    import diffusers

    index = json.loads((shipped_configs(name) / "model_index.json").read_text())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(shipped_configs(name), subfolder="scheduler")
    expected = {"sdxl": ("Euler", "leading"), "sdxl_turbo": ("EulerAncestral", "trailing")}[name]
    assert (type(scheduler).__name__.removesuffix("DiscreteScheduler"), scheduler.config.timestep_spacing) == expected


def test_clip_tokenizers_have_open_clips_ids(no_network):
    from open_clip.tokenizer import SimpleTokenizer

    reference = SimpleTokenizer()
    for part, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        contents = {(shipped_configs(name) / part / "tokenizer_config.json").read_bytes() for name in SHIPPED}
        assert len(contents) == 1
        tokenizer = clip_tokenizer(shipped_configs("sdxl") / part)
        assert len(tokenizer) == 49408
        for caption in CAPTIONS:
            ids = [49406, *reference.encode(caption), 49407]
            assert tokenizer(caption).input_ids == ids
            padded = tokenizer(caption, padding="max_length", truncation=True).input_ids
            assert padded == ids + [pad] * (77 - len(ids))
        assert len(tokenizer("cat " * 100, padding="max_length", truncation=True).input_ids) == 77


def test_the_second_tokenizer_reads_exclamation_marks_as_padding():
    """As the hub's does, whose padding token is "!"; only the first one has CLIP's own id for it."""
    first, second = (clip_tokenizer(shipped_configs("sdxl") / part) for part in ("tokenizer", "tokenizer_2"))
    assert first("wow!").input_ids == [49406, 2781, 256, 49407]
    assert second("wow!").input_ids == [49406, 2781, 0, 49407]


def test_clips_merges_are_all_there():
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    lines = gzip.decompress((package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    used = 49152 - 256 - 2  # of its merges, as in open_clip's SimpleTokenizer
    assert gzip.decompress(single_file.MERGES.read_bytes()).decode() == "\n".join([*lines[: 1 + used], ""])
    last = "".join(lines[used].split())
    assert clip_tokenizer(shipped_configs("sdxl") / "tokenizer").convert_tokens_to_ids(last) == 49405


def test_unknown_shipped_configs():
    assert "there are sdxl, sdxl_turbo" in error_of(shipped_configs, "sd15")
    assert "there are sdxl, sdxl_turbo" in error_of(shipped_configs, "..")


def test_default_configs_are_the_first_that_fit(file, tmp_path, monkeypatch):
    message = error_of(default_configs, file)
    assert "none of the shipped configs (sdxl, sdxl_turbo)" in message
    assert "weights are missing, first model.diffusion_model." in message
    configs = tmp_path / "configs"
    for name in ("b", "a"):
        shutil.copytree(TINY, configs / name, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(shipped_configs("sdxl"), configs / "0_other")
    monkeypatch.setattr("vqdm.models.shipped.CONFIGS", configs)
    monkeypatch.setattr("vqdm.models.single_file.CONFIGS", configs)
    assert default_configs(file) == configs / "a"
    for key in ("v_pred", "edm_mean", "edm_vpred.sigma_max", "ztsnr"):
        path = changed(file, tmp_path / "trained.safetensors", **{key: torch.ones(1)})
        assert f"({key}); give model.configs" in error_of(default_configs, path)


def test_sdxl_is_chosen_for_sdxls_shapes(file, monkeypatch):
    shapes = single_file._expected_shapes(shipped_configs("sdxl_turbo"))
    monkeypatch.setattr(single_file, "_shapes", lambda _: shapes)
    assert default_configs(file) == shipped_configs("sdxl")


def test_files_that_are_no_safetensors(file, tmp_path):
    assert "no file" in load_error(tmp_path / "none.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    assert "only safetensors" in load_error(tmp_path / "x.ckpt")
    shutil.copy(tmp_path / "x.ckpt", tmp_path / "pickle.safetensors")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    content = file.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    for name in ("pickle", "empty", "pointer", "half"):
        assert "no whole safetensors file" in load_error(tmp_path / f"{name}.safetensors")
        error_of(default_configs, tmp_path / f"{name}.safetensors")
        error_of(denoiser_bytes, tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ((), "keys such as none"),
        (("first_stage_model.encoder.conv_in.weight",), "keys such as first_stage_model"),
        (
            (
                "model.diffusion_model.input_blocks.0.0.weight",
                "cond_stage_model.transformer.text_model.embeddings.position_ids",
            ),
            "Stable Diffusion 1",
        ),
        (("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.ln_final.bias"), "Diffusion 2"),
        (("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.bias"), "refiner"),
        (("model.diffusion_model.joint_blocks.0.x",), "Stable Diffusion 3"),
        (("double_blocks.0.img_attn.qkv.weight",), "Flux"),
        (("lora_unet_down_blocks_0.alpha",), "a LoRA"),
        (("down_blocks.0.resnets.0.conv1.weight",), "diffusers' own names"),
    ],
)
def test_other_checkpoints_are_named(keys, found, tmp_path):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "x.safetensors")
    for message in (load_error(tmp_path / "x.safetensors"), error_of(default_configs, tmp_path / "x.safetensors")):
        assert "is no SDXL-type checkpoint" in message
        assert found in message


def test_missing_and_misshapen_weights_are_named(file, tmp_path):
    path = tmp_path / "x.safetensors"
    message = load_error(changed(file, path, without=["model.diffusion_model.out.2.bias"]))
    assert "1 of " in message
    assert "first model.diffusion_model.out.2.bias" in message
    for component, prefix in (("vae", "first_stage_model."), ("text_encoder_2", "conditioner.embedders.1.")):
        message = load_error(changed(file, path, without=[prefix]))
        assert f"has no weights of the {single_file.PARTS[component]}: give a file" in message
    message = load_error(changed(file, path, **{"model.diffusion_model.out.2.bias": torch.zeros(9)}))
    assert "model.diffusion_model.out.2.bias is [9] instead of [4] (1 shapes differ)" in message
    message = load_error(changed(file, path, **{"model.diffusion_model.out.2.bias": torch.zeros(4).byte()}))
    assert "U-Net of U8" in message


def test_configs_that_do_not_fit(file, tmp_path):
    assert "weights are missing" in load_error(file, shipped_configs("sdxl"))
    assert "has no model_index.json, scheduler" in load_error(file, tmp_path)

    def edited(name, part, content):
        shutil.copytree(TINY, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / name / part).write_text(content)
        return tmp_path / name

    encoder = (TINY / "text_encoder" / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 128')
    assert "128 wide" in load_error(file, edited("wide", "text_encoder/config.json", encoder))
    assert "is not JSON" in load_error(file, edited("broken", "unet/config.json", "{"))
    assert "names no model" in load_error(file, edited("nameless", "text_encoder/config.json", "{}"))
    assert "cannot load from a single file" in load_error(file, edited("index", "model_index.json", "{}"))
