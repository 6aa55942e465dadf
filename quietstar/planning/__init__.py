"""How much memory a run will need, found out without the weights and without a GPU."""
