"""From raw text to packed shards: tokenizer training, the builder, verification, inspection; never torch."""
