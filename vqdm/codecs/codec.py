"""The card that describes a codec, at the foot of its file; `cards.py` has them all."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vqdm.models.specs import LayerSpec
from vqdm.weights.base import QuantizedWeight, Scheme, SharedPart
from vqdm.weights.scalar import ScalarScheme

Harm = dict[str, dict[float, float]]  # layer -> {its bits per weight: harm done when it alone is quantized to them}
Shape = tuple[int, int]  # [out, in]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A codec's functions, which take its own options, a class of `vqdm/config/codecs.py`, as `config`.

    A codec makes its weights layer by layer (`encode`) or block by block (`by_blocks`). Layers get their schemes from
    `scheme`, one at a time, or from `assign`, all at once.
    """

    # (weight fp32 [out, in], hessian [in, in] or None, scheme, *, config, shared, layer): one layer; draws are seeded
    # by config.seed and the layer's name
    encode: Callable[..., QuantizedWeight] | None = None
    # (layer, config)
    scheme: Callable[[LayerSpec, Any], Scheme] | None = None
    # (layers, config, harm or None): for every layer its scheme, or the reason why it stays in 16 bit
    assign: Callable[[list[LayerSpec], Any, Harm | None], dict[str, Scheme | str]] | None = None
    # (config): True if encode takes the second moments of the layer's inputs
    needs_hessian: Callable[[Any], bool] = lambda config: False
    # (config): True if weights alone will do; a codec that needs Hessians then gets the identity
    data_free: Callable[[Any], bool] = lambda config: False
    # (shape, config): what one worker holds while it encodes, without the Hessian it is given, with the matrix
    encoder_bytes: Callable[[Shape, Any], float] | None = None
    # (shape, config): how long a layer takes, in any unit; only the layers' proportions count, for the time left
    effort: Callable[[Shape, Any], float] = lambda shape, config: shape[0] * shape[1]
    # (matrices of the layers that share, their scheme, config): the part that they decode with
    make_shared: Callable[[Iterable[Tensor], Any, Any], SharedPart] | None = None
    # (layer, code bits per weight): the scheme to measure its harm at, None where it has none; for allocation by harm
    scheme_at: Callable[[LayerSpec, float], Scheme | None] | None = None
    # (student, teacher, layers, recorded calls, *, config, stored, progress, directory): as `adaround.quantize_blocks`
    by_blocks: Callable[..., Iterator] | None = None

    def schemes(self, specs: list[LayerSpec], config, harm: Harm | None = None) -> dict[str, Scheme | str]:
        """Schemes of the layers by name, or the reasons why they stay in 16 bit."""
        if self.assign is not None:
            return self.assign(specs, config, harm)
        return {spec.name: self.scheme(spec, config) for spec in specs}


def scalar_scheme_of(codec: str) -> Callable[[LayerSpec, Any], Scheme]:
    """Make the function `scheme` of a codec with one uniform code per weight."""
    return lambda spec, config: ScalarScheme(codec=codec, bits=int(config.bits), group_size=config.group_size)
