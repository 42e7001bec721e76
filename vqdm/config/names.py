"""Short names of quantizers: rtn4, rtn4g64, gptq3, trellis2.5, vq3, 3x8g8."""

import re

from vqdm.config.checks import check_quantize
from vqdm.config.options import QuantizeConfig
from vqdm.errors import UserError

_SCHEME = re.compile(r"(?P<kind>rtn|gptq|adaround|trellis|vq)(?P<bits>\d+(?:\.\d+)?)(?:g(?P<group>\d+))?")
_CODEBOOKS = re.compile(r"(?P<count>\d+)x(?P<width>\d+)g(?P<group>\d+)")
_PRESETS = {  # as in conf/quantize/
    "gptq": {"clip": "hessian", "damping": 0.001},
    "adaround": {"batch_size": 16},
    "vq": {"kind": "additive", "group_size": 8},
}


def parse_scheme(name: str) -> QuantizeConfig:
    """The quantizer that a short name stands for: rtn4, rtn4g64, gptq3, trellis2.5, vq3, or 3x8g8 (codebooks × bits).

    The same settings as the presets of conf/quantize/. UserError for any other name.
    """
    if found := _SCHEME.fullmatch(name):
        group = {} if found["group"] is None else {"group_size": int(found["group"])}
        options = {"kind": found["kind"]} | _PRESETS.get(found["kind"], {}) | group | {"bits": float(found["bits"])}
    elif found := _CODEBOOKS.fullmatch(name):
        count, width, group_size = (int(number) for number in found.groups())
        options = {"kind": "additive", "codebook_bits": width, "group_size": group_size}
        options["bits"] = count * width / max(1, group_size)
    else:
        raise UserError(f"{name!r} is no scheme; give one like trellis3, trellis2.5, 3x8g8, vq3, gptq4 or rtn4g64")
    config = QuantizeConfig(**options)
    check_quantize(config)
    return config
