"""Recipes: run from the command line or Python, resumed, and reported on."""
