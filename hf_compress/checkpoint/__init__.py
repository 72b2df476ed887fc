"""How a compressed model is saved: an ordinary checkpoint whose config rebuilds the skeleton."""
