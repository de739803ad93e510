"""One accelerator: kernel parity, DPO steps in bfloat16 and decoding, as Markdown rows.

  python tests/benchmarks/accelerator.py            a table at a size that a CPU can do
  launch/gpu_check.sh                               the whole table, on a GPU
  python tests/benchmarks/accelerator.py parity | dpo SIZE | decode SIZE
    [--pairs 8] [--length 512] [--steps 10]

'parity' compares log-probabilities and their gradients, of hidden states and head, with
float64 numpy; where one is off by more than its share of the largest (BOUNDS) the exit
code is 1. 'dpo' is the training step with an online reference: weights of the shape of a
known model, drawn at random, float32 parameters, bfloat16 computation, AdamW; tokens/s
counts real tokens (prompt and both responses; rows are full), model FLOPs are 6 a
parameter and token for the policy and 2 for the reference, and a share of the peak is said
where the device's is known. Peak memory is the device's own count. Medians of `--steps`
after the first two.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from alignax import logprob, plugin
from alignax.batch import LM, from_pairs
from alignax.models import sharding, transformer
from alignax.models.transformer import ModelConfig
from alignax.reports import metrics
from alignax.sampling import decode
from alignax.training import optim
from alignax.training.step import init_state, make_train_step

SIZES = {
    "tiny": dict(vocab_size=512, width=64, num_layers=2, num_heads=4, num_kv_heads=2,
                 head_dim=16, mlp_width=128),
    "135M": dict(vocab_size=49_152, width=576, num_layers=30, num_heads=9, num_kv_heads=3,
                 head_dim=64, mlp_width=1536),
    "360M": dict(vocab_size=49_152, width=960, num_layers=32, num_heads=15, num_kv_heads=5,
                 head_dim=64, mlp_width=2560),
    "1B": dict(vocab_size=128_256, width=2048, num_layers=16, num_heads=32, num_kv_heads=8,
               head_dim=64, mlp_width=8192),
}  # fmt: skip

# Largest difference from float64, as a share of the largest value: of log-probabilities
# and of the gradients, which have the inputs' type.
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (1e-4, 2**-7)}


def model(size, dtype="bfloat16", **more):
    """A model of a known shape, with random weights in float32."""
    config = ModelConfig(**SIZES[size], tied=True, max_length=8192, dtype=dtype, **more)
    draw = jax.jit(lambda key: transformer.init(config, key))
    return LM(config, draw(jax.random.key(0)))


def parity(_):
    """Rows (what, largest difference) against float64 numpy, in nats.

    Raises:
      ArithmeticError: after the last one, if some are over their bounds.
    """
    n, t, d, v = 2, 65, 128, 5000
    rng = np.random.default_rng(0)
    h = rng.normal(0, 1, (n, t, d))
    weight = rng.normal(0, d**-0.5, (d, v))
    tokens = rng.integers(0, v, (n, t))
    mask = np.ones((n, t), bool)
    config = ModelConfig(
        vocab_size=v, width=d, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        mlp_width=8, tied=False,
    )  # fmt: skip

    def ours(h, weight):
        tiles = (64, 1024)
        lm = LM(config, {"head": weight})
        read = logprob._read(lm, h, tokens, mask, None, tiles, "highest")
        return read["logps"]

    wrong = []
    for dtype, (least, slope) in BOUNDS.items():
        x, w = (jnp.asarray(a, dtype) for a in (h, weight))
        exact = oracle(*(np.asarray(a, np.float64) for a in (x, w)), tokens)
        value = jax.jit(ours)(x, w)
        slopes = jax.jit(jax.grad(lambda x, w: ours(x, w).sum(), (0, 1)))(x, w)
        for what, a, b, bound in zip(
            ("log-probability", "gradient of hidden states", "gradient of the head"),
            (value, *slopes), exact, (least, slope, slope), strict=True,
        ):  # fmt: skip
            said, within = difference(np.asarray(a, np.float64), b, bound)
            if not within:
                wrong.append(f"{what}, {dtype}")
            yield f"{what}, {dtype}", said
    if wrong:
        raise ArithmeticError(f"over their bounds: {'; '.join(wrong)}")


def difference(found, exact, share):
    """(the largest difference in words, whether it is at most a share of the largest)."""
    off, largest = np.abs(found - exact).max(), np.abs(exact).max()
    within = bool(off <= share * largest)  # not of a NaN
    most = f"at most {share * largest:.2g}" + ("" if within else ": **over**")
    return f"{off:.2g} of {largest:.3g}, {most}", within


def oracle(h, weight, tokens):
    """(log p, its gradients) in float64, from the formula."""
    z = h[:, :-1] @ weight
    z -= z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    hit = np.eye(weight.shape[1])[tokens[:, 1:]]
    logps = np.pad((np.log(p) * hit).sum(-1), ((0, 0), (1, 0)))
    slope = hit - p
    dh = np.pad(slope @ weight.T, ((0, 0), (0, 1), (0, 0)))
    return logps, dh, np.einsum("ntd,ntv->dv", h[:, :-1], slope)


def peak_memory():
    """GiB that the device has held at most; '' where it does not count."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return f"{peak / 2**30:.2f}" if peak else "unknown"


def dpo(args):
    """Rows (what, number) of the DPO step."""
    lm = model(args.size, remat=args.remat)
    rng = np.random.default_rng(0)
    third = args.length // 3  # prompt; each response fills up its row

    def ids(many):
        return rng.integers(1, lm.config.vocab_size, many).tolist()

    prompts = [ids(third) for _ in range(args.pairs)]
    sides = [[ids(args.length - third) for _ in range(args.pairs)] for _ in range(2)]
    batch = from_pairs(prompts, *sides, length=args.length)
    mesh = sharding.make_mesh((1, 1, 1))
    tx = optim.make_tx(1e-6)
    step = make_train_step(lm.config, tx, plugin.load("losses", "dpo"), mesh)
    many = transformer.num_params(lm.params)
    state = init_state(lm.params, tx, mesh)
    lms = {"ref": lm}
    batch = sharding.put_batch(batch, mesh)
    times = []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        state, found = jax.block_until_ready(step(state, lms, batch))
        times.append(time.perf_counter() - start)
    taken = statistics.median(times[2:])
    tokens = 2 * args.pairs * args.length
    flops = metrics.flops_per_token(many, "train")
    flops += metrics.flops_per_token(many, "forward")
    used = metrics.mfu(flops * tokens, taken, jax.devices()[:1])
    name = f"DPO step, {args.size}, {args.pairs} pairs x {args.length}"
    if not np.isfinite(float(found["loss"])):
        raise FloatingPointError(f"{name}: loss {float(found['loss'])}")
    yield f"{name}: tokens/s", f"{tokens / taken:,.0f}"
    yield f"{name}: share of peak FLOPs", "unknown" if used is None else f"{used:.1%}"
    yield f"{name}: peak memory, GiB", peak_memory()
    yield f"{name}: seconds, first step", f"{times[0]:.1f}"


def decoding(args):
    """Rows (what, tokens/s) of greedy decoding."""
    lm = model(args.size)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    lm = LM(lm.config, half)
    size = sum(x.nbytes for x in jax.tree.leaves(half))
    for rows in args.batches:
        ids = np.random.default_rng(rows).integers(
            1, lm.config.vocab_size, (rows, 32), dtype=np.int32
        )
        lengths, times = np.full(rows, 32), []
        for _ in range(args.steps // 2 + 1):
            start = time.perf_counter()
            out = decode.generate(
                lm, ids, lengths, jax.random.key(0), max_new=args.new, temperature=0.0
            )
            jax.block_until_ready(out.batch.tokens)
            times.append(time.perf_counter() - start)
        rate = args.new / statistics.median(times[1:])
        name = f"decoding, {args.size}, {rows} rows x {args.new}"
        yield f"{name}: tokens/s", f"{rate * rows:,.0f}"
        yield f"{name}: weights read, GB/s", f"{size * rate / 1e9:,.0f}"


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("what", nargs="?", choices=("parity", "dpo", "decode"))
    args.add_argument("size", nargs="?", default="tiny", choices=SIZES)
    args.add_argument("--pairs", type=int, default=8)
    args.add_argument("--length", type=int, default=64)
    args.add_argument("--steps", type=int, default=10)
    args.add_argument("--remat", default="none")
    args.add_argument("--new", type=int, default=32)
    args.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args.add_argument("--rows_only", action="store_true", help="no head of a table")
    args = args.parse_args()
    if not args.rows_only:
        print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
        print("| what | measured |\n|---|---|")
    parts = {"parity": parity, "dpo": dpo, "decode": decoding}
    for what in (args.what,) if args.what else parts:
        for row in parts[what](args):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
