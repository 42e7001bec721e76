"""The published recipe for additive codes: Adam on codebooks and scales alternates with a beam search over whole rows.

It follows VQDM's released code (yandex-research/vqdm 047b4db, src/aq.py and aq_engine.py), in fp32, with running
products where that code decodes the layer anew. As there, Adam's state outlives an epoch, and the first loss of an
epoch decides on stopping, so that a search comes last. Unlike there, k-means starts from k-means++ instead of random
points, input scales (off by default in both) are not trained, and values are stored in fp16, rounded at the very end
without choosing codes anew.
"""

import torch
from torch import Generator, Tensor

from vqdm.codecs import additive_kernels as kernels
from vqdm.codecs.additive_steps import (
    Parts,
    codeword_tables,
    decode,
    decode_transposed,
    group_blocks,
    invert,
    padded_words,
    residual_kmeans,
)
from vqdm.codecs.kmeans import assign
from vqdm.weights.base import LARGEST, STORED

KMEANS_ITERATIONS = 100
EPOCHS, STEPS = 100, 100  # the most epochs; Adam steps in each
LEAST_GAIN = 0.01  # an epoch that gains less is the last
ADAM = {"lr": 1e-4, "betas": (0.0, 0.95), "amsgrad": True}
ROWS = 8  # rows searched together: their beams' running products fit into the cache


def encode_paper(
    weight: Tensor,
    hessian: Tensor,
    *,
    num_codebooks: int,
    codebook_size: int,
    group_size: int,
    generator: Generator,
    beam_size: int,
) -> Parts:
    """Codes, codebooks and scales, the last two as fp16 stores them, for a weight [out, in] and a Hessian [in, in]."""
    parts = initial_parts(weight, num_codebooks, codebook_size, group_size, generator=generator)
    optimizer = torch.optim.Adam([parts.codebooks, parts.scales], **ADAM)
    best = float("inf")
    for _ in range(EPOCHS):
        loss = set_gradients(weight, hessian, parts)
        if not loss < (1 - LEAST_GAIN) * best:
            break
        best = loss
        for step in range(STEPS):
            if step:
                set_gradients(weight, hessian, parts)
            optimizer.step()
        search_rows(weight, hessian, parts, generator=generator, beam_size=beam_size)
    codebooks, scales = (x.clamp(-LARGEST, LARGEST).to(STORED).float() for x in (parts.codebooks, parts.scales))
    return Parts(codebooks, parts.codes, scales)


def initial_parts(
    weight: Tensor, num_codebooks: int, codebook_size: int, group_size: int, *, generator: Generator
) -> Parts:
    """Initial scales are the rows' L2 norms; codebooks come from residual k-means on groups of the normalised rows."""
    scales = weight.norm(dim=1)
    residual = (weight * invert(scales)[:, None]).view(-1, group_size)
    codebooks = residual_kmeans(
        residual, num_codebooks, codebook_size, iterations=KMEANS_ITERATIONS, generator=generator
    )
    codes = torch.empty(len(residual), num_codebooks, dtype=torch.int32, device="cpu")
    for m, words in enumerate(codebooks):
        codes[:, m] = assign(residual, words)
        residual = residual - words[codes[:, m].long()]
    return Parts(codebooks, codes.view(weight.shape[0], -1, num_codebooks), scales)


def set_gradients(weight: Tensor, hessian: Tensor, parts: Parts) -> float:
    """Compute the loss tr((Q − W) H (Q − W)ᵀ) / out, and put its gradients into `grad` of codebooks and scales."""
    normalised = decode(parts.codebooks, parts.codes)
    error = parts.scales[:, None] * normalised - weight
    product = error @ hessian
    gradient = product * (2 / weight.shape[0])
    parts.scales.grad = (gradient * normalised).sum(1)
    parts.codebooks.grad = decode_transposed(gradient * parts.scales[:, None], parts.codes, parts.codebooks.shape[1])
    return float((product * error).sum() / weight.shape[0])


def search_rows(weight: Tensor, hessian: Tensor, parts: Parts, *, generator: Generator, beam_size: int) -> None:
    """Run one beam search over every row, its groups and codebooks in random order; changes `parts.codes`."""
    groups, count = parts.codes.shape[1:]
    order = torch.randperm(groups, generator=generator, device="cpu")
    turns = torch.stack([torch.randperm(count, generator=generator, device="cpu") for _ in range(groups)])
    product = (weight - parts.decoded()) @ hessian
    images, norms = codeword_tables(parts.codebooks, group_blocks(hessian, parts.codebooks.shape[2]))
    tables = [t.numpy() for t in (parts.codebooks, padded_words(parts.codebooks), images, norms)]
    inverse = invert(parts.scales)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        kernels.search_rows(
            product[rows].numpy(),
            hessian.numpy(),
            inverse[rows].numpy(),
            parts.scales[rows].numpy(),
            *tables,
            parts.codes[rows].numpy(),
            order.numpy(),
            turns.numpy(),
            beam_size,
        )
