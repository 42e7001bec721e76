"""f-distill's weights against second derivatives of the divergences, and its loss against plain matching."""

import copy

import pytest
import torch
from test_train import SCHEDULER, write_pairs
from unets import small_unet

from vqdm.few_step.divergences import BINS, WEIGHTS, Discriminator, Divergence
from vqdm.few_step.losses import Matching, Schedule
from vqdm.few_step.pairs import read_pairs

GENERATORS = {  # f(r) of D_f = E_student f(p_teacher / p_student)
    "rkl": lambda r: -r.log(),
    "fkl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "sh": lambda r: (1 - r.sqrt()).square(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 1 / r - 1,
}


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_a_weight_is_the_ratio_squared_times_the_second_derivative(divergence):
    ratios = torch.tensor([0.2, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(GENERATORS[divergence](ratios).sum(), ratios, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), ratios)
    quotient = WEIGHTS[divergence](ratios.detach()) / (ratios.detach().square() * bend)
    torch.testing.assert_close(quotient, quotient[:1].expand_as(quotient))


def test_the_reverse_divergence_without_an_adversary_is_plain_matching(tmp_path):
    pairs = read_pairs(write_pairs(tmp_path / "pairs.safetensors"), [0, 3, 5], device="cpu")
    student, teacher, critic = (small_unet() for _ in range(3))
    next(critic.parameters()).data.mul_(0.9)
    matching = Matching(teacher, critic, guidance=3.0)
    head = Discriminator(teacher.config.block_out_channels[-1], seed=0)
    weighted = Divergence(matching, head, "rkl", 0.0)
    schedule = Schedule(SCHEDULER.alphas_cumprod)
    losses = [
        loss(student, pairs, schedule, torch.Generator().manual_seed(4)) for loss in (matching.loss, weighted.loss)
    ]
    torch.testing.assert_close(*losses)


def test_the_discriminator_learns_to_tell_the_two_and_its_ratio_is_relative_to_the_time(tmp_path):
    pairs = read_pairs(write_pairs(tmp_path / "pairs.safetensors"), range(8), device="cpu")
    teacher = small_unet().requires_grad_(False)
    head = Discriminator(teacher.config.block_out_channels[-1], seed=0)
    weighted = Divergence(Matching(teacher, copy.deepcopy(teacher), guidance=3.0), head, "fkl", 0.0)
    schedule, optimizer = Schedule(SCHEDULER.alphas_cumprod), torch.optim.Adam(head.parameters(), lr=1e-2)
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        found.append(weighted.discriminator_loss(small_unet(), pairs, schedule, torch.Generator().manual_seed(0)))
        found[-1].backward()
        optimizer.step()
    assert found[-1] < found[0]
    parts = torch.tensor([0, 0, 9])
    weights = head.weights(torch.tensor([0.0, 0.0, 2.0]), parts, divergence="fkl")
    assert len(head.means) == BINS and head.means[9] > 1 and head.means[0] == 1
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[2] / weights[0], torch.tensor(2.0).exp() / head.means[9])
