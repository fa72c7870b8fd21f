"""Evaluation of exported models: held-out loss, perplexity, retrieval tasks, throughput."""
