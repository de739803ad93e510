"""Evaluations: `evaluate(lm, lms, data, *, ...) -> Metrics`, one file per evaluation.

`data` is a sequence of Examples. The run passes `key`, `tokenizer`, `generate`
(decode.generate with the tokenizer's EOS set), `score` (the compiled kernel: host batch
in, host Scores out), `batch_size` and `length`; every other keyword of a function is a
hyper-parameter. A file may define `check(lms, data, *, ...)`, of the names of the LMs and
the hyper-parameters: it raises ValueError before the run begins. A metric 'x' with an
interval comes with 'x/lo' and 'x/hi' (95 %); 'samples' holds rows of text.

Reading order: ranking_accuracy and perplexity (scores of given responses), win_rate and
sample (responses of the policy), pass_at_k, inference_win_rate (after best-of-N or worst-of-N),
arena (several models or decoders), honesty; unlearning and memorisation (of a model that
was to forget), token_shift, exploitation, bon_jailbreak.
"""
