"""Recipes applied: steps in order, saved, reloaded, measured, continued."""
