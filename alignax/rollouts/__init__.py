"""The policy's own responses, drawn, judged and shaped into advantages: RL as a source.

Reading order: sampler (draws and judges responses to a batch of prompts), recorded
(responses of another sampler, from a file), turns (responses of several turns), rollout (scores
and shapes the responses of one rollout), selection (the order of prompts; which groups and
responses are kept), source (batches of the training step, and where a run is in them).
"""
