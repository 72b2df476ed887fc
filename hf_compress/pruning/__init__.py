"""Cut: heads, neurons, layers, word pieces and single weights, to a budget."""
