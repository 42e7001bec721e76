"""Students of fewer steps: pairs of noise and image, losses, and one trainer."""
