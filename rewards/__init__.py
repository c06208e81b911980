"""Reward functions, run in killable processes."""
