"""Collectives, signals and exit reports of the ranks of a job."""
