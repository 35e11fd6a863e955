"""What is good: one class per reward, and the weighted sum."""
