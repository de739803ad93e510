"""Memory and time of log-probabilities from hidden states: the kernel beside two plain forms.

  python tests/benchmarks/logprob.py [--rounds 3] [--run 4x256x576x49152 ...]
    [--plan 8x2048x4096x128256 ...] [--dtype float32]

Sizes are N x T x D x V: rows, tokens a row, width, vocabulary; every token but a row's
first is scored. 'optax' is softmax_cross_entropy_with_integer_labels of whole logits,
'naive' a log_softmax of them and a gather. Temporaries are what the compiler plans for the
gradient with respect to hidden states and head, beside its arguments and results; those of
`--plan` are only compiled. Times are medians of rounds in which all three run in turns.
One Markdown table.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax import logprob
from alignax.batch import LM
from alignax.models.transformer import ModelConfig

RUN = ("4x128x576x49152", "4x256x576x49152", "4x256x576x98304", "2x128x2048x32768")
PLAN = ("8x2048x4096x128256",)


def kernel(h, weight, tokens):
    """Our own, as `score` calls it behind the last layer."""
    config = ModelConfig(
        vocab_size=weight.shape[1], width=weight.shape[0], num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=8, mlp_width=8, tied=False,
    )  # fmt: skip
    tiles = (logprob.TOKEN_TILE, logprob.VOCAB_TILE)
    lm, mask = LM(config, {"head": weight}), jnp.ones(tokens.shape, bool)
    return logprob._read(lm, h, tokens, mask, None, tiles, "highest")["logps"][:, 1:]


def whole_logits(h, weight):
    return jnp.einsum(
        "ntd,dv->ntv", h[:, :-1], weight, preferred_element_type=jnp.float32
    )


def with_optax(h, weight, tokens):
    logits = whole_logits(h, weight)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def naive(h, weight, tokens):
    distribution = jax.nn.log_softmax(whole_logits(h, weight), -1)
    return jnp.take_along_axis(distribution, tokens[:, 1:, None], -1)[..., 0]


FORMS = {"alignax": kernel, "optax": with_optax, "naive": naive}


def compiled(form, size, dtype):
    """(value, gradient, MiB of the gradient's temporaries), compiled."""
    n, t, d, v = size
    shapes = (
        jax.ShapeDtypeStruct((n, t, d), dtype),
        jax.ShapeDtypeStruct((d, v), dtype),
        jax.ShapeDtypeStruct((n, t), jnp.int32),
    )
    grad = jax.grad(lambda *a: form(*a).sum(), (0, 1))
    value, slope = (jax.jit(f).lower(*shapes).compile() for f in (form, grad))
    return value, slope, slope.memory_analysis().temp_size_in_bytes / 2**20


def seconds(function, *args):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def measure(size, dtype, rounds):
    """{form: (MiB, seconds of the value, seconds of the gradient)}."""
    n, t, d, v = size
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(0, 1, (n, t, d)), dtype)
    weight = jnp.asarray(rng.normal(0, d**-0.5, (d, v)), dtype)
    tokens = jnp.asarray(rng.integers(0, v, (n, t)), jnp.int32)
    ready = {name: compiled(form, size, dtype) for name, form in FORMS.items()}
    times = {name: ([], []) for name in FORMS}
    first = {}
    for i in range(rounds + 1):
        for name, (value, grad, _) in ready.items():
            taken = [seconds(f, h, weight, tokens) for f in (value, grad)]
            if not i:  # warm, and the same numbers
                first[name] = np.asarray(value(h, weight, tokens))
                continue
            for into, one in zip(times[name], taken, strict=True):
                into.append(one)
    loose = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
    for name in ("optax", "naive"):
        np.testing.assert_allclose(
            first["alignax"], first[name], rtol=loose, atol=loose
        )
    return {
        name: (ready[name][2], *(statistics.median(x) for x in times[name]))
        for name in FORMS
    }


def sizes(words):
    return [tuple(int(x) for x in word.split("x")) for word in words]


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--run", nargs="*", default=RUN)
    args.add_argument("--plan", nargs="*", default=PLAN)
    args.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = args.parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, {args.dtype}, medians of {args.rounds}\n")
    head = "| N | T | D | V | form | temporaries MiB | value ms | gradient ms |"
    print(head, "|---" * 8 + "|", sep="\n", flush=True)

    def row(size, name, mib, value="", grad=""):
        ms = [f"{1e3 * x:.0f}" if x else "" for x in (value, grad)]
        cells = [*map(str, size), name, f"{mib:,.0f}", *ms]
        print("| " + " | ".join(cells) + " |", flush=True)

    for size in sizes(args.run):
        for name, found in measure(size, args.dtype, args.rounds).items():
            row(size, name, *found)
    for size in sizes(args.plan):
        for name, form in FORMS.items():
            row(size, name, compiled(form, size, args.dtype)[2])


if __name__ == "__main__":
    sys.exit(main())
