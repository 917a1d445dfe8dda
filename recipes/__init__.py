"""Recipes: each file has one model, its data and its command line."""
