"""Every codec has its own options: chosen by its group, checked, named, and with the fingerprints they always had."""

import dataclasses
import json
from pathlib import Path

import hydra
import pytest
from composed import CONF, compose, composed_by_hydra
from hydra.errors import HydraException

from vqdm.config.codecs import OPTIONS, AdditiveConfig, GptqConfig, RtnConfig, TrellisConfig, parse_scheme
from vqdm.config.compose import one_line, to_config
from vqdm.errors import UserError
from vqdm.stages.graph.denoiser import build_quantization

PRESETS = sorted(path.stem for path in (CONF / "quantize").glob("*.yaml"))
# The first 16 digits by stage, recorded before the codecs' options were taken apart: results made then are found again.
# A number raised in VERSIONS, a codec's version, a preset's options (qdiffusion4 splits shortcuts since) or a new tiny
# model changes them; nothing else may.
RECORDED = json.loads((Path(__file__).parent / "fingerprints.json").read_text())


@pytest.mark.parametrize("case", RECORDED)
def test_fingerprints_are_those_recorded(case, tmp_path):
    stages = build_quantization(compose("+experiment=tiny_codec", *case.split()), cache=tmp_path / "hashes").named()
    found = {name: stage.fingerprint[:16] for name, stage in stages.items()}
    assert found | {"label": stages["quantize"].label} == RECORDED[case]


def test_what_changes_for_narrow_layers_only_has_another_fingerprint_with_them_only(tmp_path):
    made = [
        build_quantization(compose("+experiment=tiny_codec", "quantize=trellis3", f"model.min_size={size}"),
                           cache=tmp_path / "hashes").quantize.config
        for size in (32, 16, 15)
    ]  # fmt: skip
    assert ["scalar_bits" in config for config in made] == [False, False, True]


def test_configurations_of_tests_are_those_of_hydra():
    overrides = ("quantize.bits=2", "+experiment=tiny_codec", "quantize=rtn4", "evaluate.metrics=[tiny]", "threads=1")
    assert compose(*overrides) == to_config(composed_by_hydra(*overrides))
    with pytest.raises(HydraException) as ours:
        compose(*overrides, "quantize.bit=3")
    with pytest.raises(HydraException) as theirs:
        composed_by_hydra(*overrides, "quantize.bit=3")
    assert one_line(ours.value) == one_line(theirs.value)


def test_every_preset_is_recorded():
    of_codecs = set(PRESETS) - {"none", "peer"}  # a peer's fingerprint has the versions of what is installed
    assert {f"quantize={name}" for name in of_codecs} <= set(RECORDED)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_options_of_its_codec_only(preset):
    config = compose("+experiment=tiny_codec", f"quantize={preset}").quantize
    assert type(config) is OPTIONS[config.kind]
    assert set(vars(config)) == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_codecs_defaults_pass_its_own_check(kind):
    config = OPTIONS[kind]()
    config.check()
    assert config.kind == kind
    if kind not in ("none", "peer"):
        assert parse_scheme(config.name) == config


def test_names_give_bits_and_groups():
    assert parse_scheme("rtn4g64") == RtnConfig(bits=4, group_size=64)
    assert parse_scheme("trellis2.5") == TrellisConfig(bits=2.5)
    assert parse_scheme("2x6g4") == AdditiveConfig(bits=3, codebook_bits=6, group_size=4)
    for name in ("trellis3g8", "none4", "fp4", "rtn4g", "vq3g0", "nonsense", 3, None):
        with pytest.raises(UserError):
            parse_scheme(name)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantize.bit=3"], "there is no option quantize.bit: did you mean quantize.bits?"),
        (["+quantize.bitz=2"], "there is no option quantize.bitz: did you mean quantize.bits?"),
        (["quantize=vq3", "+quantize.codebook_bit=2"], "did you mean quantize.codebook_bits?"),
        (["+thread=2"], "there is no option thread: did you mean threads?"),
        (["quantise=rtn4"], "there is no option quantise: did you mean quantize?"),
        (["model.sampler.step=9"], "there is no option model.sampler.step: did you mean model.sampler.steps?"),
        (["+finetune.trajectories.alone=data"], "did you mean finetune.trajectories.along?"),
        (["quantize=gptq4", "quantize.allocation=sensitivity"], "is an option of trellis, not of the codec"),
        (["quantize=trellis3", "+quantize.clip=mse"], "option of rtn, gptq, svdquant, adaround, not of the codec"),
        (["quantize.kind=rtn"], "quantize.kind='rtn' is not given by hand: choose the codec by quantize="),
        (["quantize=rtn", "quantize.kind=gptq"], "not given by hand"),
        (["quantize=vq3", "quantize.group_size=null"], "quantize.group_size"),
        (["quantize=vq3", "quantize.damping=nan"], "quantize.damping=nan must be 0 to 100"),
        (["quantize=trellis3", "quantize.bits=inf"], "quantize.bits=inf must be 1 to 8"),
        (["quantize=trellis3", "quantize.row_exponent=nan"], "quantize.row_exponent=nan"),
        (["quantize=additive", "quantize.beam_size=0"], "quantize.beam_size=0 must be 1 to 4096"),
        (["quantize=qdiffusion4", "quantize.group_size=8"], "leave quantize.group_size=8 out"),
        (["calibration.n=2000000000"], "calibration.n=2000000000 must be 1 to 1000000000"),
        (["quantize.seed=9223372036854775808"], "quantize.seed=9223372036854775808 must be 0 to 9223372036854775807"),
        ([f"quantize.seed={10**400}"], "must be 0 to 9223372036854775807"),
        (["quantize=adaround", "quantize.samples=0"], "quantize.samples=0 must be at least 1"),
        (
            ["quantize=adaround", "calibration=tiny", "quantize.samples=1025"],
            "quantize.samples=1025 of 1024 rows that calibration records",
        ),
        (["quantize=adaround", "quantize.iterations=-1"], "quantize.iterations=-1 must be 1 to"),
        (["model.rescale.sigma=nan"], "model.rescale.sigma=nan must be"),
        (["model.sampler.guidance=inf"], "model.sampler.guidance=inf must be"),
    ],
)
def test_what_is_no_option_is_refused_in_one_line(overrides, said):
    with pytest.raises((UserError, HydraException)) as error:
        compose(*overrides)
    line = one_line(error.value)
    assert said in line and "\n" not in line


def test_options_are_checked_in_python_too():
    with pytest.raises(UserError, match="damping=nan"):
        GptqConfig(damping=float("nan")).check()
    with pytest.raises(UserError, match="clip='best' is not one of mse, minmax, hessian"):
        RtnConfig(clip="best").check()
    with pytest.raises(UserError, match="kind='rtn'"):
        OPTIONS["none"](kind="rtn").check()


def test_a_sweep_over_all_quantizers_leaves_the_schemas_out():
    """Presets are what remains when Hydra expands quantize='glob(*,exclude=base_*)'."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        loader = GlobalHydra.instance().config_loader()
        (override,) = OverridesParser.create(loader).parse_overrides(["quantize=glob(*,exclude=base_*)"])
        assert sorted(override.sweep_string_iterator()) == PRESETS
