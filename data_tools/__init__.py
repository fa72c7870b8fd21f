"""Dataset tools: tokenizer training, and building, verification, repair and inspection of shards. Free of torch."""
