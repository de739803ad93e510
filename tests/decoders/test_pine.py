"""Text with separators becomes documents, and no order of them changes what is said."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob
from alignax.decoders import best_of_n, contrastive, pine
from alignax.models import pine as model
from alignax.models import transformer
from alignax.sampling import decode, drafts
from alignax.sampling.speculate import speculate
from alignax.text import documents as texts_apart
from alignax.text import tokenizer
from alignax.text.encoder import FunctionEncoder

pytestmark = pytest.mark.slow

TEXT = tokenizer.load("bytes")
DOCUMENTS = ["a red one, ", "blue. ", "the third is green "]


@pytest.fixture
def lm(make_lm, tiny_config):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=259, max_length=128))


def written(documents, prefix="Which? ", suffix="It is", separator="<|document|>"):
    return separator.join([prefix, *documents, suffix])


def padded(texts):
    ids = [TEXT.prompt(text) for text in texts]
    prompts = np.zeros((len(ids), 96), np.int32)
    for row, i in zip(prompts, ids, strict=True):
        row[: len(i)] = i
    return prompts, np.array([len(i) for i in ids])


def search(lm, texts, **changes):
    asked = {"max_new": 4, "temperature": 0.0, "eos_ids": (257,)} | changes
    return jax.device_get(
        pine.search(
            lm, {}, *padded(texts), jax.random.key(0), tokenizer=TEXT, **asked,
        )
    )  # fmt: skip


def responses(out):
    return [
        [t[m].tolist() for t, m in zip(*group, strict=True)]
        for group in zip(out.batch.tokens, out.batch.mask, strict=True)
    ]


def test_no_order_of_the_documents_changes_what_is_said(lm):
    out = search(lm, [written(d) for d in itertools.permutations(DOCUMENTS)])
    said = responses(out)
    assert said == [said[0]] * 6
    assert np.ptp(out.raw_logps.sum(-1)) > 1e-3  # as the policy reads it, order matters


def test_what_is_drawn_is_drawn_under_pine(lm):
    """The pieces are documents, prefix and suffix; old_logps are theirs."""
    texts = [written(DOCUMENTS[:2]), written(DOCUMENTS, prefix="")]
    out = search(lm, texts, temperature=0.8, group=3)
    assert out.batch.tokens.shape[:2] == (2, 3)
    pieces = (("Which? ", DOCUMENTS[:2]), ("", DOCUMENTS))
    for b, (prefix, documents) in enumerate(pieces):
        for g, response in enumerate(responses(out)[b]):
            ids, layout = model.lay(
                TEXT.encode(prefix), [*map(TEXT.encode, documents)],
                [*TEXT.encode("It is"), *response],
            )  # fmt: skip
            h = model.hidden(lm, jnp.asarray(ids), layout)[-len(response) - 1 : -1]
            z = transformer.unembed(lm, h) / 0.8
            want = jax.nn.log_softmax(z)[np.arange(len(response)), response]
            mask = out.batch.mask[b, g]
            np.testing.assert_allclose(out.batch.old_logps[b, g][mask], want, atol=1e-4)
    assert responses(out)[0][0] != responses(out)[0][1]
    want = logprob.score(lm, jax.tree.map(jnp.asarray, out.batch)).logps
    np.testing.assert_allclose(out.raw_logps, want, atol=1e-4)


def test_documents_may_have_more_ids_than_the_prompt(lm, monkeypatch):
    """Cut at a separator, a text may become more tokens; a bucket compiles once."""
    plain, longer = texts_apart.pieces, 2

    def grown(*args, **kwargs):
        return [longer * piece for piece in plain(*args, **kwargs)]

    monkeypatch.setattr(pine, "pieces", grown)
    orders = itertools.permutations(DOCUMENTS)
    out = search(lm, [written(d, separator="~") for d in orders], separator="~")
    assert out.batch.tokens.shape[2] == 100
    assert responses(out) == [responses(out)[0]] * 6
    longer = 3  # 135 ids, where the row has 96 places
    before = decode._generate._cache_size()
    search(lm, [written(DOCUMENTS, separator="~")], separator="~")
    longer = 4  # 180
    search(lm, [written(DOCUMENTS, separator="~")], separator="~")
    assert decode._generate._cache_size() == before + 1


def test_equal_prompts_draw_by_themselves(lm):
    out = search(lm, [written(DOCUMENTS)] * 2, temperature=1.0, group=2)
    assert len({tuple(r) for row in responses(out) for r in row}) == 4


def test_one_document_is_the_ordinary_model(lm):
    """With all that `generate` can do, and with a draft."""
    text, plain = written(["one document"]), "Which? one documentIt is"
    ids = np.array([TEXT.prompt(plain)])
    want = decode.generate(
        lm, ids, np.array([ids.size]), jax.random.key(0), max_new=6, temperature=0.9,
        top_k=5, presence_penalty=1.0,
    )  # fmt: skip
    want = responses(jax.device_get(want))
    got = search(
        lm, [text], max_new=6, temperature=0.9,
        sampling={"top_k": 5, "presence_penalty": 1.0},
    )  # fmt: skip
    # a penalty counts what the prompt has only if it is one of repetition
    assert responses(got) == want


def test_a_draft_and_a_guide_work_over_it(lm, make_lm):
    """Speculation draws what PINE draws, under a guide that knows nothing of it."""
    texts = [written(d) for d in (DOCUMENTS, DOCUMENTS[::-1])]
    prompts, lengths = padded(texts)
    reader = pine.reader(TEXT, prompts, lengths, "<|document|>")
    other = make_lm(lm.config, seed=1)
    guide = contrastive.guide({"amateur": other}, amateur="amateur", weight=0.5)
    asked = {"max_new": 8, "temperature": 0.0, "guide": guide, "reader": reader}
    key = jax.random.key(0)
    want = jax.device_get(decode.generate(lm, prompts, lengths, key, **asked))
    draft = drafts.ngram(lm.config.vocab_size)
    got = jax.device_get(speculate(lm, draft, prompts, lengths, key, **asked))
    assert responses(got) == responses(want)
    assert responses(want)[0] != responses(search(lm, texts[:1], max_new=8))[0]
    for wrong in ({"prompts": prompts[::-1]}, {"prefill": [[65], [66]]}):
        given = {"prompts": prompts, **asked, **wrong}
        with pytest.raises(ValueError, match="documents of other prompts"):
            decode.generate(lm, given.pop("prompts"), lengths, key, **given)


def test_the_best_of_n_is_drawn_by_it(lm):
    prompts, lengths = padded([written(DOCUMENTS)])
    reader = pine.reader(TEXT, prompts, lengths, "<|document|>")
    out = best_of_n.search(
        lm, {}, prompts, lengths, jax.random.key(0), max_new=4, n=2, temperature=0.0,
        judge=lambda batch: np.zeros(batch.mask.shape[:2]), reader=reader,
    )  # fmt: skip
    assert responses(out) == responses(search(lm, [written(DOCUMENTS)]))


def test_a_suffix_that_is_cut_into_other_ids_than_the_prompt(lm):
    """A draft's block begins with the prompt's last token, which the suffix has not."""
    merged = dataclasses.replace(
        TEXT,
        encoder=FunctionEncoder(
            lambda text: TEXT.encode(text.replace("|?", "\x01")), TEXT.encoder.control
        ),
        _decode=lambda ids, keep: TEXT.decode(ids).replace("\x01", "|?"),
    )
    ids = np.array([merged.encode("a|b|c|?")])
    assert ids[0, -1] == 1
    prompts, lengths, key = ids, np.array([ids.size]), jax.random.key(0)
    reader = pine.reader(merged, prompts, lengths, "|")
    asked = {"max_new": 6, "temperature": 0.0, "reader": reader}
    want = jax.device_get(decode.generate(lm, prompts, lengths, key, **asked))
    draft = drafts.ngram(lm.config.vocab_size)
    got = jax.device_get(speculate(lm, draft, prompts, lengths, key, **asked))
    assert responses(got) == responses(want)
    np.testing.assert_allclose(got.raw_logps, want.raw_logps, atol=1e-4)


WRONG = {
    "1 times": {"texts": ["a<|document|>b"]},
    "a prompt has the separator 'and' 0 times": {"texts": ["1and2and3", "4"], "separator": "and"},
    "empty document": {"texts": [written(["a", ""])]},
    "nothing behind": {"texts": [written(["a", "b"], suffix="")]},
    "expected group >= 1": {"texts": ["a"], "group": 0},
    "and a separator": {"texts": ["a"], "separator": ""},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_has_no_documents_is_named(lm, message):
    with pytest.raises(ValueError, match=message):
        search(lm, **WRONG[message])


def test_ids_that_are_not_those_of_their_text_are_named(lm):
    ids = np.array([[256, *TEXT.encode(written(["a", "b"]))]])
    with pytest.raises(ValueError, match="not those of its text '<bos>"):  # fmt: skip
        pine.search(
            lm, {}, ids, np.array([ids.size]), jax.random.key(0), max_new=1,
            tokenizer=TEXT,
        )  # fmt: skip
