"""Weights of tokens or pairs, under any loss: one file per method,
`reweight(policy: Scores, batch: Batch, *, ...) -> (policy, batch, weight f32[B])`, and
metrics as a fourth result where there are any.

`config.reweight = {name: hyper-parameters}` applies them in order before `config.loss`;
the loss's values are multiplied by the weights. NEEDS, FORMS and RANGES as in losses/: the
two together read the forms that both declare.

Reading order: row_weight, wpo, length_desensitised, importance (of rollouts).
"""
