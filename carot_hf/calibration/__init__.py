"""How well probabilities hold what they say, and what mends them."""
