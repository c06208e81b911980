"""Recipes: validate, build, run the stages in order, resume, report."""
