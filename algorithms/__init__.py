"""How to learn: pure losses, advantages, and the algorithms made of them."""
