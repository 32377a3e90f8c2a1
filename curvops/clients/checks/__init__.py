"""The parts of `curvops.check`."""
