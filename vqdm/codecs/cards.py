"""Cards of all codecs, by the names that their options have in `vqdm/config/codecs.py`."""

from vqdm.codecs.adaround import ADAROUND
from vqdm.codecs.additive import ADDITIVE
from vqdm.codecs.codec import Codec
from vqdm.codecs.gptq import GPTQ
from vqdm.codecs.low_rank import with_low_rank
from vqdm.codecs.rtn import RTN
from vqdm.codecs.trellis import TRELLIS

_CARDS = {
    "rtn": RTN,
    "gptq": GPTQ,
    "svdquant": GPTQ,
    "adaround": ADAROUND,
    "additive": ADDITIVE,
    "trellis": TRELLIS,
}
CODECS: dict[str, Codec] = {kind: with_low_rank(card) for kind, card in _CARDS.items()}
