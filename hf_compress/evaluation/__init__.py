"""MEASURE: what a compressed model costs and what it kept of its teacher."""
