"""Other libraries' quantization: its bits by our rule, the same numbers after loading, refusals in their words."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny_world import FEW, ROOT, run

from vqdm.config.codecs import PEERS, PeerConfig
from vqdm.errors import NotRunHere, UserError
from vqdm.hub.peers import load_by_peer, peer_bits, quantize_by_peer

MODEL = ROOT / "vqdm" / "models" / "tiny" / "unet"


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(MODEL, torch_dtype=torch.float32)


def made(tmp_path, unet, **options):
    """(the denoiser as a peer saves and loads it, its directory)"""
    config = PeerConfig(**options)
    pytest.importorskip({"quanto": "optimum.quanto"}.get(config.library, config.library))
    config.check()
    quantize_by_peer(unet, tmp_path / "made", full=tmp_path / "full", config=config)
    loaded = load_by_peer(tmp_path / "made", dtype=torch.float32, config=config)
    return loaded, tmp_path / "made"


def test_bits_count_every_tensor_once_with_floats_in_16_bit(tmp_path):
    original = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 32), "b": torch.nn.Linear(64, 8, bias=False)})
    stored = {
        "a.weight": torch.zeros(64 * 32 // 2, dtype=torch.uint8),  # two codes of 4 bits a byte
        "a.scale": torch.ones(32, 1),  # 32 bits in the file, 16 in the count
        "a.bias": torch.zeros(32),
        "b.weight": torch.zeros(8, 64),
    }
    save_file(stored, tmp_path / "model.safetensors")
    coded, plain = 1024 + 2 * 32, 2 * 32 + 2 * 512
    found = peer_bits(tmp_path, original)
    assert found["bytes"] == found["file_bytes"] == coded + plain
    assert found["bits_quantized"] == 8 * coded / 2048
    assert found["bits_per_weight"] == 8 * (coded + plain) / (2048 + 32 + 512)


@pytest.mark.slow
def test_sdnq_stores_what_its_codes_and_scales_take(tmp_path):
    unet = tiny_unet()
    loaded, directory = made(tmp_path, unet, library="sdnq", weights="uint4")
    named = loaded.state_dict()
    codes = {name: tensor for name, tensor in named.items() if tensor.dtype == torch.uint8}
    assert codes
    expected = sum(tensor.numel() * (1 if name in codes else 2) for name, tensor in named.items())
    assert peer_bits(directory, unet)["bytes"] == expected
    weights = sum(unet.get_parameter(name).numel() for name in codes)
    assert sum(tensor.numel() for tensor in codes.values()) == weights / 2


def test_gguf_rounds_whole_blocks_and_loads_as_its_own_numbers(tmp_path):
    gguf = pytest.importorskip("gguf")
    unet = tiny_unet()
    loaded, directory = made(tmp_path, unet, library="gguf", weights="Q4_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(directory / "denoiser.gguf").tensors}
    name = "mid_block.resnets.0.time_emb_proj"
    assert tensors[f"{name}.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    values = torch.randn(3, unet.get_submodule(name).in_features, generator=torch.Generator().manual_seed(0))
    weight = torch.from_numpy(gguf.quants.dequantize(tensors[f"{name}.weight"].data, gguf.GGMLQuantizationType.Q4_0))
    bias = unet.get_submodule(name).bias.half().float()
    expected = values @ weight.T + bias  # diffusers multiplies codes and scales in fp16
    torch.testing.assert_close(loaded.get_submodule(name)(values), expected, rtol=2e-3, atol=2e-3)
    found = peer_bits(directory, unet)
    assert found["bits_quantized"] == 4.5  # 32 codes of 4 bits and a scale of 16 a block
    assert found["bits_per_weight"] > 4.5


def test_what_is_not_installed_or_refused_is_not_run(tmp_path, monkeypatch):
    config = PeerConfig(library="bitsandbytes", weights="nf4")
    monkeypatch.setattr("vqdm.hub.peers.installed_version", lambda package: None)
    with pytest.raises(NotRunHere, match=r"bitsandbytes is not installed: pip install 'vqdm\[peers\]'"):
        quantize_by_peer(tiny_unet(), tmp_path / "made", full=tmp_path / "full", config=config)
    pytest.importorskip("gguf")
    monkeypatch.undo()
    config = PeerConfig(library="gguf", weights="Q2_K")
    with pytest.raises(NotRunHere, match=r"gguf-Q2_K: gguf [0-9.]+ says: "):
        quantize_by_peer(tiny_unet(), tmp_path / "made", full=tmp_path / "full", config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"library": "torchao", "weights": "uint4"}, "quantize.weights='uint4' is not one of int4, int8 for torchao"),
        ({"bits": 3}, "quantize.bits=3 is not for quantize=peer: quantize.weights says the type"),
        ({"library": "gguf", "weights": "Q4_0", "svd": True}, "quantize.svd=true is an option of sdnq"),
        ({"library": "llama"}, f"is not one of {', '.join(PEERS)}"),
    ],
)
def test_options_that_make_no_sense_are_one_line(options, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        PeerConfig(**options).check()


@pytest.mark.slow
def test_a_row_that_a_library_refuses_stays_not_run_with_its_reason(tmp_path):
    """Here there is no bitsandbytes, or no GPU for it."""
    if torch.cuda.is_available():
        pytest.skip("bitsandbytes may run here")
    done = run("table=peers_tiny", "row=peers_nf4", f"results_dir={tmp_path}", *FEW)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables" / "peers_tiny.md").read_text()
    assert "- bitsandbytes NF4: not run: bitsandbytes-nf4: bitsandbytes" in text
    cells = next(line for line in text.splitlines() if line.startswith("| bitsandbytes NF4")).split("|")
    assert [cell.strip() for cell in cells[-3:-1]] == ["not run", "not run"]
