"""Recipes that run by the clock: when, what became of each time, and the server that submits."""
