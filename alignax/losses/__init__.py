"""Losses: one file per method, `loss(policy: Scores, batch: Batch, *, ...)`.

A loss returns values f32[B] and metrics f32[B], one number per prompt.
`alignax/training/gradient.py` takes the mean over the prompts that have a valid response.
Module constants declare what the loss reads: NEEDS (fields of Scores and Batch to fill),
FORMS (the forms of rows that the equation is about, of `batch.FORMS`; a run on rows of
another form is refused before anything compiles), COUPLED (True if the prompts of a step
depend on each other), EMA ({name: initial}, running means that the loss receives as `ema=`),
RANGES ({hyper-parameter: interval, such as '(0, inf)'}) and REQUIRES ({option: value}, what
a config of rollouts must set; `...` is any value but an empty one). Rollouts take the prompts of rows of any form: a loss that
only they serve declares 'prompts'. A loss without FORMS takes every row with a response.

Terms that several losses share are in `alignax/masked.py` (sums and means), `pairs.py`
(chosen and rejected), `lists.py` (rankings), `ratios.py` (rollouts) and `value_heads.py`.

Reading order: sft (one response), dpo and ipo (pairs), kto (single responses with a
label), plackett_luce (rankings), npo (unlearning), policy_gradient and ppo (rollouts),
value_mean (value heads), gkd (distillation). Every other file stands beside one of these.
"""
