"""What must hold before and at the first step; a run that fails one of these stops.

A cached log-probability is that of the reference. Where the reference is the initial
policy in the same dtype, the two agree exactly, and the jitted training step agrees with them.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from alignax import masked
from alignax.batch import COMPARED, Metrics, Scores
from alignax.inputs.annotate import annotate
from alignax.models.transformer import ModelConfig
from alignax.training import on_policy, parallel


def start_check(config, run, state, batch, writer) -> bool:
    """What must hold before step 0: a cache is the reference's, and it the policy.

    The latter where the reference is the initial policy, and exactly. Of a reference in
    another dtype (model.frozen_dtype), or in int8, the difference is reported.

    Returns:
      Whether policy and reference are the same.

    Raises:
      RuntimeError: a cached log-prob is not the reference's, or a log-ratio differs
        from 0; nothing trained from here would mean what its config says.
    """
    # With reference_data the two read different prompts.
    if "ref_logps" not in run.loss.needs or config.reference_data:
        return False
    lms, needs = run.frozen(state.average), run.loss.needs
    read = tuple(n for n in needs if n in Scores._fields and n != "logps")
    temperature = on_policy.temperature(config, run.loss.needs)
    more = {"grammar": run.grammar.flag} if run.grammar else {}
    score: Callable = functools.partial(
        parallel.compiled_score(run.mesh, (), temperature), **more
    )
    cached = batch.ref_logps
    if cached is None and config.lms.get("ref") != "init":
        return False
    batch = annotate(batch._replace(ref_logps=None), lms, needs=needs, score=score)
    if cached is not None:
        largest = float(jnp.abs(cached - batch.ref_logps).max())
        where = "reference_cache" if config.reference_cache else ""
        check_cache(largest, run.policy.config, where)
    if config.lms.get("ref") != "init":
        return False
    score = parallel.compiled_score(run.mesh, read, temperature)
    ours = run.assemble(state.params, run.lms)
    compared = {"kl_to": lms["ref"]} if {*read} & {*COMPARED} else {}
    policy: Scores = score(ours, batch, **compared, **more)
    largest = float(jnp.abs(policy.logps - batch.ref_logps).max())
    given = {"ema": state.ema} if run.loss.ema else {}
    value = float(
        masked.mean(run.loss(policy, batch, **given)[0], masked.prompts(batch))
    )
    writer.write(0, {"start/loss": value, "start/log_ratio": largest})
    # Beside adapters the reference is the policy's own base. In int8 the compiler may round
    # the product with a scale together with the adapters' sum, or apart.
    frozen = config.model.frozen_dtype
    exact = frozen in ("", config.model.param_dtype)
    exact |= bool(config.lora.rank) and frozen != "int8"
    whose = "=" if exact else f"and {config.model.frozen_dtype}"
    run.say(
        f"step 0: policy {whose} reference: largest log-ratio {largest:g}, loss {value:.7f}"
    )
    if not exact:
        return False
    if largest != 0:
        raise RuntimeError(
            f"policy and reference differ by {largest:g} nats on one token before the first step"
        )
    return True


def check_cache(largest: float, model: ModelConfig, where: str) -> None:
    """Raises RuntimeError if log-probs that a batch brings are not the reference's.

    They come from a file (`where`) or from the source itself. A row may have stood in a
    batch of another shape: rounding may differ.
    """
    bound = 1e-3 if model.dtype == "float32" else 0.5  # nats per token
    if largest > bound:
        found = f"{largest:g} nats off on one token, beyond {bound}"
        if where:
            raise RuntimeError(f"{where} is {found}: delete it")
        raise RuntimeError(
            f"what the source says of the reference is {found}: this is a bug of the source"
        )


def close_to_start(metrics: Metrics, model: ModelConfig) -> None:
    """The training program itself must agree with step 0 within its dtype.

    Raises:
      RuntimeError: a mean log-ratio of the first step is beyond the bound.
    """
    bound = (
        1e-2 if model.dtype == "float32" else 1.0
    )  # nats per response, summed over T
    for name in ("log_ratio_chosen", "log_ratio_rejected"):
        if name in metrics and abs(float(metrics[name])) > bound:
            raise RuntimeError(
                f"first step: {name} is {float(metrics[name]):g} nats, beyond {bound} for "
                f"{model.dtype}, though policy and reference are the same"
            )
