"""Signs of how a single-file model was trained: keys without weights, and the writer's metadata.

Sources: ComfyUI (v_pred, ztsnr, edm_…), Stability's modelspec (github.com/Stability-AI/ModelSpec), kohya's sd-scripts.
"""

import functools
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

EPSILON, VELOCITY, ZERO_SNR, EDM = "epsilon", "v-prediction", "zero terminal SNR", "EDM preconditioning"
_WORDS = {
    EPSILON: ("epsilon", "eps", "e", "noise"),
    VELOCITY: ("v", "vpred", "vprediction", "velocity"),
    EDM: ("edm", "edmvpred", "edmvprediction"),
}
_PREDICTION = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "predict_key")
_SWITCHES = {"ss_v_parameterization": VELOCITY, "ss_zero_terminal_snr": ZERO_SNR, "ss_zsnr": ZERO_SNR}
_FEW_STEPS = re.compile(r"turbo", re.IGNORECASE)
log = logging.getLogger("vqdm")


def trainings(keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """{training: the sign of it} for all that a file says; empty if it says nothing.

    A key that tells the prediction outweighs the metadata, which merges copy from one of their parts.
    """
    found: dict[str, str] = {}
    for key in keys:
        name = key.rpartition(".")[2] if key.endswith((".v_pred", ".ztsnr")) else key
        if name == "v_pred":
            found.setdefault(VELOCITY, key)
        elif name == "ztsnr":
            found.setdefault(ZERO_SNR, key)
        elif key.startswith("edm_"):
            found.setdefault(EDM, key)
    for key in () if found.keys() - {ZERO_SNR} else _PREDICTION:
        if value := metadata.get(key):
            word = re.sub(r"[^a-z0-9]", "", value.lower())
            kind = next((kind for kind, words in _WORDS.items() if word in words), f"{value[:40]!r} prediction")
            found.setdefault(kind, f"{key}={value[:40]}")
    for key, kind in _SWITCHES.items():
        if str(metadata.get(key)).lower() in ("true", "1"):
            found.setdefault(kind, f"{key}={metadata[key]}")
    return found


def differs(scheduler: Mapping, keys: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Words for how the training that a file names differs from a scheduler's settings; None if they agree.

    scheduler: the content of its config; empty for one of SDXL's, which predicts noise.
    """
    own = {{"v_prediction": VELOCITY, "epsilon": EPSILON}.get(scheduler.get("prediction_type", "epsilon"), "another")}
    if str(scheduler.get("_class_name", "")).startswith("EDM"):
        own = {EDM, VELOCITY, EPSILON}
    if scheduler.get("rescale_betas_zero_snr"):
        own.add(ZERO_SNR)
    found = trainings(keys, metadata)
    return next((f"{kind} ({source})" for kind, source in found.items() if kind not in own), None)


def few_step_kind(path: Path, metadata: Mapping[str, str]) -> tuple[str, str | None]:
    """(shipped configs, the sign for them) for a file with SDXL's keys: those of SDXL, or of SDXL-Turbo."""
    for key in ("modelspec.architecture", "modelspec.title", "modelspec.description", "modelspec.implementation"):
        if _FEW_STEPS.search(metadata.get(key, "")):
            return "sdxl_turbo", f"its {key}"
    if str(metadata.get("modelspec.resolution", "")).startswith("512"):
        return "sdxl_turbo", "its modelspec.resolution"
    if _FEW_STEPS.search(path.name):
        return "sdxl_turbo", "its name"
    return "sdxl", None


@functools.cache
def say_assumption(path: Path, chosen: str, reason: str | None) -> None:
    """Log, once for each file, which configs are taken and the option that changes it."""
    if reason is None:
        log.warning(
            "%s does not say how it was trained: taken for %s, predicting noise; model.configs=sdxl_turbo (or sdxl, "
            "or DIR) says otherwise, a few-step model also needs its own model.sampler",
            path,
            chosen,
        )
    else:
        log.warning(
            "%s is taken for %s, by %s; model.configs=sdxl (or DIR) says otherwise. As model=sdxl_turbo it wants "
            "model.sampler.scheduler=native model.sampler.steps=4 model.sampler.guidance=0",
            path,
            chosen,
            reason,
        )
