import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unets import sdxl_unet, small_unet

from vqdm.calibration import hessian
from vqdm.calibration.hessian import HessianRecorder
from vqdm.codecs import rtn
from vqdm.errors import UserError
from vqdm.models.specs import layer_specs, spec_of, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.layers import swap


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def module_specs(model):
    return [spec_of(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@torch.no_grad()
def record(model, calls, **options):
    with HessianRecorder(model, module_specs(model), **options) as recorder:
        for call in calls:
            model(*call)
    return recorder.hessians()


def slow_moment(inputs, conv=None):
    """By F.unfold, in float64; the sum and the number of tokens."""
    tokens = inputs.double().reshape(-1, inputs.shape[-1])
    if conv is not None:
        padding = conv.padding
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            inputs = F.pad(inputs, (total[1] // 2, (total[1] + 1) // 2, total[0] // 2, (total[0] + 1) // 2))
        padding = 0 if isinstance(padding, str) else padding
        taps = math.prod(conv.kernel_size)
        patches = F.unfold(inputs.double(), conv.kernel_size, conv.dilation, padding, conv.stride)
        patches = patches.view(len(inputs), -1, taps, patches.shape[-1]).transpose(1, 2).flatten(1, 2)
        tokens = patches.transpose(1, 2).flatten(0, 1)
    return tokens.T @ tokens, len(tokens)


def close(found, expected):
    return found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 0},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": (4, 1), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": (3, 2), "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 4},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 2), "padding": (1, 0), "stride": (2, 3), "dilation": (1, 2)},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "padding": 1},
]


@pytest.mark.parametrize("size", [(17, 12), (16, 20), (9, 7)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_agree_with_unfold(geometry, size, monkeypatch):
    conv = nn.Conv2d(3, 2, **geometry)
    pictures = draw(2, 3, *size), draw(1, 3, *size, seed=1)
    sums, counts = zip(*(slow_moment(picture, conv) for picture in pictures), strict=True)
    expected = sum(sums) / sum(counts)
    assert counts[0] == hessian.token_count(pictures[0], spec_of("", conv).conv) == conv(pictures[0])[:, 0].numel()
    for large, chunk in ((1, 1 << 20), (10**9, 1 << 20), (1, 100), (10**9, 100)):
        monkeypatch.setattr(hessian, "LARGE", large)
        monkeypatch.setattr(hessian, "CHUNK", chunk)
        found = record(nn.Sequential(conv), [(picture,) for picture in pictures])["0"]
        assert close(found, expected)


def test_both_ways_to_sum_patches_are_taken(monkeypatch):
    used = []
    monkeypatch.setattr(hessian, "_add_by_displacement", lambda *_: used.append("displacement"))
    monkeypatch.setattr(hessian, "_patches", lambda *_: used.append("patches") or [])
    for size, stride in ((8, 1), (7, 1), (16, 2)):
        record(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, stride=stride)), [(draw(1, 3, size, size),)])
    assert used == ["displacement", "patches", "patches"]


def test_the_columns_are_those_of_the_weight_matrix():
    conv, picture = nn.Conv2d(3, 4, 3, padding=1, bias=False), draw(2, 3, 12, 12)
    matrix = weight_to_matrix(conv.weight.detach())
    found = record(nn.Sequential(conv), [(picture,)])["0"]
    power = conv(picture).square().mean((0, 2, 3))
    assert torch.allclose((matrix @ found * matrix).sum(1), power, rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 3, 4, 6), (6,)])
def test_linear_layers_take_any_number_of_dimensions(shape):
    expected, count = slow_moment(draw(*shape))
    assert close(record(nn.Sequential(nn.Linear(6, 2)), [(draw(*shape),)])["0"], expected / count)


def test_one_picture_without_a_batch():
    conv = nn.Conv2d(3, 2, 3, padding=1)
    for size in (5, 12):
        found = record(nn.Sequential(conv), [(draw(3, size, size),)])["0"]
        assert torch.equal(found, record(nn.Sequential(conv), [(draw(1, 3, size, size),)])["0"])


def test_half_precision_is_summed_in_single():
    inputs = (300 * draw(4000, 8)).half()  # squares and sums beyond fp16's range
    expected, count = slow_moment(inputs)
    assert close(record(nn.Sequential(nn.Linear(8, 2).half()), [(inputs,)])["0"] / 1e4, expected / count / 1e4)


class Attention(nn.Module):
    """q reads its own tensor; k and v read `text`; `other`, if given, is what v reads instead."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, image, text, other=None):
        read = [self.q(image), self.k(text)]
        return [*read, self.v(text if other is None else other)]


def means(*inputs):
    sums, counts = zip(*map(slow_moment, inputs), strict=True)
    return sum(sums) / sum(counts)


def test_layers_that_read_one_tensor_share_one_matrix():
    image, text = [draw(5, 6, seed=i) for i in range(3)], [draw(7, 6, seed=9 + i) for i in range(3)]
    found = record(Attention(), list(zip(image, text, strict=True)))
    assert list(found) == ["q", "k", "v"]
    assert found["k"] is found["v"] and found["q"] is not found["k"]
    assert close(found["q"], means(*image)) and close(found["k"], means(*text))
    same = record(Attention(), [(tensor, tensor) for tensor in image])
    assert same["q"] is same["k"] is same["v"]


def test_the_same_tensor_counts_in_every_call():
    text = draw(7, 6)
    found = record(Attention(), [(draw(5, 6, seed=1), text), (draw(5, 6, seed=2), text), (text, draw(1, 6, seed=3))])
    assert close(found["k"], means(text, text, draw(1, 6, seed=3)))
    assert close(found["q"], means(draw(5, 6, seed=1), draw(5, 6, seed=2), text))


@pytest.mark.parametrize("when", [0, 1, 2, 3])
def test_a_layer_that_once_reads_another_tensor_has_its_own_matrix(when):
    texts, other = [draw(7, 6, seed=i) for i in range(4)], draw(7, 6, seed=9)
    calls = [(texts[0], text, other if i == when else None) for i, text in enumerate(texts)]
    found = record(Attention(), calls)
    assert found["k"] is not found["v"]
    assert close(found["k"], means(*texts))
    assert close(found["v"], means(*(other if i == when else text for i, text in enumerate(texts))))


def test_a_layer_that_is_not_called_every_time_has_its_own_matrix():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.third = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, inputs, names):
            for name in names:
                getattr(self, name)(inputs)

    x = [draw(5, 6, seed=i) for i in range(4)]
    names = (("first", "last", "third"), ("first",), ("last", "first"), ("third", "last", "last"))
    found = record(Skips(), list(zip(x, names, strict=True)))
    assert close(found["first"], means(x[0], x[1], x[2]))
    assert close(found["last"], means(x[0], x[2], x[3], x[3]))
    assert close(found["third"], means(x[0], x[3]))
    assert len({id(matrix) for matrix in found.values()}) == 3


def test_a_tensor_changed_in_place_or_equal_in_content_is_another():
    class InPlace(Attention):
        def forward(self, inputs):
            self.q(inputs)
            self.k(inputs.mul_(2))
            self.v(inputs.clone())

    found = record(InPlace(), [(draw(5, 6),), (draw(5, 6, seed=1),)])
    assert len({id(matrix) for matrix in found.values()}) == 3
    assert torch.allclose(found["k"], 4 * found["q"]) and torch.equal(found["v"], found["k"])


def test_inputs_are_not_kept_alive_and_their_memory_may_be_used_again():
    class Reuses(Attention):
        def forward(self, seed):
            for i, layer in enumerate((self.q, self.k, self.v)):
                layer(draw(5, 6, seed=seed + i))  # freed at once: the allocator may give its address to the next

    found = record(Reuses(), [(0,), (10,)])
    for i, name in enumerate("qkv"):
        assert close(found[name], means(draw(5, 6, seed=i), draw(5, 6, seed=10 + i)))


def test_convolutions_share_in_the_same_geometry_only():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
            self.bare, self.point = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 1)

        def forward(self, picture):
            for layer in self.children():
                layer(picture)

    found = record(Convolutions(), [(draw(1, 3, 9, 9),)])
    assert found["one"] is found["two"]
    assert len({id(matrix) for matrix in found.values()}) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode(mode):
    model = Attention()
    with HessianRecorder(model, module_specs(model)) as recorder:
        for seed in range(2):
            with mode():
                model(draw(5, 6, seed=seed), draw(7, 6, seed=seed + 2))
        model(draw(5, 6, seed=4), draw(7, 6, seed=5))
    found = recorder.hessians()
    assert close(found["q"], means(*(draw(5, 6, seed=s) for s in (0, 1, 4))))
    assert close(found["v"], means(*(draw(7, 6, seed=s) for s in (2, 3, 5))))
    assert not any(matrix.requires_grad or matrix.is_inference() for matrix in found.values())


def test_positional_and_keyword_inputs_are_the_same():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, inputs):
            self.layer(input=inputs)

    assert close(record(ByKeyword(), [(draw(5, 6),)])["layer"], means(draw(5, 6)))


def test_subsampled_tokens_are_seeded_bounded_and_unbiased(monkeypatch):
    model, inputs = nn.Sequential(nn.Linear(6, 2)), draw(2000, 6) + 0.5
    taken = []
    monkeypatch.setattr(hessian, "_rows", lambda x, chosen: taken.append(chosen) or [x[chosen]])
    found = [record(model, [(inputs,)], tokens_per_call=50, seed=seed)["0"] for seed in range(200)]
    assert {len(set(chosen.tolist())) for chosen in taken} == {50}
    assert torch.equal(found[3], record(model, [(inputs,)], tokens_per_call=50, seed=3)["0"])
    assert not torch.equal(found[3], found[4])
    spread = torch.stack(found).std(0) / math.sqrt(len(found))
    assert bool(((torch.stack(found).mean(0) - means(inputs)).abs() < 5 * spread).all())


def test_every_call_weighs_by_its_tokens_and_draws_anew(monkeypatch):
    model = nn.Sequential(nn.Linear(1, 1))
    calls = [(torch.ones(1000, 1),), (3 * torch.ones(10, 1),), (torch.ones(1000, 1),)]
    drawn, rows = [], hessian._rows
    monkeypatch.setattr(hessian, "_rows", lambda x, chosen: drawn.append(chosen) or rows(x, chosen))
    assert record(model, calls, tokens_per_call=20)["0"].item() == pytest.approx((2000 + 90) / 2010)
    assert drawn[1] is None and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (0, 6, 12)], ids=str)
def test_subsampled_patches_are_patches(geometry, monkeypatch):
    conv, picture = nn.Conv2d(3, 2, **geometry), draw(2, 3, 14, 15)
    monkeypatch.setattr(hessian, "CHUNK", 64)
    positions = conv(picture)[:, 0].numel()
    found = torch.zeros(conv.weight[0].numel(), conv.weight[0].numel())
    for position in range(positions):  # every token by itself, with the weight of all
        hessian.add_second_moment(found, picture, spec_of("", conv).conv, chosen=torch.tensor([position]))
    expected, count = slow_moment(picture, conv)
    assert close(found / positions / count, expected / count)
    some = record(nn.Sequential(conv), [(picture,)], tokens_per_call=11)["0"]
    assert torch.linalg.matrix_rank(some.double(), hermitian=True, tol=1e-4) <= 11


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_activations_that_are_not_finite_are_refused_by_layer(value):
    text = draw(7, 6)
    text[3, 2] = value
    model = Attention()
    with HessianRecorder(model, module_specs(model)) as recorder, torch.no_grad():
        model(draw(5, 6), draw(7, 6))
        model(draw(5, 6), text)
    with pytest.raises(UserError, match=r"layer k reads have infinite or NaN entries: load the model in another dtype"):
        recorder.hessians()


def test_what_cannot_be_recorded_is_refused():
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
    with HessianRecorder(model, module_specs(model)) as recorder:
        model["used"](draw(5, 6))
    with pytest.raises(UserError, match="layer unused was never called"):
        recorder.hessians()
    with pytest.raises(UserError, match="tokens_per_call must be at least 1"):
        HessianRecorder(model, [], tokens_per_call=0)
    for other in ({"groups": 3}, {"padding": 1, "padding_mode": "circular"}):
        with pytest.raises(ValueError, match="padded by zeros"):
            HessianRecorder(model, [spec_of("c", nn.Conv2d(3, 3, 3, **other))])


def test_recording_ends_with_its_block_also_by_an_error():
    model = Attention()
    recorder = HessianRecorder(model, module_specs(model))
    with pytest.raises(KeyError), recorder:
        model(draw(5, 6), draw(7, 6))
        raise KeyError
    model(draw(5, 6, seed=1), draw(7, 6, seed=1))
    assert close(recorder.hessians()["q"], means(draw(5, 6)))
    assert recorder.hessians()["q"] is recorder.hessians()["q"]


def test_a_recorder_that_is_not_enabled_reads_nothing():
    model = Attention()
    with HessianRecorder(model, module_specs(model)) as recorder:
        for seed, recorder.enabled in enumerate((False, True, False, True)):
            model(draw(5, 6, seed=seed), draw(7, 6, seed=seed))
    found = recorder.hessians()
    assert close(found["q"], means(draw(5, 6, seed=1), draw(5, 6, seed=3)))
    assert found["k"] is found["v"]


def inputs_of_unet(seed):
    return {
        "sample": draw(2, 4, 16, 16, seed=seed),
        "timestep": torch.tensor(900 - 100 * seed),
        "encoder_hidden_states": draw(2, 5, 32, seed=seed),
    }


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_a_unet_driven_twice_agrees_with_what_its_layers_read(quantized):
    unet = small_unet()
    specs = layer_specs(unet, min_size=8)
    if quantized:
        for spec in specs:
            swap(unet, spec, rtn.encode(weight_to_matrix(unet.get_submodule(spec.name).weight), bits=4))
    read = {spec.name: [] for spec in specs}
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda _, args, __, kept=kept: kept.append(args[0].clone()))
        for name, kept in read.items()
    ]
    with HessianRecorder(unet, specs) as recorder:
        for seed in range(2):
            unet(**inputs_of_unet(seed))
    for hook in hooks:
        hook.remove()
    found = recorder.hessians()
    assert list(found) == [spec.name for spec in specs]
    for spec in specs:
        layer = unet.get_submodule(spec.name) if spec.conv else None
        expected, count = slow_moment(torch.cat(read[spec.name]), layer)
        assert close(found[spec.name], expected / count), spec.name
    text = [name for name in found if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(text) > 2 and len({id(found[name]) for name in text}) == 1
    shared = {tuple(n for n in found if found[n] is matrix) for matrix in found.values()}
    assert {len(names) for names in shared} == {1, 3, len(text)}  # 3: q, k and v of self-attention


@torch.no_grad()
def test_a_part_of_the_layers_has_the_hessians_of_the_whole():
    """Drawn tokens included: parts of a group then need not enter a fingerprint."""
    unet = small_unet()
    specs = layer_specs(unet, min_size=8)

    def recorded(wanted=None):
        with HessianRecorder(unet, specs, tokens_per_call=7, wanted=wanted) as recorder:
            for seed in range(3):
                unet(**inputs_of_unet(seed))
        return recorder, recorder.hessians()

    whole, expected = recorded()
    for names in ([spec.name for spec in specs][::2], [spec.name for spec in specs][1::2]):  # q and v, k
        part, found = recorded(names)
        assert list(found) == names
        assert all(torch.equal(found[name], expected[name]) for name in names)
        assert part.tokens == {name: whole.tokens[name] for name in names}


@torch.no_grad()
def test_sdxl_has_492_problems_for_771_layers():
    unet = sdxl_unet()
    specs = layer_specs(unet)
    with torch.device("meta"), HessianRecorder(unet, specs) as recorder:
        text = torch.empty(2, 77, 2048)
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        unet(torch.empty(2, 4, 64, 64), torch.empty(2), text, added_cond_kwargs=added)
    assert len(specs) == sum(len(problem.layers) for problem in recorder._problems) == 771
    assert len(recorder._problems) == 492
    assert sorted(len(problem.layers) for problem in recorder._problems)[-1] == 140
