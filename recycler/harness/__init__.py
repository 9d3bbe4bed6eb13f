"""A model for EleutherAI's lm-evaluation-harness that decodes with a policy; needs the extra `lm-eval`."""
