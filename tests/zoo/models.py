"""All models of the zoo."""

from zoo import attention, experts, objectives, recurrent, structure, vision
from zoo.entries import ZOO, Entry

__all__ = ["ZOO", "Entry", "attention", "experts", "objectives", "recurrent", "structure", "vision"]
