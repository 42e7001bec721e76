"""The kinds of quantized weights, by the name their scheme has in files."""

from vqdm.errors import UserError
from vqdm.weights.additive import SharedCodebooks
from vqdm.weights.base import QuantizedWeight, Scheme, SharedPart
from vqdm.weights.low_rank import CODED, LowRankScheme, LowRankWeight
from vqdm.weights.trellis import TrellisTable

WEIGHTS: dict[str, type[QuantizedWeight]] = CODED | {LowRankScheme.kind: LowRankWeight}
SHARED_PARTS: dict[str, type[SharedPart]] = {"additive": SharedCodebooks, "trellis": TrellisTable}


def scheme_from_dict(fields: dict) -> Scheme:
    """Remake a scheme from its fields: the inverse of `Scheme.to_dict`.

    UserError if no known scheme has these fields.
    """
    numbers = {key: value for key, value in fields.items() if key != "kind"}
    try:
        if fields["kind"] == LowRankScheme.kind:
            numbers["base"] = _base_from_dict(numbers["base"])
        return WEIGHTS[fields["kind"]].scheme_type(**numbers)
    except (KeyError, TypeError) as error:
        raise UserError(f"not a weight scheme of this version: {str(fields)[:200]} ({str(error)[:80]})") from error


def _base_from_dict(fields: dict) -> Scheme:
    if not isinstance(fields, dict) or fields.get("kind") not in CODED:
        raise UserError(f"a low-rank branch stands beside codes, not beside {str(fields)[:80]!r}")
    return scheme_from_dict(fields)


def empty_weight(scheme: Scheme, shape: tuple[int, int], shared: SharedPart | None = None) -> QuantizedWeight:
    """A weight [out, in] with every tensor allocated and nothing in it, on the current default device (meta too)."""
    return WEIGHTS[scheme.kind](scheme, shape, shared)


def empty_shared(scheme: Scheme) -> SharedPart | None:
    """An empty shared part for a scheme to decode with; None if it needs none."""
    return None if scheme.shared_key is None else SHARED_PARTS[scheme.decoder.kind](scheme.decoder)
