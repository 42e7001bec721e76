"""The version of every stage's code, which enters its identity.

A number is raised whenever the code may give other output from the same settings.
"""

from vqdm.runs.stage import Stage

VERSIONS = {
    "pairs": 1,
    "few_step": 1,
    "calibrate": 1,
    "scores": 1,
    "prune": 1,
    "sensitivity": 1,
    "quantize": 4,
    "peer": 1,
    "tune_blocks": 2,
    "trajectories": 1,
    "finetune": 2,
    "matched": 1,  # a finetune stage, by distribution matching
    "parts": 1,
    "schedule": 1,
    "activations": 1,
    "correct": 1,
    "generate": 2,
    "features": 1,
    "evaluate": 4,
    "tiny_train": 1,
}


def new_stage(name: str, label: str, settings: dict, **upstream: Stage | str) -> Stage:
    return Stage(name, VERSIONS[name], label, settings, upstream)
