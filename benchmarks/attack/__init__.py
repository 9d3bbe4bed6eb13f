"""Attacks on what the project promises: nothing lost, nothing let in. See docs/reliability.md."""
