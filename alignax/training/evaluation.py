"""The evaluations of a config, on the policy as it is at a step."""

import jax

from alignax.batch import LM, Metrics
from alignax.reports import tables
from alignax.reward_functions import time_limit
from alignax.sampling import weights
from alignax.training import build, on_policy, parallel
from alignax.training.build import Run
from alignax.training.plugins import has_rollouts


@weights.kept()
def evaluate(run: Run, lm: LM, lms: dict[str, LM], step: int, config) -> Metrics:
    """Runs the config's evaluations; names are 'eval/<evaluation>/<metric>'."""
    # responses end as those of rollouts do, and the reward has as much time
    ends = on_policy.tables(config, run.tokenizer) if has_rollouts(config) else None
    generate = parallel.generator(run.tokenizer, run.mesh, ends)
    score = parallel.scorer(run.mesh, packed=config.layout != "rows")
    batch_size = config.eval_batch_size or config.batch_size
    out: Metrics = {}
    for name, evaluation in run.evals.items():
        with time_limit.by_default(config.rollout.reward_seconds):
            got = evaluation(
                lm, lms, run.asked.get(name, run.eval_data),
                key=jax.random.key(config.seed), tokenizer=run.tokenizer,
                generate=generate, score=score, batch_size=batch_size,
                length=build.sampled_length(config, evaluation),
            )  # fmt: skip
        out["samples"] = out.get("samples", []) + got.pop("samples", [])
        out |= {f"eval/{name}/{k}": v for k, v in got.items()}
    if out and jax.process_index() == 0:
        run.say(f"evaluation at step {step}\n{tables.table(out)}")
    return out
