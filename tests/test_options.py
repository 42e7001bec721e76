"""Every numeric option has a range beside its default, and one checker refuses what is outside of it."""

import dataclasses
import math
import typing

import pytest
from composed import compose

from vqdm.config.codecs import OPTIONS, TrellisConfig
from vqdm.config.options import Config
from vqdm.config.ranges import check_fields, number
from vqdm.errors import UserError


def _numeric_fields(kind, prefix=""):
    """(key, field) of every option that can be a number, found by the annotations: another way than the checker's."""
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            yield from _numeric_fields(types[field.name], f"{prefix}{field.name}.")
        elif any(word in str(types[field.name]) for word in ("int", "float")):
            yield f"{prefix}{field.name}", field


def test_every_numeric_option_has_a_range_that_its_default_is_in():
    found = dict(_numeric_fields(Config))
    assert len(found) > 60
    for kind, options in OPTIONS.items():
        found |= {f"{kind}/{key}": field for key, field in _numeric_fields(options)}
    assert not {key for key, field in found.items() if "least" not in field.metadata}
    check_fields(Config(), "")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.rescale.sigma=nan", "model.rescale.sigma=nan must be 0 to 5"),
        ("model.rescale.sigma=-1", "model.rescale.sigma=-1 must be 0 to 5"),
        ("model.sampler.guidance=inf", "model.sampler.guidance=inf must be 0 to 1000"),
        ("model.sampler.steps=0", "model.sampler.steps=0 must be 1 to 10000"),
        ("model.sampler.size=7", "model.sampler.size=7 must be 8 to 16384"),
        ("model.sampler.timestep_spacing=often", "'often' is not one of null, leading, linspace, trailing"),
        ("threads=0", "threads=0 must be 1 to 1024"),
        ("threads=100000", "threads=100000 must be 1 to 1024"),
        ("seeds=0", "seeds=0 must be at least 1"),
        ("calibration.n=0", "calibration.n=0 must be at least 1"),
        ("calibration.seed=-1", "calibration.seed=-1 must be at least 0"),
        ("evaluate.bootstrap=1", "evaluate.bootstrap=1 must be 2 to 1000000"),
        ("finetune.learning_rate=1e308", "finetune.learning_rate=1e+308 must be above 0, up to 10"),
        ("finetune.learning_rate=0", "finetune.learning_rate=0 must be above 0"),
        ("finetune.decay_from=1.5", "finetune.decay_from=1.5 must be 0 to 1"),
        ("finetune.min_snr=nan", "finetune.min_snr=nan must be above 0"),
        ("finetune.trajectories.sampler_steps=[4,0]", "sampler_steps=0 must be 1 to 10000"),
        ("finetune.trajectories.sampler_steps=[]", "samples nothing"),
        ("tiny_train.scenes=0", "tiny_train.scenes=0 must be at least 1"),
        ("tiny_train.turbo_guidance=nan", "tiny_train.turbo_guidance=nan must be 0 to 1000"),
        ("tiny_train.unet_steps=-5", "tiny_train.unet_steps=-5 must be at least 1"),
        ("quantize.bits=nan", "quantize.bits=nan must be"),
        ("quantize.damping=inf", "quantize.damping=inf must be"),
    ],
)
def test_a_number_out_of_its_range_is_refused_in_one_line(override, said):
    with pytest.raises(UserError) as error:
        compose("quantize=trellis3", override)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_student_of_a_rescaled_model_is_refused():
    with pytest.raises(UserError, match=r"few_step learns from a model as it is: set model\.rescale\.sigma=0"):
        compose("few_step=reflow", "model.rescale.sigma=1")


@pytest.mark.parametrize("name", ["bits", "damping", "row_exponent"])
def test_numbers_that_are_none_are_refused_of_a_quantizer_made_in_python(name):
    with pytest.raises(UserError, match=f"{name}=nan must be"):
        TrellisConfig(**{name: math.nan}).check()


@pytest.mark.parametrize(
    ("options", "value", "said"),
    [
        ({"least": 0, "most": 1}, 0, None),
        ({"least": 0, "most": 1}, 1, None),
        ({"least": 0, "most": 1}, 1.5, "x.n=1.5 must be 0 to 1"),
        ({"least": 0, "most": 1, "above": True}, 0, "x.n=0 must be above 0, up to 1"),
        ({"least": 2}, 1, "x.n=1 must be at least 2"),
        ({"most": 2}, 3, "x.n=3 must be at most 2"),
        ({"least": 2}, math.inf, "x.n=inf must be at least 2"),
        ({"least": 2}, None, None),
        ({}, math.nan, "x.n=nan must be a finite number"),
        ({"least": 1}, [2, 0], "x.n=0 must be at least 1"),
    ],
)
def test_a_range_says_what_a_value_must_be(options, value, said):
    kind = dataclasses.make_dataclass("Options", [("n", object, number(None, **options))])
    if said is None:
        check_fields(kind(value), "x")
        return
    with pytest.raises(UserError) as error:
        check_fields(kind(value), "x")
    assert str(error.value) == said
