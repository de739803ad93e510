"""At one KL, the transform that knows the inference-time procedure wins after it.

Balashankar et al. 2024, https://arxiv.org/abs/2412.19792, section 5. A small transformer
learns to write words of three letters (the reference). Every method then aligns it at five
strengths and two seeds, and is judged by win rates against the reference after best-of-4
and worst-of-4 on both sides, at the KL it came to. What a word is worth is drawn at
random for each of six prompts, on scales of .3, 1 and 3.

Methods: RL on the raw reward; IPO (https://arxiv.org/abs/2310.12036) on pairs of the
reference, whose optimum is that of RL on quantiles; BoNBoN
(https://arxiv.org/abs/2406.00832) for best-of-2 to best-of-8; best-of-N distillation by
RL on the log quantile (https://arxiv.org/abs/2407.06057) and by the Jeffreys mix of BOND
(https://arxiv.org/abs/2407.14622); CTRL with the identity, e^{10u} for best-of-4 and
-e^{-10u} for worst-of-4.

Predicted (theory/infalign.py, at .5 nats): best-of-4 .872 with e^{10u}, .800 with the
identity, .686 with the wrong sign; worst-of-4 .948, .886 and .676. Asked here: at least
.04 between e^{10u} and the identity, more than its interval between it and the raw
reward, the same for worst-of-4 with the sign reversed, the wrong sign below the identity,
and no point above the curve that is optimal for its KL.

Intervals: bootstrap over the 12 pairs of a prompt and a seed.
"""

import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
import report
import tokenizers
from jaxtyping import Float

from alignax import frontier, plugin, rewards
from alignax import shaping as shapings
from alignax.batch import LM, Batch, Example
from alignax.evals import inference_win_rate
from alignax.frontier import Points
from alignax.inputs import source
from alignax.models import sharding, transformer
from alignax.models.transformer import ModelConfig
from alignax.reports.metrics import Interval
from alignax.rollouts import sampler
from alignax.rollouts import source as rollouts
from alignax.text import tokenizer
from alignax.training import optim, parallel
from alignax.training.step import init_state, make_train_step

LETTERS, PROMPTS, WORD = "abcdefgh", "ABCDEF", 3
WORDS = tuple(map("".join, itertools.product(LETTERS, repeat=WORD)))
SCALES = (0.3, 1.0, 3.0)  # of what words are worth, prompt by prompt
LENGTH = 1 + WORD + 1  # a prompt's letter, a word, the end
SEEDS, TARGET = 2, 0.5
ROWS = 384  # responses of the policy that a step learns from


class Method(NamedTuple):
    """What a method trains with."""

    strengths: tuple[float, ...]  # β, or the n of best-of-n
    loss: str = "policy_gradient"
    group: int = 64  # responses a prompt
    ctrl: dict[str, Any] | None = None
    steps: int = 200
    lr: float = 4e-3


METHODS = {
    "raw reward": Method((4.0, 2.7, 1.9, 1.4, 1.0)),
    "IPO": Method((0.5, 0.33, 0.25, 0.2, 0.15), "ipo", 2, steps=100, lr=2e-3),
    "BoNBoN": Method((2, 3, 4, 5, 6), "bonbon", 8, steps=100, lr=1e-3),
    "BOND": Method((2, 3, 4, 6, 8), "bond", 8, steps=100),
    "log u": Method(
        (0.8, 0.5, 0.4, 0.3, 0.2),
        ctrl={"transform": "log", "calibration": "laplace"},
    ),
    "CTRL, u": Method(
        (0.5, 0.33, 0.25, 0.2, 0.15), ctrl={"transform": "identity"}
    ),
    "CTRL, exp(10u)": Method(
        (0.6, 0.4, 0.33, 0.28, 0.23), ctrl={"transform": "exp", "t": 10.0},
        steps=300,
    ),
    "CTRL, -exp(-10u)": Method(
        (0.1, 0.04, 0.02, 0.012, 0.007), ctrl={"transform": "exp", "t": -10.0},
        steps=700, lr=5e-3,  # a weak β is slow to undo what sampling did
    ),
}  # fmt: skip
RAW, IPO, BONBON, BOND, LOG, IDENTITY, FOR_BEST, FOR_WORST = METHODS
TRANSFORMS = {IDENTITY: 0.0, FOR_BEST: 10.0, FOR_WORST: -10.0}
RATES = ("standard", "best_of_4", "worst_of_4")


@functools.cache
def worths() -> Float[np.ndarray, "P W"]:
    """What every word is worth after every prompt.

    Words are ranked alphabetically, in an alphabet of the prompt's own for each place;
    worths are normal, with the scale of the prompt.
    """
    ranks = (np.arange(len(WORDS)) + 0.5) / len(WORDS)
    normal = np.array([statistics.NormalDist().inv_cdf(r) for r in ranks])
    cube = normal.reshape([len(LETTERS)] * WORD)
    out = []
    for i in range(len(PROMPTS)):
        rng = np.random.default_rng(i)
        places = [rng.permutation(len(LETTERS)) for _ in range(WORD)]
        out.append(SCALES[i % len(SCALES)] * cube[np.ix_(*places)].ravel())
    return np.stack(out)


def judge(batch: Batch, texts: list[list[str]], lms) -> np.ndarray:
    """[B, G] worth of words; what is no word is worth as little as the worst."""
    del lms
    prompts = np.asarray(batch.tokens)[:, 0, 0] - 2 - len(LETTERS)
    out = np.empty((len(texts), len(texts[0])))
    for row, prompt, group in zip(out, prompts, texts, strict=True):
        table = worths()[prompt]
        known = dict(zip(WORDS, table, strict=True))
        row[:] = [known.get(text, table.min()) for text in group]
    return out


def letters(folder: pathlib.Path) -> tokenizer.Tokenizer:
    """A token for each letter, beside padding and the end."""
    words = ["<pad>", "<eos>", *LETTERS, *PROMPTS]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>")
    )
    every = tokenizers.Regex(".")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(every, "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(words[:2])
    core.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer.load(str(folder))


class World:
    """The reference, and what aligns and judges against it."""

    def __init__(self, seed: int):
        self.seed, self.mesh = seed, sharding.make_mesh((1, 1, 1))
        with tempfile.TemporaryDirectory() as folder:
            self.text = letters(pathlib.Path(folder))
        self.tools = {
            "generate": parallel.generator(self.text, self.mesh),
            "score": parallel.scorer(self.mesh),
        }
        self.config = ModelConfig(
            vocab_size=self.text.vocab_size, width=32, num_layers=2, num_heads=4,
            num_kv_heads=4, head_dim=8, mlp_width=64, max_length=LENGTH,
        )  # fmt: skip
        self.prompts = [Example(p, p, []) for p in PROMPTS]
        self.ref = LM(self.config, self.pretrained())
        self.sampler = sampler.Sampler(
            self.tools["generate"], rewards.load("infalign.judge"), {"ref": self.ref},
            self.text, LENGTH - 1,
        )  # fmt: skip
        self.baseline = sampler.reference_rewards(
            self.prompts, self.sampler, self.ref, samples=256, rows=2 * ROWS,
            length=LENGTH, seed=seed,
        )  # fmt: skip

    def pretrained(self) -> Any:
        """Parameters that answer every prompt with letters of a distribution of its own."""
        rng = np.random.default_rng(0)
        distributions = rng.dirichlet(np.full(len(LETTERS), 4.0), (len(PROMPTS), WORD))
        asked = list(itertools.islice(itertools.cycle(PROMPTS), 12288))
        words = [
            "".join(
                rng.choice(list(LETTERS), p=distribution)
                for distribution in distributions[PROMPTS.index(p)]
            )
            for p in asked
        ]
        data = source.dataset_source(
            [Example(f"{i}", p, [w]) for i, (p, w) in enumerate(zip(asked, words, strict=True))],
            self.text, batch_size=256, length=LENGTH, buckets=(LENGTH,), seed=0,
            vocab_size=self.config.vocab_size,
        )  # fmt: skip
        fresh = jax.jit(functools.partial(transformer.init, self.config))
        return self.train(
            fresh(jax.random.key(0)), data, Method((), "sft", steps=240), {}
        )

    def loss(self, name: str):
        return plugin.load("losses", name, {"average": False} if name == "ipo" else {})

    @functools.cache  # noqa: B019, a process has one world
    def program(self, loss: str, steps: int, lr: float):
        """A step is compiled once for all strengths: they are arguments."""
        tx = optim.make_tx(
            optim.schedule(lr, steps, kind="linear", warmup=5, final=0.02), b2=0.95
        )
        bound = self.loss(loss)
        return tx, make_train_step(self.config, tx, bound, self.mesh)

    def train(self, params, data: source.Source, method: Method, hyper) -> Any:
        """The parameters after the method's steps."""
        tx, step = self.program(method.loss, method.steps, method.lr)
        step = step.with_hyper(**hyper)
        state = init_state(params, tx, self.mesh)
        for i in range(method.steps):
            batch = sharding.put_batch(data.next(state.params, i), self.mesh)
            state, _ = step(state, {}, batch)
        return state.params

    def align(self, method: Method, strength: float) -> Any:
        """The reference's parameters after a method."""
        group, hyper, more = method.group, {}, {}
        shaping: dict[str, Any] = {"kl": {"beta": strength}, "rloo": {}}
        if method.ctrl:
            shaping["ctrl"] = method.ctrl
        if method.loss == "bond":
            ctrl = {"transform": "best_of", "n": strength, "calibration": "laplace"}
            shaping |= {"ctrl": ctrl, "kl": {"beta": 1.0}}
            more = {"anchor": lambda _: self.ref, "anchor_samples": int(strength)}
        elif method.loss in ("ipo", "bonbon"):  # pairs of the reference
            shaping, more = {}, {"behaviour": self.ref, "keep": "best_worst"}
            hyper = {"beta" if method.loss == "ipo" else "n": strength}
            group = int(hyper.get("n", group))
        data = rollouts.rollout_source(
            self.prompts, self.sampler, policy=functools.partial(LM, self.config),
            score=self.tools["score"], batch_size=ROWS // method.group, length=LENGTH,
            shaping=shapings.in_order(
                plugin.load("shaping", k, v) for k, v in shaping.items()
            ),
            seed=self.seed, group=group, needs=self.loss(method.loss).needs,
            baseline=lambda: self.baseline, **more,
        )  # fmt: skip
        return self.train(self.ref.params, data, method, hyper)

    def measure(self, params) -> Points:
        """KL and win rates of every prompt, from 384 responses of both sides."""
        got = inference_win_rate.measure(
            LM(self.config, params), {"ref": self.ref}, self.prompts,
            key=jax.random.key(1000 + self.seed), tokenizer=self.text, **self.tools,
            batch_size=len(PROMPTS), length=LENGTH, reward="infalign.judge", samples=384,
            max_new=LENGTH - 1,
        )  # fmt: skip
        return {"kl": got.kl, **inference_win_rate.rates(got, (4,))}


def sweep(seed: int, names=tuple(METHODS)) -> dict[str, Points]:
    """Every method at every strength."""
    world, out = World(seed), {}
    for name in names:
        method, start = METHODS[name], report.now()
        points = [
            world.measure(world.align(method, strength))
            for strength in method.strengths
        ]
        out[name] = {k: np.stack([p[k] for p in points]) for k in points[0]}
        wall, cpu = report.now() - start
        means = ", ".join(f"{k:.2f}" for k in out[name]["kl"].mean(1))
        print(f"  {seed} {name}: {wall:.0f} s ({cpu:.0f}), KL {means}", flush=True)
    return out


def check(
    claim: str, predicted: str, holds: Any, measured: Interval, control: Interval
):
    """`report.check` of differences with their intervals."""
    row = report.check(claim, predicted, bool, holds(measured), holds(control))
    surprise = row.surprise and f"{claim}: predicted {predicted}, measured {measured}"
    return row._replace(measured=str(measured), control=str(control), surprise=surprise)


def rows(methods: dict[str, Points]) -> list[report.Row]:
    """The claims; their control is the sign that fits the other procedure."""
    out = []
    for rate, right, wrong in (
        ("best_of_4", FOR_BEST, FOR_WORST),
        ("worst_of_4", FOR_WORST, FOR_BEST),
    ):
        ideal = [
            frontier.optimum(rate, TARGET, t)
            for t in (TRANSFORMS[right], TRANSFORMS[IDENTITY])
        ]
        claims = [
            (right, wrong, IDENTITY, f"{ideal[0] - ideal[1]:.3f}, >= .04",
             lambda gap: gap.value >= 0.04),
            (right, wrong, RAW, "> 0, surely", lambda gap: gap.lo > 0),
            (wrong, right, IDENTITY, "< 0, surely", lambda gap: gap.hi < 0),
        ]  # fmt: skip
        for one, control, other, predicted, holds in claims:
            gaps = [
                frontier.compare(methods[name], methods[other], rate, TARGET)
                for name in (one, control)
            ]
            shown = rate.replace("_", "-")
            claim = f"{shown} at {TARGET} nats, {one} over {other}; control: {control}"
            out.append(check(claim, predicted, holds, *gaps))

    many = len(RATES) * sum(len(points["kl"]) for points in methods.values())

    def furthest(scale):
        return max(
            frontier.excess(
                {**points, "kl": scale * points["kl"]}, rate, many=many
            ).max()
            for points in methods.values()
            for rate in RATES
        )

    out.append(report.check(
        f"furthest of {many} points above what any policy reaches, after Bonferroni's "
        "correction; control: half the KL", "<= 0",
        lambda x: x <= 0, furthest(1.0), furthest(0.5),
    ))  # fmt: skip
    return out


def table(methods: dict[str, Points]) -> str:
    """Win rates at the target KL."""
    lines = [["method", *RATES]]
    for name, points in methods.items():
        at = (frontier.at_kl(points, rate, TARGET) for rate in RATES)
        lines.append([name, *(f"{x:.3f}" for x in at)])
    for name, t in (("no policy passes", None), *TRANSFORMS.items()):
        at = (float(frontier.optimum(r, TARGET, t)) for r in RATES)
        shown = name if t is None else f"theory: {name}"
        lines.append([shown, *(f"{x:.3f}" for x in at)])
    return report.aligned(lines)


def save(methods: dict[str, Points]) -> None:
    """Every point, means over prompts and seeds, as launch/results/infalign.csv."""
    lines = ["method,strength,kl," + ",".join(RATES)]
    for name, points in methods.items():
        for i, strength in enumerate(METHODS[name].strengths):
            means = (f"{points[k][i].mean():.4f}" for k in ("kl", *RATES))
            lines.append(",".join([f'"{name}"', f"{strength:g}", *means]))
    report.RESULTS.joinpath("infalign.csv").write_text("\n".join(lines) + "\n")


def main() -> list[report.Row]:
    # a core for each seed, and none fights over the other's
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(SEEDS, mp_context=context) as pool:
        seeds = list(pool.map(sweep, range(SEEDS)))
    methods = {
        name: {k: np.concatenate([s[name][k] for s in seeds], 1) for k in seeds[0][name]}
        for name in METHODS
    }  # fmt: skip
    print(table(methods), flush=True)
    save(methods)
    drawing = frontier.draw(
        methods, RATES[1:], transforms=TRANSFORMS, kl=TARGET, most=1.5
    )
    return report.finish("infalign", rows(methods), drawing)
