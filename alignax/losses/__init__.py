"""Losses: one file per method, `loss(policy: Scores, batch: Batch, *, ...)`.

A loss returns per-prompt values f32[B] and per-prompt metrics f32[B]; `train.py` takes
the mean over prompts that have a valid response. Module constants say what it reads:
NEEDS (Scores and Batch fields to fill), COUPLED (True if prompts of a step depend on
each other), EMA ({name: initial}, running means it receives as `ema=`), RANGES
({hyper-parameter: interval, such as '(0, inf)'}).
"""
