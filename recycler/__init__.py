"""Decoding with a policy, recording of traces, and what policies do to a model in closed loop.

Torch and transformers are imported with the first name that is used.
"""
