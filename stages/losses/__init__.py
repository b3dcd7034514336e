"""All equations, as pure functions. Losses are sums, never means; which items count is the caller's choice."""
