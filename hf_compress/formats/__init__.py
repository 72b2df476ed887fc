"""Number formats: modules that compute with weights that are no floating-point numbers."""
