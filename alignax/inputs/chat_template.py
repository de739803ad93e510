"""Chat templates: a conversation rendered to one string by jinja2, in a sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

from alignax.batch import Message

# For conversations where a tokenizer has no template (bytes, base models). A turn starts a
# new pre-token, so prefixes of the text stay prefixes of the ids; `tokenize` inserts EOS
# after each assistant turn.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ m.role | capitalize }}: {{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def render(
    template: str | None, messages: Sequence[Message], add_generation_prompt: bool, *,
    specials: Mapping[str, str], now: datetime.datetime,
) -> str:  # fmt: skip
    """The conversation as one string.

    Args:
      template: jinja2 source, or None for PLAIN_TEMPLATE.
      messages: the turns.
      add_generation_prompt: whether an assistant turn is opened at the end.
      specials: special tokens as templates name them, e.g. {'eos_token': '</s>'}.
      now: the date that the template's `strftime_now` gives.

    Raises:
      ValueError: the template refuses the messages; its message is included.
    """
    try:
        return _compile(template or PLAIN_TEMPLATE, now).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **specials,
        )
    except (jinja2.TemplateError, TypeError) as e:
        roles = [m.get("role") for m in messages]
        raise ValueError(f"chat template refuses turns {roles}: {e}") from e


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for other programs; here it is a no-op."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(source: str, now: datetime.datetime) -> jinja2.Template:
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):
        # Templates mean plain JSON; jinja2's own filter escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent,
            separators=separators, sort_keys=sort_keys,
        )  # fmt: skip

    # Templates come with downloaded models: they run in a sandbox.
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: now.strftime(form)
    return env.from_string(source)
