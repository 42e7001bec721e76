"""The denoiser as another library quantizes it, in place of the quantize stage: its file, bits and output error."""

import shutil
from pathlib import Path

from vqdm.config.codecs import PeerConfig
from vqdm.hub.peers import load_by_peer, made_by, peer_bits, quantize_by_peer
from vqdm.stages.finished import write_errors
from vqdm.stages.layout import DENOISER


def quantize_as_peer(directory: Path, denoiser, calibration: Path, *, config: PeerConfig, device: str) -> dict:
    """Fill the stage's directory: `denoiser/`. Returns bits and bytes by our rule, output error, and who made it.

    denoiser: full precision. calibration: that stage's directory; the error is on its calls. NotRunHere where the
    library refuses.
    """
    for leftover in (directory / DENOISER, full := directory / "full"):
        shutil.rmtree(leftover, ignore_errors=True)
    quantize_by_peer(denoiser, directory / DENOISER, full=full, config=config)
    shutil.rmtree(full, ignore_errors=True)
    dtype = next(denoiser.parameters()).dtype
    loaded = load_by_peer(directory / DENOISER, dtype=dtype, config=config)
    error = write_errors(directory, loaded.to(device), calibration, device=device)
    return {**peer_bits(directory / DENOISER, denoiser), "relative_output_error": error, "made_by": made_by(config)}
