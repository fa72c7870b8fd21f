"""Launching: one plan of a job, rendered for every launch target. Imports no torch, for a fast start."""
