"""Figures hold the numbers that they were given, in their places, and are saved as the same bytes every time."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from PIL import Image

from vqdm.report.figures import figures_of, layer_map, loss_curves, pareto, save, timestep_errors
from vqdm.report.figures.layers import execution_place, is_convolution
from vqdm.report.figures.pareto import LABELS, family_of
from vqdm.report.figures.style import COLOURS

NAN = float("nan")
WHITE = "#ffffff"


def frame(rows, **published):
    columns = ["method", "bits_per_weight", "mib", "fid", "fid_se"]
    return pd.DataFrame(rows, columns=columns).assign(**published)


FRAME = frame(
    [
        ("full precision", 16.0, 6.9, 2.0, 0.2),
        ("VQ 4 bit", 4.7, 2.1, 2.1, 0.15),
        ("VQ 2 bit", 2.8, 1.3, 2.9, 0.25),
        ("VQ 3 bit", 3.8, 1.7, 2.2, NAN),
        ("GPTQ 3 bit", 3.9, 1.7, 2.5, 0.05),
        ("Q-Diffusion 4 bit", NAN, NAN, NAN, NAN),
    ],
    bits_published=[32.0, 4.15, 2.15, NAN, NAN, 4.0],
    fid_published=[1.9, 2.3, 3.3, NAN, NAN, 2.4],
)


def points(line):
    return [tuple(map(float, pair)) for pair in line.get_xydata()]


def lines(axes, *, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def hollow(axes):
    return [line for line in axes.get_lines() if len(line.get_xdata()) and to_hex(line.get_markerfacecolor()) == WHITE]


def names(axes):
    """The labels at the points, {name: where its point is}."""
    return {" ".join(text.get_text().split()): text.xy for text in axes.texts}


@pytest.mark.parametrize("size", ["bits_per_weight", "mib"])
def test_pareto_points_and_error_bars_are_the_frames(size):
    (axes,) = pareto(FRAME, "fid", size=size).axes
    drawn = {}
    for container in axes.containers:
        data, _, (bars,) = container.lines
        for point, ((x, low), (_, high)) in zip(points(data), bars.get_segments(), strict=True):
            drawn[point] = (x, low, high)
    rows = FRAME[FRAME["fid"].notna() & (FRAME["bits_per_weight"] < 16)]
    assert set(drawn) == set(zip(rows[size], rows["fid"], strict=True))
    for row in rows.to_dict("records"):
        x, low, high = drawn[row[size], row["fid"]]
        error = 0 if math.isnan(row["fid_se"]) else row["fid_se"]
        assert (x, high - low, (high + low) / 2) == pytest.approx((row[size], 2 * error, row["fid"]))


def test_a_line_joins_one_family_from_small_to_large():
    (axes,) = pareto(FRAME, "fid").axes
    assert [points(c.lines[0]) for c in axes.containers] == [[(2.8, 2.9), (3.8, 2.2), (4.7, 2.1)], [(3.9, 2.5)]]


def test_published_values_are_hollow_and_stand_at_their_own_bits():
    figure = pareto(FRAME, "fid")
    vq, qdiffusion = hollow(figure.axes[0])
    assert points(vq) == [(4.15, 2.3), (2.15, 3.3)]
    assert points(qdiffusion) == [(4.0, 2.4)]
    own = figure.axes[0].containers[0].lines[0]
    assert (vq.get_color(), vq.get_marker()) == (own.get_color(), own.get_marker())
    assert to_hex(own.get_markerfacecolor()) != WHITE
    assert vq.get_linestyle() == "None"


def test_every_point_and_level_is_named_beside_it():
    figure = pareto(FRAME, "fid")
    found = names(figure.axes[0])
    left = figure.axes[0].get_xlim()[0]
    assert found == {
        "VQ 2 bit": (2.8, 2.9), "VQ 3 bit": (3.8, 2.2), "VQ 4 bit": (4.7, 2.1), "VQ 4 bit, published": (4.15, 2.3),
        "VQ 2 bit, published": (2.15, 3.3), "GPTQ 3 bit": (3.9, 2.5), "Q-Diffusion 4 bit, published": (4.0, 2.4),
        "full precision": (left, 2.0), "full precision, published": (left, 1.9),
    }  # fmt: skip
    assert not figure.legends


def test_labels_touch_neither_each_other_nor_points_where_there_is_room():
    rows = [(f"method {i} 3 bit", 3 + i % 4 / 50, 1.0, 2.0 + i / 40, 0.01) for i in range(16)]  # crowded
    (axes,) = pareto(frame(rows), "fid").axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 16 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    places = axes.transData.transform([row[1:4:2] for row in rows])
    assert not any(box.contains(*place) for box in boxes for place in places)
    inside = axes.get_window_extent()
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)


def test_without_published_columns_nothing_is_hollow():
    figure = pareto(FRAME[["method", "bits_per_weight", "fid", "fid_se"]], "fid")
    assert not hollow(figure.axes[0])
    assert list(names(figure.axes[0])) == ["VQ 2 bit", "VQ 3 bit", "VQ 4 bit", "GPTQ 3 bit", "full precision"]


def test_full_precision_is_a_dashed_line_with_its_band():
    (axes,) = pareto(FRAME, "fid").axes
    level = [line for line in axes.get_lines() if list(line.get_ydata()) == [2.0, 2.0]]
    assert [line.is_dashed() for line in level] == [True]
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((1.8, 2.2))
    assert axes.get_xlim()[1] < 16, "the row of 16 bits is no point"


def test_many_variants_have_their_familys_colour_and_markers_of_their_own():
    methods = [f"{family} 3 bit{what}" for family in ("VQ", "trellis") for what in ("", ", a", ", b", ", c", ", d")]
    data = frame([(method, 3 + i / 10, 1.0, 2.0, 0.1) for i, method in enumerate(methods)])
    looks = {c.lines[0].get_xdata()[0]: c.lines[0] for c in pareto(data, "fid").axes[0].containers}
    found = [(looks[3 + i / 10].get_color(), looks[3 + i / 10].get_marker()) for i in range(10)]
    assert len(set(found)) == 10
    assert len({colour for colour, _ in found[:5]}) == len({colour for colour, _ in found[5:]}) == 1
    assert [marker for _, marker in found[:5]] == [marker for _, marker in found[5:]]


@pytest.mark.parametrize("what", ["method{} 3 bit", "VQ 3 bit, {}"])
def test_no_two_lines_look_alike(what):
    data = frame([(what.format(i), 3.0, 1.0, 2.0, 0.1) for i in range(20)])
    containers = pareto(data, "fid").axes[0].containers
    assert len({(c.lines[0].get_color(), c.lines[0].get_marker()) for c in containers}) == 20


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("VQ 3 bit", ("VQ", "")),
        ("trellis 2.25 bit by sensitivity, distilled", ("trellis", " by sensitivity, distilled")),
        ("trellis 4 bit, 2 steps", ("trellis", ", 2 steps")),
        ("VQDM 3.15", ("VQDM", "")),
        ("VQDM as published 3 bit", ("VQDM as published", "")),
        ("GPTQ 3-bit", ("GPTQ", "")),
        ("PTQ4DM", ("PTQ4DM", "")),
        ("full precision, 4 steps", ("full precision, 4 steps", "")),
        ("scheme 3x8g8", ("scheme 3x8g8", "")),
    ],
)
def test_a_family_is_what_stands_before_the_bit_count(method, parts):
    assert family_of(method) == parts


def test_distances_over_orders_of_magnitude_are_logarithmic_and_scores_are_not():
    rows = [("RTN 2 bit", 2.9, 1.0, 11.0, 0.3), ("RTN 4 bit", 4.8, 2.0, 0.05, 0.1)]
    far = frame(rows)
    assert pareto(far, "fid").axes[0].get_yscale() == "symlog", "the error bar reaches below 0"
    assert pareto(far.assign(fid_se=0.01), "fid").axes[0].get_yscale() == "log"
    assert pareto(far.assign(fid=[2.0, 2.1]), "fid").axes[0].get_yscale() == "linear"
    scores = far.rename(columns={"fid": "psnr_to_fp", "fid_se": "psnr_to_fp_se"})
    assert pareto(scores, "psnr_to_fp").axes[0].get_yscale() == "linear"


def test_ticks_near_zero_keep_their_distance():
    rows = [("RTN 2 bit", 2.9, 1.0, 11.0, 0.3), ("RTN 4 bit", 4.8, 2.0, 0.05, 0.097)]
    (axes,) = pareto(frame(rows), "fid").axes
    ticks = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    assert sorted(ticks) == pytest.approx([0, 0.1, 0.2, 0.5, 1, 2, 5, 10])
    heights = [axes.transData.transform((0, tick))[1] for tick in sorted(ticks)]
    assert min(np.diff(heights)) > 7 * axes.figure.dpi / 72, "7 points, the height of their labels"


@pytest.mark.parametrize("metric", sorted(LABELS, key=lambda metric: len(LABELS[metric]))[-4:])
def test_the_longest_labels_are_not_cut(metric):
    data = FRAME.rename(columns={"fid": metric, "fid_se": f"{metric}_se"})
    figure = pareto(data, metric)
    label = figure.axes[0].yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= figure.bbox.height and label.x0 >= 0


def layer(name, bits, weight_error, output_error=None):
    record = {"name": name, "bits": bits, "relative_weight_error": weight_error}
    return record if output_error is None else record | {"relative_output_error": output_error}


LAYERS = [
    layer("down_blocks.0.attentions.0.proj_in", 3.1, 0.01, 0.001),
    layer("down_blocks.0.resnets.0.conv1", 3.2, 0.02, 0.002),
    layer("up_blocks.0.resnets.0.conv_shortcut", 3.3, 0.03, 0.003),
    layer("mid_block.attentions.0.proj_out", 3.4, 0.04, 0.004),
]


def test_layers_stand_in_the_networks_order_with_their_error_and_bits():
    upper, lower = layer_map(LAYERS).axes
    by_place = {}
    for axes, key in ((upper, "error"), (lower, "bits")):
        for kind in ("convolution", "linear"):
            (line,) = lines(axes, label=kind)
            for x, y in points(line):
                by_place.setdefault(x, {"kind": kind})[key] = y
    assert [by_place[x] for x in range(4)] == [
        {"kind": "convolution", "error": 0.002, "bits": 3.2},
        {"kind": "linear", "error": 0.001, "bits": 3.1},
        {"kind": "linear", "error": 0.004, "bits": 3.4},
        {"kind": "convolution", "error": 0.003, "bits": 3.3},
    ]
    assert [(text.get_text(), text.get_position()[0]) for text in upper.texts] == [("D0", 0.5), ("M", 2), ("U0", 3)]
    assert upper.get_ylabel() == "relative output error"
    kinds = {(line.get_color(), line.get_marker()) for line in upper.get_lines()}
    assert len(kinds) == 2


def test_codecs_that_saw_no_data_show_the_error_of_the_weights():
    (upper, _) = layer_map([layer(r["name"], 3.0, r["relative_weight_error"]) for r in LAYERS]).axes
    assert upper.get_ylabel() == "relative weight error"
    assert sorted(y for line in upper.get_lines() for y in line.get_ydata()) == [0.01, 0.02, 0.03, 0.04]


@pytest.fixture(scope="module")
def sdxl():
    """(specs, names in the order in which the U-Net runs them), without weights."""
    import torch
    from unets import sdxl_unet

    from vqdm.models.specs import layer_specs

    unet, order = sdxl_unet(), []
    specs = layer_specs(unet)
    for spec in specs:
        unet.get_submodule(spec.name).register_forward_hook(lambda *_, name=spec.name: order.append(name))
    with torch.device("meta"), torch.no_grad():
        conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        text = torch.empty(1, 4, 2048)
        unet(torch.empty(1, 4, 16, 16), torch.empty(1), text, added_cond_kwargs=conditions)
    return specs, order


def test_the_order_is_that_in_which_sdxl_runs(sdxl):
    specs, order = sdxl
    names = [spec.name for spec in specs]
    assert len(order) == 771 and names != order
    assert sorted(names, key=execution_place) == order


def test_convolutions_are_known_by_their_names(sdxl):
    assert all(is_convolution(spec.name) == (spec.kind == "conv") for spec in sdxl[0])


def test_other_denoisers_keep_their_own_order():
    names = ["transformer_blocks.10.attn.to_q", "transformer_blocks.2.ff.net.2", "single_transformer_blocks.0.proj_mlp"]
    assert sorted(names, key=execution_place) == names


def test_errors_by_timestep_are_drawn_where_there_are_any():
    data = {
        "timesteps": [100, 500, 900],
        "errors": {"VQ": [0.3, 0.2, 0.1], "trellis": [0.03, None, 0.01]},
        "before": {"VQ": [0.6, 0.4, 0.2]},
    }
    figure = timestep_errors(data)
    (axes,) = figure.axes
    (vq,), (trellis,), (before,) = (lines(axes, label=label) for label in ("VQ", "trellis", "VQ, before"))
    assert points(vq) == [(100, 0.3), (500, 0.2), (900, 0.1)]
    assert points(trellis) == [(100, 0.03), (900, 0.01)]
    assert points(before) == [(100, 0.6), (500, 0.4), (900, 0.2)]
    assert before.is_dashed() and before.get_color() == vq.get_color() and not vq.is_dashed()
    assert axes.xaxis_inverted()
    assert names(axes) == {"VQ": (100, 0.3), "VQ, before": (100, 0.6), "trellis": (100, 0.03)}


VALIDATIONS = [
    {"step": 0, "loss": 0.4, "t0-199": 0.5, "t200-399": 0.3},
    {"step": 2, "loss": 0.1, "t0-199": 0.15, "t200-399": 0.05},
    {"step": 4, "loss": 0.2, "t0-199": 0.25, "t200-399": 0.15},
]
HISTORY = {"losses": [0.5, 0.3, 0.2, 0.25], "validations": VALIDATIONS}
BLOCKS = [
    {"block": "down_blocks.0.resnets.0", "before": 0.4, "after": 0.1, "kept": True},
    {"block": "mid_block.resnets.0", "before": 0.2, "after": 0.3, "kept": False},
    {"block": "up_blocks.0.resnets.0", "before": 0.2, "after": 0.1, "kept": True},
]


def test_loss_curves_are_the_historys_and_the_best_is_ringed():
    (axes,) = loss_curves(HISTORY).axes
    (training,), (validation,), (best,) = (lines(axes, label=name) for name in ("training", "validation", "best"))
    assert points(training) == list(enumerate(HISTORY["losses"]))
    assert points(validation) == [(0, 0.4), (2, 0.1), (4, 0.2)]
    assert points(best) == [(2, 0.1)]


def test_tuned_blocks_are_ratios_and_those_that_stayed_are_crosses_at_one():
    figure = loss_curves(HISTORY, BLOCKS)
    axes = figure.axes[0]
    assert len(figure.axes) == 2
    better, stayed = axes.get_lines()
    assert points(better) == [(0, 0.25), (2, 0.5)]
    assert points(stayed) == [(1, 1.0)] and stayed.get_marker() == "x"
    assert [text.get_text() for text in axes.texts] == ["D0", "M", "U0"]
    assert len(loss_curves(blocks=BLOCKS).axes) == 1


LONG = "a method with a long name that tells everything about itself"
FIGURES = {
    "pareto": lambda: pareto(FRAME, "fid"),
    "pareto of long names": lambda: pareto(frame([(f"{LONG} {i}x", 3.0 + i, 1.0, 2.0, 0.1) for i in range(3)]), "fid"),
    "layers": lambda: layer_map(LAYERS),
    "timesteps": lambda: timestep_errors({"timesteps": [1, 2], "errors": {"VQ": [0.2, 0.1], "trellis": [0.1, 0.3]}}),
    "losses": lambda: loss_curves(HISTORY, BLOCKS),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_and_no_legend_lies_over_axes(name):
    figure = FIGURES[name]()
    texts = [Text.get_window_extent(text) for axes in figure.axes for text in axes.texts]
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    for extent in [*(part.get_tightbbox() for part in (*figure.axes, *figure.legends)), *texts]:
        assert extent.x0 >= -0.5 and extent.x1 <= figure.bbox.width + 0.5
        assert extent.y0 >= -0.5 and extent.y1 <= figure.bbox.height + 0.5


def test_names_of_blocks_do_not_overlap():
    names = [f"transformer_blocks.{i}.ff" for i in range(150)]
    upper = layer_map([layer(name, 3.0, 0.1) for name in names]).axes[0]
    boxes = [text.get_window_extent() for text in upper.texts]
    assert 10 < len(boxes) < 150
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_data_give_the_same_bytes(name, tmp_path):
    files = [save(FIGURES[name](), tmp_path / folder / "vq2.5-layers") for folder in ("a", "b")]
    assert [file.name for file in files[0]] == ["vq2.5-layers.svg", "vq2.5-layers.png"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert {file.name for file in (tmp_path / "a").iterdir()} == {file.name for file in files[0]}, "nothing left behind"


def test_a_figure_is_opaque_and_its_text_needs_no_font(tmp_path):
    svg, png = save(pareto(FRAME, "fid"), tmp_path / "f")
    text = svg.read_text()
    assert "<text" not in text and "font-family" not in text and "<dc:date>" not in text
    image = Image.open(png).convert("RGBA")
    assert image.width == round(7.0 * 300)
    assert image.getpixel((0, 0)) == (255, 255, 255, 255) and image.getchannel("A").getextrema() == (255, 255)


PROGRAM = """
import hashlib, json, sys
from pathlib import Path
import vqdm.report.figures as figures
early = [name for name in ("matplotlib", "torch") if name in sys.modules]
history = json.loads(sys.argv[2])
files = figures.save(figures.loss_curves(history), Path(sys.argv[1]) / "losses")
late = [name for name in ("matplotlib.pyplot", "torch", "diffusers") if name in sys.modules]
print(json.dumps([early, late, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]]))
"""


def test_drawing_needs_no_torch_nor_pyplot_and_heeds_no_users_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nfigure.facecolor: black\nsvg.hashsalt: other\n")
    found = []
    for seed, settings in (("1", None), ("2", str(tmp_path / "matplotlibrc"))):
        environment = os.environ | {"PYTHONHASHSEED": seed} | ({} if settings is None else {"MATPLOTLIBRC": settings})
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(HISTORY)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert found[0][:2] == [[], []]


# what is seen of linear RGB with protanopia and deuteranopia: Viénot, Brettel and Mollon (1999)
BLINDNESS = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]  # of linear sRGB


def lab(colour, seen):
    """CIELAB, in which a distance of 2 is just seen side by side."""
    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    white = np.array(XYZ) @ np.ones(3)
    xyz = np.array(XYZ) @ np.clip(np.array(seen) @ linear, 0, 1) / white
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def closest(colours, seen):
    return min(np.linalg.norm(lab(a, seen) - lab(b, seen)) for a, b in itertools.combinations(colours, 2))


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_palette_is_told_apart_by_the_colour_blind(kind):
    assert closest(COLOURS, BLINDNESS[kind]) > 15
    assert closest([f"C{i}" for i in range(len(COLOURS))], BLINDNESS[kind]) < 10, "matplotlib's own are not"


def run_record(results: Path, name: str, *, method="VQ 3 bit", model="tiny", files=(), shared=None):
    """A run record, with the given files of its stages: {stage: {file: JSON}}."""
    directories = {"evaluate": f"stages/evaluate/{name}"} | (shared or {})
    for stage, contents in dict(files).items():
        directories[stage] = f"stages/{stage}/{name}"
        for file, content in contents.items():
            path = results / directories[stage] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    return {"experiment": name, "method": method, "model": model, "directories": directories}


ERRORS = {"timesteps": [101.0, 851.0], "relative_output_errors": [0.4, 0.02]}
QUANTIZE = {"quantize": {"layers.json": {"quantized": LAYERS, "left_in_16_bit": []}, "errors.json": ERRORS}}
FINETUNED = {"finetune": {"history.json": HISTORY, "errors.json": ERRORS}, "tune_blocks": {"blocks.json": BLOCKS}}


def test_all_that_the_records_allow_is_drawn(tmp_path):
    quantized = run_record(tmp_path, "vq3", files=QUANTIZE, shared={"calibrate": "stages/calibrate/one"})
    same_layers = {"quantize": quantized["directories"]["quantize"], "calibrate": "stages/calibrate/one"}
    other_calls = same_layers | {"calibrate": "stages/calibrate/other"}
    records = [
        run_record(tmp_path, "fp", method="full precision"),
        quantized,
        run_record(tmp_path, "vq3_both", method="VQ 3 bit, both", files=FINETUNED, shared=same_layers),
        run_record(tmp_path, "vq3_halves", method="VQ 3 bit, halves", files=FINETUNED, shared=other_calls),
    ]
    data = FRAME.assign(psnr_to_fp=[NAN, 1, 2, 3, 4, NAN], psnr_to_fp_se=0.1, kid=NAN, kid_se=NAN)
    made = figures_of("demo", data, records, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for _, path in made] == [
        "figures/demo-pareto-fid",
        "figures/demo-pareto-psnr_to_fp",
        "figures/demo-timesteps",
        "figures/demo-timesteps-2",
        "figures/vq3-layers",
        "figures/vq3_both-losses",
        "figures/vq3_halves-losses",
    ]
    assert len({title for title, _ in made}) == 6, "two sets of calls share a title, nothing else does"
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    assert drawn == {f"{path.name}.{kind}" for _, path in made for kind in ("svg", "png")}


def test_a_run_on_another_model_keeps_the_figures_of_the_first(tmp_path):
    layers = {"quantize": {"layers.json": QUANTIZE["quantize"]["layers.json"]}}
    records = [run_record(tmp_path, "vq3", files=layers, model="tiny_outlier")]
    made = figures_of("demo-tiny_outlier", FRAME, records, tmp_path)
    assert [path.name for _, path in made] == ["demo-tiny_outlier-pareto-fid", "vq3-tiny_outlier-layers"]


def test_a_row_that_was_not_run_is_hollow_alone_and_full_precision_by_its_published_bits():
    data = pd.DataFrame(
        {
            "method": ["table1_fp", "VQDM 3 bit"],
            "bits_per_weight": [None, None],
            "bits_published": [32, 3.15],
            "fid": [None, None],
            "fid_se": [None, None],
            "fid_published": [18.99, 19.18],
        }
    )
    figure = pareto(data, "fid")
    (axes,) = figure.axes
    assert [points(line) for line in hollow(axes)] == [[(3.15, 19.18)]]
    assert list(names(axes)) == ["VQDM 3 bit, published", "table1_fp, published"]
    assert not axes.containers and not axes.patches


def test_what_was_removed_or_has_no_bits_is_left_out(tmp_path):
    gone = run_record(tmp_path, "vq3", shared={"quantize": "stages/quantize/gone", "finetune": "stages/finetune/gone"})
    votes = pd.DataFrame({"left": ["VQDM 3 bit"], "wins": [0.5], "wins_se": [0.1]})
    assert figures_of("human_preference", votes, [gone], tmp_path) == []


def test_full_precision_alone_gives_no_figure(tmp_path):
    records = [run_record(tmp_path, "fp", method="full precision")]
    assert figures_of("demo", FRAME[:1], records, tmp_path) == []
