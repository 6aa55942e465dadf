"""Gates fitted on held-out text: what thinking is worth behind every token, and what it costs."""
