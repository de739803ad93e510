"""The keys that every run has, and their defaults. A config is a difference from this."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Defaults; sections that a method fills stay open, the rest is locked."""
    c = ConfigDict()
    c.seed = 0
    c.num_steps = 0  # optimiser steps; 0 evaluates only, unless there are num_epochs
    # Passes over the usable rows of c.data, rounded up to whole steps: decides num_steps,
    # if it is not 0. With rollouts a pass asks every prompt once (more of them for
    # rollout.dynamic_sampling).
    c.num_epochs = 0.0
    c.batch_size = 8  # prompts per step, over all hosts and micro-batches
    c.accumulate = 1  # micro-batches per step; the gradient does not depend on it
    c.length = 512  # tokens per row
    c.buckets = ()  # the values of T that occur; () = length and its 1/2, 1/4, 1/8
    # How tokens are laid out. packed: what the responses to a prompt share is computed
    # once, and batches have about as many tokens each; grouped: as packed, but batches
    # hold prompts of like length, for few prompts a device or a few very long ones; rows:
    # one row per response.
    c.layout = "packed"
    c.mesh = (1, 1, 1)  # data, fsdp, model; one may be -1
    # Decay of the parameters' exponential average; 0 keeps none, but for an LM 'average'
    # (see lms), which is then a copy of the policy, made every average_every steps.
    c.average = 0.0
    c.average_every = 1  # steps between two updates of the average
    c.date = "2024-07-26"  # what a chat template that prints a date prints
    c.tokenizer = ""  # 'bytes', a folder or a .gguf; '' = the one beside the weights

    # How rows become ids. Every data section may also have `raw` (True: strings are no
    # turns, the chat template is left out) and `specials` (what control tokens that users
    # wrote are: text | tokens).
    c.template = (
        ConfigDict()
    )  # variables of the chat template: enable_thinking, tools, ...
    # A system turn under a template without one: refuse (the row is malformed) | user (its
    # text goes in front of the first user turn).
    c.template_system = "refuse"
    # What rows lose that are longer than `length`. response: the response its end, and
    # only then the prompt its oldest exchanges; prompt: the prompt its left end, and then
    # the response; drop: nothing, they are dropped.
    c.truncate = "response"
    c.min_response = 0  # scored tokens that a prompt leaves room for; 0 = length // 4
    # What prompts to generate from lose (rollouts, evaluations): drop | exchanges | left
    c.truncate_prompts = "drop"
    # Folder for the token ids of rows, made once; '' = $ALIGNAX_CACHE or the user's cache
    # folder, 'off' = none
    c.row_cache = ""

    c.model = ConfigDict()
    # a folder of Hugging Face's or a run, .gguf, 'hf:OWNER/NAME', 'stage:NAME';
    # 'average:' in front of a run means the average of its parameters
    c.model.path = ""
    c.model.sizes = ConfigDict()  # without a path: train from scratch at these sizes
    c.model.value_head = False
    c.model.dtype = "float32"  # of the computation
    c.model.param_dtype = "float32"  # in bfloat16 steps are rounded stochastically
    # Of frozen weights: c.lms, and the base of adapters. '' = param_dtype | float32 |
    # bfloat16 | int8, with a scale for every output channel (models/int8.py)
    c.model.frozen_dtype = ""
    # What the backward pass computes again, to need less memory: none | elementwise (all but
    # matrix products and attention; attn_kernel='cudnn' is computed again) | dots (all but
    # matrix products) | block (everything)
    c.model.remat = "elementwise"
    c.model.head_kernel = "xla"  # of log-probabilities: xla | pallas (TPUs)
    c.model.attn_kernel = "xla"  # of attention: xla | splash (TPUs) | cudnn (GPUs)

    c.lora = ConfigDict()  # adapters instead of all weights
    c.lora.rank = 0  # 0 trains all weights
    c.lora.alpha = 16.0
    c.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    c.lora.rank_stabilised = False  # alpha / sqrt(rank) instead of alpha / rank
    c.lora.dora = False  # magnitudes beside A and B
    c.lora.layers = ()  # numbers of the layers with adapters, from 0; () = all
    c.lora.ranks = (
        ConfigDict()
    )  # 'q' or 'q/3' (its layer 3) -> a rank of its own; 0 = none
    c.lora.alphas = ConfigDict()  # likewise
    c.lora.saved = ()  # trained in full: embed, head (a value head always is)
    c.lora.bias = (
        "none"  # biases of projections that are trained: none | all | lora_only
    )

    c.loss = ConfigDict()  # name, and the loss's own hyper-parameters
    c.reweight = ConfigDict()  # {weights of tokens or pairs: its hyper-parameters}
    c.lms = (
        ConfigDict()
    )  # frozen models: name -> 'init' | 'average' | path | 'stage:NAME'
    c.reference_cache = ""  # folder for log-probs of lms.ref, computed once; '' = none
    c.reference_data = (
        ConfigDict()
    )  # what lms.ref reads instead: other prompts, same ids
    c.data = ConfigDict()  # name, and the data set's own parameters
    c.mixture = ConfigDict()  # instead of data: {part: {ratio, name, ...}}

    c.rollout = ConfigDict()  # the policy's own responses, to the prompts of c.data
    c.rollout.reward = ConfigDict()  # name, and its hyper-parameters; {} = none
    # Whose responses a run learns from: '' = the policy's if there is a reward, else those
    # of the data | policy (for losses that need no reward) | a file of another sampler's
    # responses with their log-probabilities (rollouts/recorded.py)
    c.rollout.source = ""
    c.rollout.group = 4  # responses per prompt
    c.rollout.max_new = 64  # tokens of a response
    # Of the distribution that is sampled, of which ratios and KLs then are. top-p and top-k
    # are not offered: a token that they mask has no probability, so no ratio to any later
    # policy, which may give it some.
    c.rollout.temperature = 1.0
    # texts (special tokens too) or ids, with which a response ends; it keeps them
    c.rollout.stops = ()
    # Which tokens may follow: 'regex:PATTERN', 'json_schema:FILE', or the dotted name of a
    # function (pieces, eos_ids) -> `sampling.automaton.Automaton`. Losses that read the
    # distribution that was sampled (ratios, KLs) read it over these tokens; those of pairs
    # and of imitation read the model's own.
    c.rollout.grammar = ""
    # dotted name of a function (rows, texts) -> replies, one for each conversation: a text,
    # or None where it is done. Replies are read and not scored; max_new counts them.
    c.rollout.reply = ""
    c.rollout.turns = (
        0  # most turns of the policy in a response; 0 = one, without replies
    )
    c.rollout.batches = 1  # optimiser steps that one pass over a rollout makes
    c.rollout.epochs = 1  # passes over a rollout
    c.rollout.keep = "all"  # of a group: all | best | best_worst
    c.rollout.truncated = "keep"  # responses without an end: keep | drop | punish
    c.rollout.punishment = 0.0  # their reward under 'punish'
    c.rollout.overlong_buffer = (
        0  # last tokens before max_new, over which the reward falls
    )
    c.rollout.overlong_penalty = 1.0  # what a response of max_new tokens loses
    c.rollout.dynamic_sampling = False  # groups without a difference are replaced
    c.rollout.max_draws = 8  # most prompts sampled for that, in multiples of a rollout
    c.rollout.anchor = (
        ""  # name in c.lms of an LM that adds a response: the best of some
    )
    c.rollout.anchor_samples = 2  # responses of the anchor, of which the best is taken
    c.rollout.policy = ""  # name in c.lms of the behaviour policy; '' is the policy
    c.rollout.reward_seconds = 0.0  # most for a call of a reward without an LM; 0 = any
    c.rollout.invalid_rewards = 0.0  # share of responses whose reward may fail
    c.rollout.show = 2  # prompts whose responses go to samples.jsonl, ...
    c.rollout.show_every = 20  # ... every so many steps; show = 0 is never
    c.rollout.reference_samples = (
        64  # samples of lms.ref per prompt, for shapings that need them
    )
    c.rollout.cache = ""  # folder for the rewards of those samples; '' = the run's
    c.shaping = ConfigDict()  # {shaping: its hyper-parameters}: advantages from rewards

    c.prompts = ConfigDict()  # a data set to respond to; {} trains and evaluates
    c.decoder = ConfigDict()  # a file in decoders/ and its hyper-parameters
    c.decoder.name = ""  # '' samples from the model itself
    c.generate = ConfigDict()  # how c.prompts are answered: see decode.generate
    c.generate.group = 1  # responses per prompt
    c.generate.max_new = 256  # tokens of a response
    c.generate.temperature = 1.0  # 0 is greedy
    c.generate.top_k = 0  # 0 is off
    c.generate.top_p = 1.0
    c.generate.min_p = 0.0
    c.generate.repetition_penalty = 1.0
    c.generate.frequency_penalty = 0.0
    c.generate.presence_penalty = 0.0
    c.generate.logit_bias = ()  # pairs of an id and nats
    c.generate.min_new = 0  # fewest tokens of a response
    # texts (special tokens too) or ids, in front of which a response is cut
    c.generate.stops = ()
    c.generate.grammar = ""  # of the response without its prefill; as rollout.grammar
    c.generate.per_row = ()  # settings that rows of c.prompts bring: see respond/row_settings
    c.generate.token_logps = False  # responses.jsonl has them for every token
    c.generate.prefill = ""  # how every response begins: given, not sampled
    c.generate.forced = ""  # likewise, but scored
    # What a guide reads in place of the prompt: no_system | column:NAME | text:TEXT; '' = it
    c.generate.guide_prompt = ""
    c.generate.candidates = 16  # tokens that a scalar guide judges
    c.generate.draft = ""  # '' | name in c.lms | ngram | layers:K of the model itself
    c.generate.draft_length = 4  # tokens of a draft
    c.generate.rule = "block"  # that verifies it: block | token
    c.generate.mode = ""  # how a guide is verified: see speculate; '' is its kind's
    c.generate.guided_draft = False  # the draft is guided too
    c.generate.reward = ConfigDict()  # name, and its hyper-parameters: scores, searches

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw | adafactor | lion | muon (matrices; adamw the rest)
    c.optim.lr = 1e-6
    c.optim.critic_lr = 0.0  # of the value head, by the same schedule; 0 = lr
    c.optim.schedule = "cosine"  # constant | linear | cosine
    c.optim.warmup = 0  # steps
    c.optim.schedule_steps = 0  # steps until the last rate, which stays; 0 = num_steps
    c.optim.final = 0.1  # last rate as a share of the peak
    c.optim.clip = 1.0  # global gradient norm; 0 does not clip
    c.optim.weight_decay = 0.0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.0  # 0 = the optimiser's own: .999, of lion .99

    c.evals = ConfigDict()  # {evaluation: its hyper-parameters}
    c.eval_data = ConfigDict()  # name, and the data set's own parameters
    c.eval_every = 0  # steps; 0 evaluates at the end only
    c.eval_at_start = False
    c.eval_batch_size = 0  # prompts; 0 = batch_size
    c.best_metric = ""  # e.g. 'eval/ranking_accuracy/accuracy'; kept in WORKDIR/best
    c.best_mode = "max"
    c.patience = 0  # evaluations without a better one before the run stops; 0 = never

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 0  # steps; 0 saves at the end only
    c.checkpoint.minutes = 0.0  # saves too when the last one is older; 0 = never
    c.checkpoint.keep = 3
    c.checkpoint.asynchronous = True
    c.watchdog = ConfigDict()
    c.watchdog.minutes = 30.0  # without a step, then every stack is written; 0 = never
    c.watchdog.starts = 5  # in a row without a newer checkpoint; 0 = any number
    c.log_every = 1
    c.plots = True
    c.profile = ()  # (first, last) step of a profiler window
    # where metrics go beside metrics.jsonl: tensorboard, wandb, or dotted names (see
    # reports/trackers.py)
    c.trackers = ("tensorboard",)
    c.lock()
    for section in (
        c.model.sizes,
        c.lora.ranks,
        c.lora.alphas,
        c.template,
        c.loss,
        c.reweight,
        c.lms,
        c.reference_data,
        c.data,
        c.mixture,
        c.evals,
        c.eval_data,
        c.rollout.reward,
        c.shaping,
        c.prompts,
        c.decoder,
        c.generate.reward,
    ):
        section.unlock()
    return c
