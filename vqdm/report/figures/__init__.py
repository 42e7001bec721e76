"""Figures from frames and run records: functions of plain data that return a matplotlib Figure, and `save`.

matplotlib is imported only when something is drawn; pyplot, with its global state, never.
"""

from vqdm.report.figures.collection import figures_of
from vqdm.report.figures.layers import layer_map
from vqdm.report.figures.losses import loss_curves
from vqdm.report.figures.pareto import pareto
from vqdm.report.figures.style import save
from vqdm.report.figures.timesteps import timestep_errors

__all__ = ["figures_of", "layer_map", "loss_curves", "pareto", "save", "timestep_errors"]
