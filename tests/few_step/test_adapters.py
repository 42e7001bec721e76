"""HiPA's frequencies on waves that are known, and its adapter as a file that any pipeline loads."""

import torch
from diffusers import StableDiffusionXLPipeline
from unets import output, small_unet

from vqdm.few_step.adapters import add_adapter, edges, high_pass, save_adapter


def wave(cycles: float) -> torch.Tensor:
    """A cosine along a row of 32 pixels: [1, 3, 32, 32]."""
    return torch.cos(2 * torch.pi * cycles * torch.arange(32) / 32).expand(1, 3, 32, 32)


def test_slow_waves_are_taken_out_and_fast_ones_kept():
    torch.testing.assert_close(high_pass(5 + wave(3)), torch.zeros(1, 3, 32, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(high_pass(wave(3) + wave(10)), wave(10), atol=1e-5, rtol=0)


def test_edges_are_the_length_of_the_slope():
    plane = 3 * torch.arange(8.0)[:, None] + 4 * torch.arange(8.0)[None]
    torch.testing.assert_close(edges(plane.expand(1, 3, 8, 8)), torch.full((1, 3, 7, 7), 5.0), atol=1e-4, rtol=0)


def test_an_adapters_file_makes_the_student_of_its_teacher(tmp_path):
    student = small_unet()
    optimizer = add_adapter(student, rank=2, seed=0, rate=1e-3)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.data.add_(0.1)
    trained, before = output(student), output(small_unet())
    save_adapter(StableDiffusionXLPipeline.__new__(StableDiffusionXLPipeline), student, tmp_path)
    assert student.state_dict().keys() == small_unet().state_dict().keys()
    torch.testing.assert_close(output(student), trained, atol=1e-4, rtol=1e-4)
    other = small_unet()
    other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    torch.testing.assert_close(output(other), trained, atol=2e-3, rtol=2e-3)  # the file is fp16
    assert (trained - before).abs().max() > 0.01
