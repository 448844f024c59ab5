"""Trains from scratch and scores, to find out what a recipe learns: docs/results.md."""
