"""Launching: one plan of a job, from which every kind of launch is made. Free of torch, so that it starts at once."""
