"""Machines, not maths: Ray, preflight, run folders, lineage, tracking."""
