"""Recipes: one model, its data and its command line in each file."""
