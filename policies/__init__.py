"""Who acts: the causal transformer, its caches, the TensorDict policy and what adapts it."""
