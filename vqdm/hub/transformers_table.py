"""vqdm as a quantization method of transformers: text encoders that are saved and loaded by its `from_pretrained`.

`register()` adds it to transformers' tables, where diffusers looks for a pipeline's `quant_backend` too.
PipelineQuantizationConfig(quant_backend="vqdm", …) compares what both libraries' configs take: here they are one class.
Text encoders are quantized by `parts=…`, with captions; asked to do it while loading, vqdm says so.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from vqdm.errors import UserError
from vqdm.hub.checkpoint import Contents, read_contents, round_to_stored_, stored_with_metadata
from vqdm.hub.config import METHOD, VQDMConfig, config_of
from vqdm.hub.quantizer import check_codes, empty_layers
from vqdm.weights.layers import dequantize_layers


class TextEncoderQuantizer(HfQuantizer):
    """The answers that transformers needs while it loads or saves a quantized text encoder."""

    def __init__(self, quantization_config: VQDMConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        if quantization_config.groups is None:
            raise UserError(
                "while loading, vqdm quantizes denoisers, not text encoders: give PipelineQuantizationConfig "
                'components_to_quantize=["unet"] (or ["transformer"]), or quant_mapping={"unet": VQDMConfig(scheme)}; '
                "run.py's parts.text_encoders=trellis3 compresses them with captions"
            )
        self.pre_quantized = True
        self._contents: Contents | None = None
        self._dtype = torch.float32

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The model's dtype, by default float32; scales get it too once they are loaded."""
        self._dtype = torch.float32 if dtype is None else dtype
        return self._dtype

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **_) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        self._contents = read_contents(files)
        self._contents.check_groups(self.quantization_config.layer_groups())
        empty_layers(model, self.quantization_config.layer_groups(), decode=self.quantization_config.decode)
        state = model.state_dict()
        self._contents.check_names(state)
        self._contents.check_shapes(state)
        for file in files:
            self._contents.check_tensors(load_file(file))

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        if self._contents is not None:
            check_codes(model, self._contents.where)
        self._contents = None
        return nn.Module.to(model, dtype=self._dtype)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        return stored_with_metadata(model.state_dict(), self.quantization_config.layer_groups())

    def _dequantize(self, model: nn.Module, dtype=None) -> nn.Module:
        return dequantize_layers(model)

    def is_serializable(self, **_) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def attach_text_encoder(model: nn.Module) -> None:
    """Prepare a model of transformers with quantized layers so that its save_pretrained writes it as quantized.

    All its floats are rounded to 16 bit, as they are stored.
    """
    round_to_stored_(model)
    config = config_of(model, decode="per_call")
    model.hf_quantizer = TextEncoderQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method


def register() -> None:
    """Add the method to transformers' tables."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = TextEncoderQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = VQDMConfig


register()
