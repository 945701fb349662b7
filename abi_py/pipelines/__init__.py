"""Pipelines: training runs with defaults of their own, and chains of runs.

presets.py       what a DeepZig run takes for settings that are not given, by size
deepzig.py       such a run from Python
recipe.py        what a chain of runs is: a YAML file, read strictly
chain.py         its phases in a directory: what is done, and doing the rest
phase_record.py  what is written of a phase
phase_plan.py    what phases will need
phases.py        a chain from Python
"""

from .deepzig import train_deepzig
from .phases import train_phases
from .presets import ModelSize, deepzig_preset

__all__ = ["ModelSize", "deepzig_preset", "train_deepzig", "train_phases"]
