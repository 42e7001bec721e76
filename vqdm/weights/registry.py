"""The kinds of quantized weights, by the name their scheme has in files."""

from vqdm.errors import UserError
from vqdm.weights.additive import AdditiveWeight, SharedCodebooks
from vqdm.weights.base import QuantizedWeight, Scheme, SharedPart
from vqdm.weights.scalar import ScalarWeight
from vqdm.weights.trellis import TrellisTable, TrellisWeight

_KINDS = (ScalarWeight, AdditiveWeight, TrellisWeight)
WEIGHTS: dict[str, type[QuantizedWeight]] = {kind.scheme_type.kind: kind for kind in _KINDS}
SHARED_PARTS: dict[str, type[SharedPart]] = {"additive": SharedCodebooks, "trellis": TrellisTable}


def scheme_from_dict(fields: dict) -> Scheme:
    """Remake a scheme from its fields: the inverse of `Scheme.to_dict`.

    UserError if no known scheme has these fields.
    """
    numbers = {key: value for key, value in fields.items() if key != "kind"}
    try:
        return WEIGHTS[fields["kind"]].scheme_type(**numbers)
    except (KeyError, TypeError) as error:
        raise UserError(f"not a weight scheme of this version: {str(fields)[:200]} ({str(error)[:80]})") from error


def empty_weight(scheme: Scheme, shape: tuple[int, int], shared: SharedPart | None = None) -> QuantizedWeight:
    """A weight [out, in] with every tensor allocated and nothing in it, on the current default device (meta too)."""
    return WEIGHTS[scheme.kind](scheme, shape, shared)


def empty_shared(scheme: Scheme) -> SharedPart | None:
    """An empty shared part for a scheme to decode with; None if it needs none."""
    return None if scheme.shared_key is None else SHARED_PARTS[scheme.kind](scheme)
