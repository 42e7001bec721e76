"""scripts/lab/bench_public_layers.py on a made-up network of two layers, and without the packages it is for."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqdm.codecs import rtn
from vqdm.models.specs import matrix_to_weight, weight_to_matrix

LAB = Path(__file__).resolve().parent.parent.parent / "scripts" / "lab"
BATCHES = 8
CODECS = ["--codecs", "rtn", "gptq", "trellis", "trellis=gptq", "--bits", "4"]


class Small(nn.Module):
    """A convolution, a linear layer over its channels, and one that sees a single token of every image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.linear = nn.Linear(32, 48)
        self.starved = nn.Linear(48, 64)
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)

    def forward(self, images):
        tokens = self.linear(F.silu(self.conv(images)).permute(0, 2, 3, 1))
        return self.starved(tokens.mean((1, 2)))


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(LAB), str(LAB.parent), *sys.path])
    import bench_public_layers
    import public_networks

    monkeypatch.setattr(bench_public_layers, "warm_trellis", lambda: None)  # nothing is timed here
    return bench_public_layers, public_networks


@pytest.fixture
def made_up(lab, monkeypatch):
    """The model and its batches, in the place of the public networks."""
    model, draw = Small(), torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 16, 8, 8, generator=draw) for _ in range(BATCHES)]

    def load(inputs):
        return lab[1].torch_network(model, batches, lambda model, batch: model(batch), f"seed {inputs.seed}")

    monkeypatch.setattr(lab[1], "NETWORKS", {"small": load})
    return model, batches


def rows(folder: Path) -> list[dict]:
    with (folder / "tables" / "bench_public_layers.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_errors_are_those_of_the_outputs_on_the_other_half(lab, made_up, tmp_path):
    model, batches = made_up
    lab[0].main(["--results", str(tmp_path), "--codecs", "rtn", "gptq", "--bits", "4"])
    found = {(row["layer"], row["codec"]): row for row in rows(tmp_path)}
    assert found.keys() == {(layer, codec) for layer in ("conv", "linear") for codec in ("gptq", "rtn")} | {
        ("starved", "none")
    }
    spec = next(spec for spec in lab[1].NETWORKS["small"](lab[1].Inputs()).specs if spec.name == "conv")
    weight = model.conv.weight.detach()
    decoded = matrix_to_weight(rtn.encode(weight_to_matrix(weight), bits=4)().detach().float(), spec)
    for key, half in (("error", 0), ("heldout_error", 1)):
        images = torch.cat(batches[half::2]).double()
        outputs, change = (F.conv2d(images, w.double(), padding=1) for w in (weight, weight - decoded))
        assert float(found["conv", "rtn"][key]) == pytest.approx(float(change.square().sum() / outputs.square().sum()))
    ratio = float(found["conv", "rtn"]["heldout_error"]) / float(found["conv", "gptq"]["heldout_error"])
    assert 10 ** (float(found["conv", "rtn"]["db_to_gptq4"]) / 10) == pytest.approx(ratio)
    assert "8 tokens are too few" in found["starved", "none"]["problem"]


def test_the_same_command_goes_on(lab, made_up, tmp_path, monkeypatch):
    arguments = ["--results", str(tmp_path), *CODECS]
    lab[0].main(arguments)
    whole, file = rows(tmp_path), tmp_path / "tables" / "bench_public_layers.csv"
    bits = {(row["layer"], row["codec"]): float(row["bits"]) for row in whole if row["bits"]}
    for layer in ("conv", "linear"):
        assert 0 <= bits[layer, "gptq"] - bits[layer, "trellis=gptq"] < 0.05
    text = file.read_text()
    assert "linear" in text.splitlines()[-2] and "starved" in text.splitlines()[-1]
    file.write_text("".join(text.splitlines(keepends=True)[:-1])[:-9])  # killed within the linear layer's last row

    made, encode = [], lab[0].encode

    def counted(*arguments):
        made.append(arguments[0])
        return encode(*arguments)

    monkeypatch.setattr(lab[0], "encode", counted)
    lab[0].main(arguments)
    assert made == ["trellis=gptq"]
    timeless = [
        [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in part] for part in (whole, rows(tmp_path))
    ]
    assert timeless[0] == timeless[1]

    with pytest.raises(SystemExit, match="other inputs"):
        lab[0].main([*arguments, "--seed", "1"])
    monkeypatch.setattr(lab[0], "code_of_codecs", lambda: "0" * 8)
    with pytest.raises(SystemExit, match="made by other codecs"):
        lab[0].main(arguments)


def test_the_page_says_where_the_trellis_meets_gptq(lab, made_up, tmp_path):
    codecs = ["--codecs", "gptq", "trellis", "trellis=gptq"]
    lab[0].main(["--results", str(tmp_path), *codecs, "--bits", "3", "3.5", "4", "5"])
    page = (tmp_path / "tables" / "bench_public_layers.md").read_text()
    for line in ("2 layers", "The trellis reaches GPTQ-4's", "worst at 4 bits", "GPTQ-3's bits, 2 layers of 32 to 48"):
        assert line in page
    assert "nan" not in page
    reaching = lab[0].public_tables.bits_reaching
    assert reaching([(2.0, 6.0), (3.0, 2.0), (4.0, -2.0)]) == "3.500"
    assert reaching([(2.0, 6.0), (3.0, 2.0)]) == "more than 3.000"


def test_what_is_not_installed_is_skipped_with_its_reason(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab[1].importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="nothing was measured"):
        lab[0].main(["--results", str(tmp_path)])
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is skipped: ")[0] for line in said] == ["unet", "encoder", "classifier"]
    assert "adaptive-terrain-diffusion is not installed: pip install" in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--codecs", "zip"], "no 'zip'"),
        (["--networks", "gpt"], "no 'gpt'"),
        (["--bits", "9"], "at most 8"),
        (["--codecs", "trellis=gptq"], "name both"),
    ],
)
def test_wrong_words_are_refused_before_any_work(lab, tmp_path, arguments, said):
    with pytest.raises(SystemExit, match=said):
        lab[0].main(["--results", str(tmp_path), *arguments])


def test_a_graphs_convolutions_are_read_with_their_inputs(lab, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(32, 16, 3, 3, generator=draw), torch.randn(16, 32, 1, 1, generator=draw)
    nodes = [
        onnx.helper.make_node("Conv", ["x", "a.weight"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
        onnx.helper.make_node("Relu", ["y"], ["z"]),
        onnx.helper.make_node("Conv", ["z", "b.weight"], ["out"]),
    ]
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", channels, None, None])]
        for name, channels in (("x", 16), ("out", 16))
    )
    weights = [onnx.numpy_helper.from_array(w.numpy(), name) for w, name in ((first, "a.weight"), (second, "b.weight"))]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, weights)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), tmp_path / "g"
    )

    network, seen = lab[1].OnnxConvolutions(tmp_path / "g"), {}
    images = torch.randn(2, 16, 8, 8, generator=draw)
    found = network({"x": images.numpy()}, lambda name, tensor: seen.update({name: tensor}))
    between = F.relu(F.conv2d(images, first, padding=1, stride=2))
    torch.testing.assert_close(seen, {"a": images, "b": between}, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(found), F.conv2d(between, second), rtol=1e-4, atol=1e-4)
    assert [(spec.name, spec.shape, spec.conv.stride) for spec in network.specs] == [
        ("a", (32, 144), (2, 2)), ("b", (16, 32), (1, 1)),
    ]  # fmt: skip
