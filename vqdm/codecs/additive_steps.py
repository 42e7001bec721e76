"""Parts shared by the recipes for additive codes: the state they change, its loss, search tables, k-means."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vqdm.codecs import additive_kernels as kernels
from vqdm.codecs.kmeans import assign, kmeans


@dataclass
class Parts:
    """A weight being encoded, on the CPU: scale_o · Σ_m codebook_m[code_m] for groups of g inputs."""

    codebooks: Tensor  # fp32 [M, K, g]
    codes: Tensor  # int32 [out, in / g, M]
    scales: Tensor  # fp32 [out]

    def normalised(self) -> Tensor:
        """The decoded weight without scales, Σ_m codebook_m[code_m]: fp32 [out, in]."""
        return decode(self.codebooks, self.codes)

    def decoded(self) -> Tensor:
        return self.scales[:, None] * self.normalised()


def decode(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Decode Σ_m codebook_m[code_m]: [M, K, g] and [out, groups, M] to [out, groups · g], in the codebooks' dtype."""
    decoded = codebooks.new_empty(codes.shape[0], codes.shape[1] * codebooks.shape[2])
    kernels.gather(codebooks.contiguous().numpy(), codes.numpy(), decoded.numpy())
    return decoded


def decode_transposed(gradient: Tensor, codes: Tensor, size: int) -> Tensor:
    """The transpose of `decode`, and so its gradient: [out, in] to [M, size = K, g], a sum for every codeword."""
    sums = gradient.new_zeros(codes.shape[2], size, gradient.shape[1] // codes.shape[1])
    kernels.scatter(gradient.contiguous().numpy(), codes.numpy(), sums.numpy())
    return sums


def row_losses(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """Loss δ H δᵀ of every row δ of weight − decoded: [out]."""
    error = weight - decoded
    return ((error @ hessian) * error).sum(1)


def group_blocks(matrix: Tensor, group_size: int) -> Tensor:
    """The blocks on the diagonal: [in, in] to [groups, g, g]."""
    groups = torch.arange(matrix.shape[0] // group_size, device="cpu")
    return matrix.view(len(groups), group_size, len(groups), group_size)[groups, :, groups].contiguous()


def invert(scales: Tensor) -> Tensor:
    """Inverse scales, with 0 for 0."""
    return torch.where(scales != 0, 1 / scales, 0.0)


def padded_words(codebooks: Tensor) -> Tensor:
    """Codebooks [M, K, g] as the kernels' words [M, g', K']."""
    lanes = kernels.LANES
    size, group_size = codebooks.shape[1:]
    return F.pad(codebooks.transpose(1, 2), (0, -size % lanes, 0, -group_size % lanes)).contiguous()


def codeword_tables(codebooks: Tensor, metrics: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels' images [groups, M, K, g] and norms [groups, M, K'] under the metrics [groups, g, g]."""
    images = torch.einsum("mkd,jde->jmke", codebooks, metrics).contiguous()
    norms = (images.double() * codebooks).sum(-1).float()
    return images, F.pad(norms, (0, -norms.shape[2] % kernels.LANES), value=torch.inf).contiguous()


def residual_kmeans(points: Tensor, count: int, size: int, *, iterations: int, generator: Generator) -> Tensor:
    """Run one k-means after another, each on the residuals of those before: [n, g] to codebooks [count, size, g]."""
    codebooks, residual = [], points
    for _ in range(count):
        codebooks.append(kmeans(residual, size, iterations=iterations, generator=generator))
        residual = residual - codebooks[-1][assign(residual, codebooks[-1])]
    return torch.stack(codebooks)


def subsample(points: Tensor, count: int, generator: Generator) -> Tensor:
    """Draw `count` different rows of [n, g] in random order, or all of them if there are fewer."""
    if points.shape[0] <= count:
        return points
    return points[torch.randperm(points.shape[0], generator=generator, device="cpu")[:count]]
