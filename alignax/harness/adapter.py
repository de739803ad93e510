"""The model `alignax` of lm-evaluation-harness: the methods that the harness calls.

`Adapter` needs no harness; `register` makes it one of the harness's models.
"""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import tqdm

from alignax import api
from alignax.batch import Example, Message
from alignax.harness import encoding, generation, scoring
from alignax.harness.encoding import Codec, Row
from alignax.models import sharding
from alignax.sampling import weights

log = logging.getLogger(__name__)
NAME = "alignax"  # --model alignax
AUTO = 16  # rows of a batch, for batch_size=auto


class Adapter:
    """A model of alignax behind the interface of `lm_eval.api.model.LM`.

    A request has `args`: (context, continuation), (text,), or (context, settings). Results
    are in the order of the requests. Semantics are those of the harness's model `hf`.
    Generation differs in this: every EOS id of the tokenizer ends a response, also its
    template's end of turn; and what generation_config.json says of sampling is not read.

    Args:
      path: of the model: all that `alignax.load` reads.
      dtype: 'float32' or 'bfloat16', of the parameters and of the computation; a run keeps
        its own.
      batch_size: rows of a batch, for each shard of the mesh, or 'auto' (16).
      max_length: most tokens that the model reads; its context by default.
      max_gen_toks: most tokens of a response to a task that does not say it.
      add_bos_token: whether a text begins with BOS; as the tokenizer has it by default.
      prefix_token_id: the id in front of a text without context; BOS by default, or EOS.
      mesh: devices along the axes data, fsdp and model, such as '4:1:2'.
      seed: of samples.
      device: ignored: JAX_PLATFORMS decides.
      max_batch_size: ignored: no batch size is searched.

    Raises:
      FileNotFoundError, ValueError: of `alignax.load`; an argument out of its range.
    """

    def __init__(
        self, path: str, *, dtype: str = "float32", batch_size: int | str = 1,
        max_length: int | None = None, max_gen_toks: int = 256,
        add_bos_token: bool | None = None, prefix_token_id: int | None = None,
        mesh: str = "1:1:1", seed: int = 0, device: Any = None, max_batch_size: Any = None,
    ):  # fmt: skip
        del device, max_batch_size
        self._path = str(path)
        shape = [int(size) for size in str(mesh).split(":")]
        self._mesh = sharding.make_mesh(shape)
        lm, text = api.load(self._path, dtype=dtype, mesh=self._mesh)
        self._lm, self._text = lm, text
        self._batch_size = rows_of_a_batch(batch_size)
        self.max_length, self.max_gen_toks = lm.config.max_length, int(max_gen_toks)
        if max_length is not None:
            if not 0 < int(max_length) <= lm.config.max_length:
                raise ValueError(
                    f"max_length is {max_length}, expected 1 to {lm.config.max_length}, the "
                    "context of the model"
                )
            self.max_length = int(max_length)
        if add_bos_token and text.bos_id is None:
            raise ValueError("add_bos_token: the tokenizer has no BOS")
        prefix = text.eos_id if text.bos_id is None else text.bos_id
        self._codec = Codec(
            text,
            text.add_bos if add_bos_token is None else bool(add_bos_token),
            prefix if prefix_token_id is None else int(prefix_token_id),
        )
        self._generator = generation.Generator(
            lm, text, batch_size=self._batch_size, mesh=self._mesh, seed=int(seed)
        )

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(nats of the continuation given the context, whether it is the greedy one).

        A context that is too long loses its first tokens.

        Raises:
          ValueError: a continuation without a token, or longer than the context.
        """
        rows = [
            encoding.truncate(self._codec.pair(*request.args), self.max_length)
            for request in requests
        ]
        out: list[Any] = [None] * len(rows)
        for i, found in self._scored(rows, "log-likelihoods", disable_tqdm):
            out[i] = tuple(found)
            self._remember("loglikelihood", requests[i].args, out[i])
        return out

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of whole texts; each token is scored once, with as much context as fits."""
        rows, owners = [], []
        for k, request in enumerate(requests):
            found = self._codec.rolling(request.args[0], self.max_length)
            rows += found
            owners += [k] * len(found)
        totals = [0.0] * len(requests)
        for i, likelihood in self._scored(rows, "rolling windows", disable_tqdm):
            totals[owners[i]] += likelihood.logp
        for request, total in zip(requests, totals, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return totals

    @weights.kept()
    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Responses: see `generation.Settings`. A long context loses its first tokens.

        Raises:
          ValueError: settings that leave no room for a context, or that are not supported.
        """
        prompts, settings = [], []
        for request in requests:
            context, given = request.args
            one = generation.parse(given, self.max_gen_toks)
            room = self.max_length - one.max_new
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {one.max_new}, expected fewer than the context of the "
                    f"model, {self.max_length}"
                )
            prompts.append(self._codec.encode(context)[-room:] or [self._codec.prefix])
            settings.append(one)
        out = [""] * len(prompts)
        found = self._generator.responses(prompts, settings)
        for i, text in _progress(found, len(prompts), "responses", disable_tqdm):
            out[i] = text
            self._remember("generate_until", requests[i].args, text)
        return out

    def _scored(self, rows: Sequence[Row], what: str, quiet: bool):
        found = scoring.likelihoods(
            self._lm, rows, batch_size=self._batch_size, mesh=self._mesh
        )
        return _progress(found, len(rows), what, quiet)

    def _remember(self, name: str, args: Any, result: Any) -> None:
        """Hands a result to the cache of the harness, if it has one."""
        if (hook := getattr(self, "cache_hook", None)) is not None:
            hook.add_partial(name, args, result)

    @property
    def tokenizer_name(self) -> str:
        """What a cache of requests is named by: the folder, and a hash of the tokenizer."""
        return f"{pathlib.Path(self._path).name}__{self._text.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template of the tokenizer; None where none is asked for.

        Raises:
          ValueError: the tokenizer has no template, or the name of one is asked for.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise ValueError(
                f"apply_chat_template is {chat_template!r}: name no template, only the "
                "default one is read"
            )
        return self._template()

    def _template(self) -> str:
        if self._text.chat_template is None:
            raise ValueError(f"the tokenizer of {self._path} has no chat template")
        return self._text.chat_template

    def apply_chat_template(
        self, chat_history: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text.

        Args:
          chat_history: the turns.
          add_generation_prompt: opens an assistant turn; False continues the last one.

        Raises:
          ValueError: the template refuses the turns, also without the system turn.
        """
        self._template()
        try:
            return self._render(chat_history, add_generation_prompt)
        except ValueError as error:
            rest = [turn for turn in chat_history if turn["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            log.warning("the system turn is left out: %s", error)
            return self._render(rest, add_generation_prompt)

    def _render(self, turns: Sequence[Message], opened: bool) -> str:
        if opened:
            return self._text.render(turns, add_generation_prompt=True)
        return self._text.dialogues.render(Example("", turns, ())).prompt_text


def rows_of_a_batch(batch_size: int | str) -> int:
    """The batch size that a number, or 'auto', means.

    Raises:
      ValueError: something else.
    """
    if str(batch_size).partition(":")[0] == "auto":
        return AUTO
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ValueError(
            f"batch_size is {batch_size!r}, expected a number, or 'auto' ({AUTO})"
        )
    return int(batch_size)


def _progress(found, total: int, what: str, quiet: bool):
    return tqdm.tqdm(found, total=total, desc=what, disable=quiet)


def register() -> type:
    """Makes `--model alignax` known to lm-evaluation-harness; returns the class.

    Raises:
      ImportError: it is not installed.
    """
    try:
        from lm_eval.api import model, registry
    except ImportError as error:
        raise ImportError(
            "lm-evaluation-harness is not installed: pip install 'alignax[lm_eval]'"
        ) from error
    if NAME in registry.model_registry:
        return registry.get_model(NAME)

    class AlignaxLM(Adapter, model.LM):
        """See `Adapter`."""

        def __init__(self, path: str, **arguments: Any):
            model.LM.__init__(self)
            Adapter.__init__(self, path, **arguments)

        @classmethod
        def create_from_arg_obj(cls, arg_dict, additional_config=None):
            """The model of `--model_args`, which win over `--batch_size` and `--device`."""
            more = {k: v for k, v in (additional_config or {}).items() if v is not None}
            return cls(**{**more, **arg_dict})

        @classmethod
        def create_from_arg_string(cls, arg_string, additional_config=None):
            """The same, of a string."""
            from lm_eval import utils

            given = utils.simple_parse_args_string(arg_string)
            return cls.create_from_arg_obj(given, additional_config)

    registry.register_model(NAME)(AlignaxLM)
    return AlignaxLM
