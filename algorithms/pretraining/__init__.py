"""Supervised stages that make the embedded models: VAE, text and aesthetic towers, teachers, student."""
