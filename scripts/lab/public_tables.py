"""What records of bench_public_layers.py come to: a summary of every network in Markdown, the worst layers first."""

import math
from itertools import pairwise

import pandas as pd
from bench_codecs import decibels
from tabulate import tabulate

WORSE = 1.05  # a layer's error beside GPTQ's from which it is listed
WORST = 10  # layers shown of a network
NOTE = (
    "bits: all that is stored for a layer, the trellis table (8 KiB for a whole model) excepted; means over layers are "
    "weighted by their weights. error: held out, geometric mean over layers. dB: of the error to that of GPTQ-4 on the "
    "same layers. worse: layers with more than 1.05 times GPTQ-4's error."
)


def markdown(rows: list[dict], command: str) -> str:
    """The whole page."""
    frame = pd.DataFrame(rows).reindex(columns=[*ADDED, *pd.DataFrame(rows).columns.difference(ADDED)])
    parts = [network_part(name, part) for name, part in frame.groupby("network", sort=False)]
    return "\n\n".join([*parts, NOTE, f"`{command}`"]) + "\n"


ADDED = ["bits", "heldout_error", "error", "db_to_gptq4", "problem"]  # columns that not every row has


def network_part(name: str, frame: pd.DataFrame) -> str:
    out = [f"## {name}", _population(frame), summary(frame)]
    at = bits_reaching(trellis_points(frame))
    if at is not None:
        out.append(f"The trellis reaches GPTQ-4's geometric mean at {at} bits.")
    out += [worst_layers(frame), worse_than_gptq(frame), equal_bits(frame)]
    problems = frame[frame["problem"].notna()]
    for problem, members in problems.groupby("problem", sort=False):
        out.append(f"- left out: {members['layer'].iloc[0]} ({members['codec'].iloc[0]}): {problem}")
    return "\n\n".join(part for part in out if part)


def _population(frame: pd.DataFrame) -> str:
    layers = frame[frame["heldout_error"].notna()].drop_duplicates("layer")
    weights = int((layers["out"] * layers["in"]).sum())
    fewest = (layers["tokens"] / layers["in"]).min()
    return (
        f"{len(layers)} layers, {weights / 1e6:.2f} M weights; {frame['inputs'].iloc[0]}; at least {fewest:.1f} tokens "
        "per input behind a Hessian."
    )


def _mean_bits(part: pd.DataFrame) -> float:
    weights = part["out"] * part["in"]
    return float((part["bits"] * weights).sum() / weights.sum())


def _geometric(errors: pd.Series) -> float:
    return math.exp(float(errors.clip(lower=1e-30).map(math.log).mean()))


def summary(frame: pd.DataFrame) -> str:
    lines = []
    for (codec, asked), part in frame[frame["heldout_error"].notna()].groupby(["codec", "asked_bits"]):
        worst = part.loc[part["db_to_gptq4"].idxmax()] if part["db_to_gptq4"].notna().any() else None
        known = [f"{codec} {asked:g}", len(part), f"{_mean_bits(part):.3f}", f"{_geometric(part['heldout_error']):.6f}"]
        if worst is None:
            lines.append([*known, "–", "–", "–", "–"])
            continue
        lines.append([
            *known, f"{part['db_to_gptq4'].mean():+.2f}", int((part["db_to_gptq4"] > decibels(WORSE)).sum()),
            f"{worst['db_to_gptq4']:+.2f}", worst["layer"],
        ])  # fmt: skip
    columns = ["codec", "layers", "bits", "error", "dB", "worse", "worst dB", "worst layer"]
    return tabulate(lines, columns, tablefmt="github", disable_numparse=True)


def trellis_points(frame: pd.DataFrame) -> list[tuple[float, float]]:
    """(bits, mean dB to GPTQ-4) of the trellis by rising bits, over the layers that all its bits could hold."""
    part = frame[(frame["codec"] == "trellis") & frame["db_to_gptq4"].notna()]
    whole = part.groupby("layer")["asked_bits"].transform("nunique") == part["asked_bits"].nunique()
    groups = part[whole].groupby("asked_bits")
    return sorted((_mean_bits(members), float(members["db_to_gptq4"].mean())) for _, members in groups)


def bits_reaching(points: list[tuple[float, float]]) -> str | None:
    """Bits at which straight lines through points (bits, dB) reach 0 dB, or the end beyond which; None for no line."""
    if len(points) < 2:
        return None
    if points[0][1] <= 0:
        return f"fewer than {points[0][0]:.3f}"
    for (bits, above), (next_bits, below) in pairwise(points):
        if below <= 0:
            return f"{bits + (next_bits - bits) * above / (above - below):.3f}"
    return f"more than {points[-1][0]:.3f}"


def worst_layers(frame: pd.DataFrame) -> str:
    """Layers on which the trellis at 4 bits (or at its most) does worst, with its results at all other bits."""
    part = frame[(frame["codec"] == "trellis") & frame["db_to_gptq4"].notna()]
    if part.empty:
        return ""
    by_layer = part.pivot_table(index="layer", columns="asked_bits", values="db_to_gptq4")
    asked = 4.0 if 4.0 in by_layer else by_layer.columns[-1]
    shapes = part.drop_duplicates("layer").set_index("layer")
    lines = [
        [layer, f"{shapes.loc[layer, 'out']:g}×{shapes.loc[layer, 'in']:g}", *(f"{number:+.2f}" for number in numbers)]
        for layer, numbers in by_layer.sort_values(asked, ascending=False).head(WORST).iterrows()
    ]
    table = tabulate(
        lines, ["layer", "shape", *(f"{b:g} bits" for b in by_layer)], tablefmt="github", disable_numparse=True
    )
    return f"dB of the trellis to GPTQ-4, the layers that are worst at {asked:g} bits:\n\n{table}"


def worse_than_gptq(frame: pd.DataFrame) -> str:
    """Layers of 64 outputs and more where the trellis at 4.0 bits is behind GPTQ-4 at what that takes."""
    part = frame[(frame["codec"] == "trellis") & (frame["asked_bits"] == 4) & frame["db_to_gptq4"].notna()]
    part = part[part["out"] >= 64]
    if part.empty:
        return ""
    behind = part[part["db_to_gptq4"] > decibels(WORSE)].sort_values("db_to_gptq4", ascending=False)
    line = f"{len(behind)} of {len(part)} layers of at least 64 outputs: trellis 4 more than 5 % worse than GPTQ-4"
    return "\n".join([f"{line}{':' if len(behind) else '.'}", *_listed(behind)])


def equal_bits(frame: pd.DataFrame) -> str:
    """The trellis at GPTQ's own bits. Layers of 32 to 48 outputs, where side information weighs most, are listed."""
    paragraphs = []
    for asked in (3.0, 4.0):
        chosen = frame[(frame["asked_bits"] == asked) & frame["heldout_error"].notna()].set_index("layer")
        ours = chosen[chosen["codec"] == "trellis=gptq"]
        theirs = chosen[chosen["codec"] == "gptq"].loc[ours.index]
        ours = ours.assign(ratio=ours["heldout_error"] / theirs["heldout_error"]).reset_index()
        ours["db_to_gptq4"] = ours["ratio"].map(decibels)  # here to GPTQ at these bits
        small = ours[ours["out"].between(32, 48)]
        for what, group, listed in (("32 to 48", small, small), ("at least 64", ours[ours["out"] >= 64], small[:0])):
            if group.empty:
                continue
            line = (
                f"Trellis at GPTQ-{asked:g}'s bits, {len(group)} layers of {what} outputs: "
                f"{decibels(_geometric(group['ratio'])):+.2f} dB in the mean, {int((group['ratio'] > 1).sum())} worse, "
                f"{int((group['ratio'] > WORSE).sum())} by more than 5 %"
            )
            behind = listed[listed["ratio"] > 1].sort_values("ratio", ascending=False)
            paragraphs.append("\n".join([f"{line}{':' if len(behind) else '.'}", *_listed(behind)]))
    return "\n\n".join(paragraphs)


def _listed(part: pd.DataFrame) -> list[str]:
    return [
        f"- {row['layer']} ({row['out']:g}×{row['in']:g}): {100 * 10 ** (row['db_to_gptq4'] / 10) - 100:+.1f} % at "
        f"{row['bits']:.3f} bits"
        for _, row in part.iterrows()
    ]
