"""Options for the parts of a pipeline beside its denoiser: text encoders, with their token embeddings, and VAE."""

import dataclasses

from vqdm.config.codecs import QuantizeConfig, parse_scheme
from vqdm.config.ranges import number
from vqdm.errors import UserError


@dataclasses.dataclass
class PartsConfig:
    """Short names of the schemes for a pipeline's other parts; None: they stay as they are."""

    text_encoders: str | None = None  # such as trellis3: CLIP's matrices, calibrated on captions
    embeddings: int = number(8, least=2, most=8)  # bits of their token embeddings, one scale a token
    vae: str | None = None  # such as rtn8: its matrices and convolutions, calibrated on latents
    images: int = number(16, least=1)  # number of calibration captions whose latents calibrate the VAE

    @property
    def given(self) -> bool:
        return self.text_encoders is not None or self.vae is not None

    def codecs(self) -> dict[str, QuantizeConfig]:
        """The codec's options by option name, for the parts that are quantized. UserError, naming it, for no scheme."""
        names = {"text_encoders": self.text_encoders, "vae": self.vae}
        return {key: _codec(key, name) for key, name in names.items() if name is not None}


def _codec(key: str, name: str) -> QuantizeConfig:
    try:
        found = parse_scheme(name)
    except UserError as error:
        raise UserError(f"parts.{key}: {error}") from error
    if found.kind == "adaround":
        raise UserError(f"parts.{key}={name}: block reconstruction is for denoisers; give trellis3, gptq4 or rtn8")
    return found
