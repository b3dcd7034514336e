"""Rules: what a response is worth by a computation that needs no model. Pure, apart from those that run code."""
