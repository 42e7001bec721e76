"""Codebooks of a model are the same by other kernels, as another processor would take them."""

import hashlib
import os
import subprocess
import sys

import pytest

OTHER = {  # of a processor without AVX-512, and MKL's path for all
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE",
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "",
}  # fmt: skip
PROGRAM = """
import sys, torch
from vqdm.codecs.additive import train_shared_codebooks
from vqdm.seeds import torch_generator
weights = [torch.randn(96, 64, generator=torch_generator(i, "weights"), device="cpu") for i in range(4)]
for weight in weights:
    weight.mul_(1024).round_().div_(1024)  # drawn numbers differ by processor, too
shared = train_shared_codebooks(weights, num_codebooks=3, codebook_bits=6, generator=torch_generator(0, "train"))
product = weights[0] @ weights[1].T + torch.nn.functional.softmax(weights[2], 1) @ weights[3].T
for tensor in (product, *shared.state_dict().values()):
    sys.stdout.buffer.write(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() + b"|||")
"""


@pytest.mark.slow
def test_other_kernels_learn_the_same_codebooks():
    found = []
    for variables in ({}, OTHER):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, check=True, env=os.environ | variables
        )
        found.append([hashlib.sha256(part).hexdigest() for part in done.stdout.split(b"|||")])
    assert found[0][1:] == found[1][1:]
    assert found[0][0] != found[1][0], "these kernels add in the same order: this test shows nothing here"
