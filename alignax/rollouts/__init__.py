"""The policy's own responses, drawn, judged and shaped into advantages: RL as a source.

Reading order: sampler (draws and judges a batch of prompts), rollout (from responses to
batches of the training step).
"""
