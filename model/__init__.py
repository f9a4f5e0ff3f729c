"""The transformer and all that carries it: checkpoints, tokenizer, sampling engine, packing, the training step."""
