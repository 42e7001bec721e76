"""Distillation: a quantized denoiser learns to give its teacher's predictions."""
