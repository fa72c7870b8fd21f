"""Diagnosis of a machine or cluster, and memory estimates for a run."""
