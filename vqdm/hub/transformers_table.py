"""Put vqdm's name into transformers' tables, where diffusers looks for a pipeline's `quant_backend` too.

PipelineQuantizationConfig(quant_backend="vqdm", …) compares what both libraries' configs take: here they are one class.
Text encoders are no denoisers: asked to quantize one, vqdm says how to leave it out.
"""

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from vqdm.errors import UserError
from vqdm.hub.config import METHOD, VQDMConfig


class NoTextEncoders(HfQuantizer):
    """Refuse to quantize a model of transformers."""

    def __init__(self, quantization_config: VQDMConfig, **kwargs):
        raise UserError(
            "vqdm quantizes denoisers, not text encoders: give PipelineQuantizationConfig "
            'components_to_quantize=["unet"] (or ["transformer"]), or quant_mapping={"unet": VQDMConfig(scheme)}'
        )

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, **kwargs) -> bool:
        return False


def register() -> None:
    """Add the method to transformers' tables."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = NoTextEncoders
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = VQDMConfig


register()
