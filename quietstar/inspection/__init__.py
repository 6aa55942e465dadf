"""Looking at thoughts: every token of a text with the thoughts before it and what they did."""
