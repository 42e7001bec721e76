"""Fewer and cheaper calls of a denoiser: cached features, quantized activations, operators that are gone."""
