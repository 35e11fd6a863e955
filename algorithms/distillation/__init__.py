"""Step 1 of the paper: a bidirectional teacher, distilled into a causal few-step student."""
