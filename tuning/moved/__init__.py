"""Paths that the documents of 0.1 named, until 0.3: each warns where to go, and gives what is there now.

The package's `__path__` has this folder, so `import tuning.hindsight` finds `tuning/moved/hindsight.py`.
"""
