"""Supervised stages that make the embedded models: VAE, text and aesthetic towers, teacher, few-step student."""
