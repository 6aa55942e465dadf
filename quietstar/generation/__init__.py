"""Generation that thinks before each new token, and the gates that say when to."""
