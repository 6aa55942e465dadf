"""Thoughts: where they go, the noise they draw from, and the loops that sample them."""
