"""What a single file says of its training is believed; what it does not say is assumed, and that is said."""

import logging
from pathlib import Path

import pytest

from vqdm.models.training import EDM, VELOCITY, ZERO_SNR, differs, few_step_kind, say_assumption, trainings

SDXL = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("keys", "metadata", "found"),
    [
        ([], {}, []),
        (["v_pred"], {}, [VELOCITY]),
        (["ztsnr"], {}, [ZERO_SNR]),
        (["v_pred", "ztsnr"], {}, [VELOCITY, ZERO_SNR]),
        (["edm_vpred.sigma_max", "edm_vpred.sigma_min"], {}, [EDM]),
        (["edm_mean", "edm_std"], {}, [EDM]),
        ([], {"modelspec.prediction_type": "epsilon"}, ["epsilon"]),
        ([], {"modelspec.prediction_type": "v"}, [VELOCITY]),
        ([], {"modelspec.prediction_type": "v_prediction"}, [VELOCITY]),
        ([], {"modelspec.predict_key": "v"}, [VELOCITY]),
        ([], {"modelspec.prediction_type": "flow"}, ["'flow' prediction"]),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, [VELOCITY]),  # a merge with another model's metadata
        (["ztsnr"], {"modelspec.prediction_type": "v"}, [ZERO_SNR, VELOCITY]),
        ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "False"}, [VELOCITY]),
    ],
)
def test_what_a_file_says(keys, metadata, found):
    assert list(trainings(keys, metadata)) == found
    other = [kind for kind in found if kind != "epsilon"]
    assert (differs(SDXL, keys, metadata) or "").startswith(other[0] if other else "")
    assert bool(differs(SDXL, keys, metadata)) == bool(other)


def test_a_scheduler_for_the_training_is_taken():
    velocity = {"prediction_type": "v_prediction"}
    assert differs(velocity, ["v_pred"], {}) is None
    assert differs(velocity, ["v_pred", "ztsnr"], {}) == "zero terminal SNR (ztsnr)"
    assert differs(velocity | {"rescale_betas_zero_snr": True}, ["v_pred", "ztsnr"], {}) is None
    assert differs({"_class_name": "EDMEulerScheduler"}, ["edm_vpred.sigma_max"], {}) is None
    assert differs(velocity, [], {"modelspec.prediction_type": "epsilon"}).startswith("epsilon")


def test_turbo_is_told_by_metadata_or_name(caplog):
    assert few_step_kind(Path("a/x.safetensors"), {}) == ("sdxl", None)
    assert few_step_kind(Path("turbo/x.safetensors"), {}) == ("sdxl", None)
    assert few_step_kind(Path("sd_xl_turbo_1.0_fp16.safetensors"), {}) == ("sdxl_turbo", "its name")
    assert few_step_kind(Path("x.safetensors"), {"modelspec.resolution": "512x512"})[0] == "sdxl_turbo"
    assert few_step_kind(Path("x.safetensors"), {"modelspec.title": "SDXL Turbo"})[1] == "its modelspec.title"
    with caplog.at_level(logging.WARNING, "vqdm"):
        for _ in range(2):
            say_assumption(Path("plain.safetensors"), "sdxl", None)
        say_assumption(Path("turbo.safetensors"), "sdxl_turbo", "its name")
    assert len(caplog.messages) == 2
    assert all("model.configs=sdxl" in line for line in caplog.messages)
