"""Cards of all codecs, by the names that their options have in `vqdm/config/codecs.py`."""

from vqdm.codecs.adaround import ADAROUND
from vqdm.codecs.additive import ADDITIVE
from vqdm.codecs.codec import Codec
from vqdm.codecs.gptq import GPTQ
from vqdm.codecs.rtn import RTN
from vqdm.codecs.trellis import TRELLIS

CODECS: dict[str, Codec] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "adaround": ADAROUND,
    "additive": ADDITIVE,
    "trellis": TRELLIS,
}
