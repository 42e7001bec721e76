"""Distillation: a quantized denoiser learns to give the original's predictions."""
