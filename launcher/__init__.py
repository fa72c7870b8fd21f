"""Launching: one plan of a job, rendered for every launch target. Free of torch, so that it starts at once."""
