"""VQDM: vector quantization of text-to-image diffusion models. Importing it costs nothing and imports no torch."""

from vqdm._torchvision import install_cure

__version__ = "0.1.0"

install_cure()
