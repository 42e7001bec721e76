"""Golden checkpoints: small quantized U-Nets of every codec, made once, which every later version has to load alike.

python scripts/make_golden.py [--kinds rtn gptq …] [--folder tests/golden]

Per kind a folder: config.json, diffusion_pytorch_model.safetensors, and decoded.json, the sha256 of every decoded
layer by the reader of tests/format_reader.py. A folder that is there is never made again: a new version of the format
gets new folders (--folder), and the old ones stay to be loaded.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from torch import Tensor, nn

import vqdm  # noqa: F401  (before diffusers: the torchvision cure)
from vqdm.acceleration.activations import add_quantizers, input_quantizers
from vqdm.acceleration.operators import remove
from vqdm.acceleration.stored_cache import Schedule, StoredCache, store_cache
from vqdm.codecs import additive, gptq, low_rank, rtn, trellis
from vqdm.codecs.adaround import SoftRounding
from vqdm.codecs.trellis_table import load_table
from vqdm.errors import UserError
from vqdm.hub.card import CARD_FILE
from vqdm.hub.quantizer import attach
from vqdm.models.specs import LayerSpec, layer_specs, weight_to_matrix
from vqdm.runs.files import write_json
from vqdm.seeds import torch_generator
from vqdm.weights.base import QuantizedWeight, SharedPart
from vqdm.weights.layers import quantized_layers, swap
from vqdm.weights.trellis import TrellisTable

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# tests/golden/trellis holds wide columns, which the encoder no longer gives to layers of so few outputs
KINDS = (
    "rtn",
    "gptq",
    "adaround",
    "adaround_split",
    "additive",
    "shared",
    "trellis_byte",
    "beside",
    "low_rank",
    "rounded",
)
CODEBOOKS = {"num_codebooks": 2, "codebook_bits": 3, "group_size": 8}
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "time_embedding_dim": 16,
    "use_linear_projection": True,
}


def drawn_unet(name: str) -> nn.Module:
    """The U-Net of the golden files, with weights and biases drawn by a generator of its own."""
    from diffusers import UNet2DConditionModel

    unet, generator = UNet2DConditionModel(**UNET), torch_generator(0, "golden", name)
    for key, parameter in unet.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        center = float("norm" in key and key.endswith("weight"))
        parameter.data = (center + scale * torch.randn(parameter.shape, generator=generator)).half().float()
    return unet.eval().requires_grad_(False)


def encoded(kind: str, matrix: Tensor, spec: LayerSpec, shared: SharedPart | None) -> QuantizedWeight:
    """One layer [out, in] by a codec; what stands for calibration data is drawn."""
    generator = torch_generator(0, f"golden {kind}", spec.name)
    inputs = torch.randn(2 * matrix.shape[1], matrix.shape[1], generator=generator)
    hessian = inputs.T @ inputs
    if kind in ("rtn", "beside", "rounded"):
        return rtn.encode(matrix, bits=3)
    if kind == "gptq":
        return gptq.encode(matrix, hessian, bits=3, group_size=16)
    if kind in ("adaround", "adaround_split"):
        split = spec.split if kind == "adaround_split" else None
        grid = rtn.encode(matrix, bits=2) if split is None else rtn.encode_split(matrix, split, bits=2)
        grid.scheme = dataclasses.replace(grid.scheme, codec="adaround")
        return SoftRounding(matrix, grid).hardened()
    if kind == "low_rank":
        return beside_branch(matrix, hessian, shared if spec.kind == "conv" else None)
    if kind == "trellis_byte":
        return trellis.encode(matrix, hessian, bits=3.25, table=shared)
    if kind == "additive":
        return additive.encode(matrix, hessian, generator=generator, input_scales=True, **CODEBOOKS)
    return additive.encode(matrix, hessian, generator=generator, shared=shared, **CODEBOOKS)


def beside_branch(matrix: Tensor, hessian: Tensor, table: TrellisTable | None) -> QuantizedWeight:
    """A branch beside trellis codes or, without a table, beside scalar codes with input scales."""
    if table is None:
        return low_rank.encode_with_branch(
            matrix, hessian, rank=2, code=lambda w, h: gptq.encode(w, h, bits=3), codec="svdquant", smoothing=0.5
        )
    return low_rank.encode_with_branch(
        matrix, hessian, rank=1, code=lambda w, h: trellis.encode(w, h, bits=3.25, table=table), codec="trellis"
    )


def golden_unet(kind: str) -> nn.Module:
    """Every layer that can be, quantized."""
    unet, shared = drawn_unet(kind), None
    specs = layer_specs(unet)
    matrices = {spec.name: weight_to_matrix(unet.get_submodule(spec.name).weight.detach()) for spec in specs}
    if kind == "shared":
        generator = torch_generator(0, "golden", "codebooks")
        shared = additive.train_shared_codebooks(matrices.values(), generator=generator, **CODEBOOKS)
    if kind in ("trellis_byte", "low_rank"):
        shared = TrellisTable.from_values(load_table())
    for spec in specs:
        swap(unet, spec, encoded(kind, matrices[spec.name], spec, shared))
    if kind in ("beside", "rounded"):
        remove(unet, ["down_blocks.0.attentions.0.transformer_blocks.0.attn2"])
        store_cache(unet, golden_cache())
    if kind == "rounded":
        round_inputs(unet)
    return unet


def round_inputs(unet: nn.Module) -> None:
    """Static grids of 6 bits before every quantized layer, for three groups of channels, from drawn ranges."""
    settings = {"kind": "static", "bits": 6, "per": "groups", "block": 16, "groups": 3, "column_scales": False}
    add_quantizers(unet, list(quantized_layers(unet)), settings)
    for name, quantizer in input_quantizers(unet).items():
        least, most = torch.randn(2, quantizer.channels, generator=torch_generator(0, "golden ranges", name)).abs()
        quantizer.fit(-least, most)


def golden_cache() -> StoredCache:
    """A cache of eight calls with drawn corrections."""
    stored = StoredCache(Schedule("DDIMScheduler", 8, tuple(range(8, 0, -1)), (0, 2, 5), 1, "linear"), 16)
    generator = torch_generator(0, "golden", "cache")
    stored.scales.add_(0.1 * torch.randn(8, 16, generator=generator))
    stored.shifts.add_(0.1 * torch.randn(8, 16, generator=generator))
    return stored


def make(kind: str, folder: Path) -> None:
    """UserError if it was made before."""
    sys.path.insert(0, str(ROOT / "tests"))
    from format_reader import fingerprint, read

    if folder.exists():
        raise UserError(f"{folder} is there: a golden checkpoint is made once, for ever; give another --folder")
    unet = golden_unet(kind)
    attach(unet)
    unet.save_pretrained(folder)
    (folder / CARD_FILE).unlink()
    decoded = read(folder / WEIGHTS_FILE)
    write_json(folder / "decoded.json", {name: fingerprint(weight) for name, weight in sorted(decoded.items())})
    print(f"{kind}: {len(decoded)} layers, {(folder / WEIGHTS_FILE).stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, default=ROOT / "tests" / "golden")
    arguments = parser.parse_args()
    try:
        for kind in arguments.kinds:
            make(kind, arguments.folder / kind)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
