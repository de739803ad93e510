"""A file of prompts becomes a file of responses, once each, whatever happens in between."""

import functools
import json
import sys
import types

import jax
import numpy as np
import pytest
import tiny

from alignax import plugin
from alignax.configs import generate, value_mean
from alignax.data import prompts as prompt_data
from alignax.respond import output, respond, responder
from alignax.sampling import automaton, continuous, decode, prefill, stops
from alignax.text import tokenizer
from alignax.training import loading

LINES = tiny.PROMPTS
TEXT = tokenizer.load("bytes")


@pytest.fixture
def config(tmp_path):
    return functools.partial(tiny.to_respond, tmp_path)


def answered(folder):
    return [
        json.loads(x) for x in (folder / respond.NAME).read_text("utf-8").splitlines()
    ]


@pytest.fixture
def whole(config, tmp_path):
    """What a run gives that nothing interrupts."""
    assert respond.respond(config(), str(tmp_path / "whole"))
    return tmp_path / "whole"


def test_every_prompt_gets_what_it_would_get_alone(config, whole):
    rows = answered(whole)
    assert [r["prompt"] for r in rows] == LINES
    c = config()
    lm = loading.make_policy(c, TEXT)
    for i in (1, 2, 4):  # the longest, and two of one length
        row = rows[i]
        ids = np.array([TEXT.prompt(LINES[i])])
        out = decode.generate(
            lm, ids, np.array([ids.size]), jax.random.key(c.seed), max_new=6, group=2,
            eos_ids=[257], seeds=np.array([i]),
        )  # fmt: skip
        for g in range(2):
            mask = np.asarray(out.batch.mask[0, g])
            ids = np.asarray(out.batch.tokens[0, g])[mask]
            assert row["responses"][g] == TEXT.decode(ids)
            assert row["tokens"][g] == mask.sum()
            assert row["finish"][g] == ("eos" if ids[-1] == 257 else "length")
            np.testing.assert_allclose(
                row["logps"][g], np.asarray(out.raw_logps)[0, g].sum(), atol=1e-4
            )
    assert rows[0]["id"] == "prompts.txt:1"
    np.testing.assert_allclose(
        [r["law_logps"] for r in rows], [r["logps"] for r in rows], atol=1e-4
    )


def test_a_killed_run_ends_with_the_file_that_it_would_have_made(
    config, whole, tmp_path
):
    want = (whole / respond.NAME).read_bytes()
    calls = []
    folder = tmp_path / "killed"
    done = respond.respond(config(), str(folder), lambda: calls.append(1) or True)
    assert not done
    assert calls
    path = folder / respond.NAME
    first = path.read_bytes().splitlines(keepends=True)
    assert len(first) == 2
    path.write_bytes(first[0] + first[1][:20])  # killed within a line
    assert respond.respond(config(), str(folder))
    assert path.read_bytes() == want
    assert respond.respond(config(), str(folder))  # nothing is left to do
    assert path.read_bytes() == want
    path.write_bytes(b"".join(reversed(want.splitlines(keepends=True))))
    assert respond.respond(config(), str(folder))  # killed before it was put in order
    assert path.read_bytes() == want


def test_a_run_killed_before_its_first_line_binds_nobody(config, whole):
    (whole / respond.NAME).unlink()
    assert respond.respond(config(**{"generate.max_new": 1}), str(whole))
    assert len(answered(whole)) == len(LINES)


def test_another_config_or_other_prompts_are_refused(config, whole):
    with pytest.raises(ValueError, match=r"another config.*generate.top_k \(0 there, 5 here\)"):  # fmt: skip
        respond.respond(config(**{"generate.top_k": 5}), str(whole))
    other = [*LINES[:3], "e", LINES[4]]
    with pytest.raises(ValueError, match=r"answers something else.*prompts.txt:4 is 'é' there, 'e' here"):  # fmt: skip
        respond.respond(config(lines=other), str(whole))
    with pytest.raises(ValueError, match=r"number of prompts \(5 there, 4 here\).*prompts.txt:5 is 'Five' there, no prompt here"):  # fmt: skip
        respond.respond(config(lines=LINES[:4]), str(whole))
    path, half = whole / respond.NAME, b'{"id": "prompts'
    data = path.read_bytes()
    path.write_bytes(data + half)
    with pytest.raises(ValueError, match="number of prompts"):
        respond.respond(config(lines=LINES[:4]), str(whole))
    assert path.read_bytes() == data + half  # what is another's stays as it is
    beside = whole / "responses.json"
    beside.write_text(beside.read_text().replace('policy": "', 'policy": "0'))
    with pytest.raises(ValueError, match="weights of policy"):
        respond.respond(config(), str(whole))


def test_a_damaged_file_is_refused(config, whole):
    path = whole / respond.NAME
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"responses\.jsonl:1 is no response"):
        respond.respond(config(), str(whole))


WRONG = {
    "num_steps is 3": {"num_steps": 3},
    "the prompt is empty": {"lines": ["a", "", "b"]},
    "1 of 2 prompts have more than the 66 tokens": {"lines": ["a", "b" * 67]},
    "no data file": {"prompts.path": "nowhere.txt"},
    "path is empty": {"prompts.path": ""},
    "unknown name 'deall' in decoders": {"decoder.name": "deall"},
    "has no hyper-parameter 'wait'": {"decoder.name": "proxy", "decoder.wait": 1},
    "has no name, but": {"decoder.weight": 1.0},
    r"generate.draft='d' is not among config.lms, \[\]": {"generate.draft": "d"},
    r"generate\.reward has no 'name'": {"generate.reward.keywords": ("a",)},
    "no LM 'policy'": {"decoder.name": "proxy"},
    "lms.reward is empty": {"lms.reward": ""},
    "lms.target": {"lms.target": "init"},
    "expected strings": {"generate.stops": ("",)},
    r"generate\.top_p is 2\.0, expected a number in \(0, 1\]": {"generate.top_p": 2.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_and_leaves_nothing_behind(config, tmp_path, message):
    changes = dict(WRONG[message])
    wrong = config(lines=changes.pop("lines", LINES), **changes)
    with pytest.raises((ValueError, OSError), match=message):
        respond.respond(wrong, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / respond.NAME).exists()


def test_the_entry_point_answers_a_bad_decoder_with_one_line(tmp_path):
    flags = ["--workdir", tmp_path / "run", "--config.decoder.name=prox"]
    result = tiny.main("--config", "configs/generate.py:smoke", *flags)
    assert result.returncode == 1
    assert "error: unknown name 'prox' in decoders (did you mean 'proxy'?)" in result.stderr  # fmt: skip
    assert "Traceback" not in result.stderr


# -- engines


@pytest.mark.parametrize("draft", ["small", "ngram", "layers:1"])
def test_a_draft_changes_no_greedy_token(config, tmp_path, draft):
    plain = config(**{"generate.temperature": 0.0})
    fast = config(**{"generate.temperature": 0.0, "generate.draft": draft})
    fast.lms = {"small": "init"} if draft == "small" else {}
    for name, c in (("plain", plain), ("fast", fast)):
        respond.respond(c, str(tmp_path / name))
    a, b = answered(tmp_path / "plain"), answered(tmp_path / "fast")
    assert [r["responses"] for r in a] == [r["responses"] for r in b]
    assert [r["law_logps"] for r in a] == [[0.0, 0.0]] * 5


def test_a_guide_and_the_settings_reach_the_engine(config, tmp_path, monkeypatch):
    seen = []

    def generate_(lm, prompts, key, *, own, **settings):
        seen.append(settings | own([0, 1]))
        return generate(lm, prompts, key, own=own, **settings)

    generate = continuous.generate
    monkeypatch.setattr(continuous, "generate", generate_)
    c = config("proxy", **{
        "generate.top_k": 3, "generate.temperature": 0.5, "generate.prefill": "Ok",
        "generate.stops": ("\n",), "generate.logit_bias": ((5, 1.0),),
        "generate.forced": "!", "generate.min_new": 1,
    })  # fmt: skip
    assert respond.respond(c, str(tmp_path / "run"))
    settings = seen[0]
    assert settings["top_k"] == 3
    assert settings["temperature"] == 0.5
    assert settings["guide"].kind == "vector"
    assert settings["logit_bias"] == {5: 1.0}
    assert settings["prefill"].tolist() == [[79, 107]] * 2
    assert settings["stops"].next.shape == (2, 259)
    assert not {"top_p", "min_p", "repetition_penalty"} & {*settings}
    for row in answered(tmp_path / "run"):
        assert all(r.startswith("Ok!") for r in row["responses"])


@pytest.fixture
def toy(monkeypatch):
    """A decoder with a loop of its own: the better of two draws."""

    def search(lm, lms, prompts, lengths, key, *, max_new, judge=None, temperature=1.0,
               eos_ids=(), n: int = 2):  # fmt: skip
        out = decode.generate(lm, prompts, lengths, key, max_new=max_new, group=n,
                              temperature=temperature, eos_ids=eos_ids)  # fmt: skip
        scores = judge(out.batch)
        best = scores.argmax(1)[:, None]

        def pick(x):
            x = np.asarray(x)
            return np.take_along_axis(x, best.reshape(*best.shape, *[1] * (x.ndim - 2)), 1)  # fmt: skip

        batch = jax.tree.map(pick, out.batch)._replace(old_logps=None)
        stats = {"tokens_sampled": int(np.sum(out.batch.mask)), "judge_calls": 1}
        return decode.Generated(batch, pick(out.raw_logps), pick(out.truncated), stats)

    module = types.ModuleType("toy_search")
    module.search = search
    monkeypatch.setitem(sys.modules, "toy_search", module)
    return "toy_search.search"


def test_a_search_gets_a_judge_made_of_the_reward(config, tmp_path, toy, capsys):
    c = config(**{"decoder.name": toy, "decoder.n": 3, "generate.group": 1})
    c.generate.reward = {"name": "constraints", "pattern": "[a-m]"}
    assert plugin.load("decoders", toy, {"n": 3}).role == "search"
    assert respond.respond(c, str(tmp_path / "run"))
    rows = answered(tmp_path / "run")
    for row in rows:
        assert row["scores"] == [float(any("a" <= x <= "m" for x in row["responses"][0]))]  # fmt: skip
        assert row["law_logps"] == [None]
    said = capsys.readouterr().out
    assert "judge_calls  3" in said
    assert "score  mean" in said


def test_the_score_that_chooses_is_the_one_that_is_written(config, tmp_path, toy, monkeypatch):  # fmt: skip
    judged, build = [], responder.judge

    def judge(*args):
        scores = build(*args)

        def remembered(batch):
            judged.append(scores(batch))
            return judged[-1]

        return remembered

    monkeypatch.setattr(responder, "judge", judge)
    c = config(**{
        "decoder.name": toy, "decoder.n": 3, "generate.group": 1, "generate.max_new": 12,
        "generate.prefill": "Ok", "generate.stops": tuple("abcdefghijklm"),
    })  # fmt: skip
    c.generate.reward = {"name": "constraints", "pattern": "^Ok[^a-m]*$"}
    assert respond.respond(c, str(tmp_path / "run"))
    rows = answered(tmp_path / "run")
    assert "stop" in [row["finish"][0] for row in rows]
    assert [row["scores"] for row in rows] == [[1.0]] * len(rows)
    assert (np.concatenate(judged) == 1).all()


def test_a_setting_that_the_search_has_itself_is_refused(config, tmp_path):
    c = config("deal", **{"generate.top_k": 3, "generate.group": 1})
    with pytest.raises(ValueError, match=r"generate.top_k and decoder.top_k are both set"):  # fmt: skip
        respond.respond(c, str(tmp_path / "run"))


def test_what_an_engine_does_not_take_is_refused(config, tmp_path, toy):
    c = config(**{"decoder.name": toy, "generate.top_k": 3, "generate.group": 1})
    with pytest.raises(ValueError, match=r"decoder decoders.toy_search.search takes no generate.top_k"):  # fmt: skip
        respond.respond(c, str(tmp_path / "run"))
    c = config(**{"decoder.name": toy})
    with pytest.raises(ValueError, match=r"takes no generate.group"):
        respond.respond(c, str(tmp_path / "run"))
    c = config(**{"decoder.name": toy, "generate.draft": "ngram", "generate.group": 1})
    with pytest.raises(ValueError, match=r"takes no generate.draft"):
        respond.respond(c, str(tmp_path / "run"))


# -- one response


def test_a_response_is_cut_in_front_of_the_first_stop():
    ids = TEXT.encode("one\n\nHuman: two")
    got = output.response(ids, True, TEXT, stops=("Human", "\n\n"))
    assert got == ("one", 5, "stop")
    assert output.response(ids, True, TEXT) == ("one\n\nHuman: two", 15, "length")
    assert output.response([*ids[:3], 257], False, TEXT) == ("one", 4, "eos")
    assert output.response(ids[:3], False, TEXT).finish == "stop"


def test_a_stop_in_the_prefill_does_not_count_and_one_that_comes_too_early_neither():
    ids = TEXT.encode("a.b.c")
    got = output.response(ids, True, TEXT, given=TEXT.encode("x."), stops=(".",))
    assert got == ("x.a", 2, "stop")
    got = output.response(ids, True, TEXT, stops=(".",), min_new=3)
    assert got == ("a.b", 4, "stop")
    got = output.response(TEXT.encode("xab"), False, TEXT, stops=("ab",), min_new=3)
    assert got == ("x", 3, "stop")  # it begins too early and ends in time


def test_a_stop_of_a_special_character_is_seen_in_the_finished_text():
    ids = TEXT.encode("aéb")
    assert output.response(ids, True, TEXT, stops=("é",)) == ("a", 3, "stop")


def test_pieces_are_what_ids_add_to_the_text():
    found = stops.pieces(TEXT, 262)
    assert found[97] == b"a"
    assert found[0xC3] == b"\xff"
    assert found[256:] == [b""] * 6
    table = automaton.stop_strings(["ab"], found)
    state = table.next[0, 97]
    assert table.flag[state, 98]
    assert not table.flag[state, 0xC3]


def test_a_prompt_that_its_decoder_cannot_read_is_named_by_its_line(config, tmp_path):
    lines = ["Which?##a##b##So", "Which?#a#So", "x##y##z"]
    c = config("pine", lines, **{"decoder.separator": "##", "generate.group": 1})
    with pytest.raises(ValueError, match=r"prompts.txt:2: a prompt has the separator '##' 0 times"):  # fmt: skip
        respond.respond(c, str(tmp_path / "run"))
    assert not (tmp_path / "run" / respond.NAME).exists()


# -- what all prompts begin with


@pytest.mark.parametrize("variant", ["", "best_of_n", "deal"])
def test_what_all_prompts_begin_with_is_read_once(
    config, tmp_path, monkeypatch, variant
):
    lines = [f"The same words are in front of {x}" for x in ("a", "the other", "c")]
    made = []
    after = prefill.after
    monkeypatch.setattr(
        prefill, "after", lambda lm, ids: made.append(ids) or after(lm, ids)
    )

    def run(name, least):
        monkeypatch.setattr(respond, "SHARED", least)
        changes = {"generate.group": 1} if variant else {}
        c = config(variant, lines, **changes)
        assert respond.respond(c, str(tmp_path / name))
        return answered(tmp_path / name)

    shares = variant != "deal"  # which draws nothing
    want = run("whole", 1000) if shares else []
    assert made == []
    used, generate, many = [], decode._generate, continuous._admit
    whole = prefill.traced(prefill.WHOLE)
    monkeypatch.setattr(
        decode, "_generate",
        lambda *a, **k: used.append(a[4] != whole) or generate(*a, **k),
    )  # fmt: skip
    monkeypatch.setattr(
        continuous, "_admit",
        lambda *a, **k: used.append(a[1].reader != whole) or many(*a, **k),
    )  # fmt: skip
    got = run("shared", 30)
    assert [TEXT.decode(i) for i in made] == [
        "The same words are in front of "
    ] * shares
    assert any(used) == all(used) == shares or variant == "deal"
    for a, b in zip(got, want, strict=shares):
        assert a["responses"] == b["responses"]
        np.testing.assert_allclose(a["logps"], b["logps"], atol=1e-4)


# -- prompts


def test_prompts_share_a_batch_with_those_of_their_length_and_none_is_cut():
    sizes = [3, 40, 7, 41, 12]
    rows = [prompt_data.Example(str(i), "x" * n, []) for i, n in enumerate(sizes)]
    got = respond.tokenized(rows, TEXT, batch_size=2, room=41)
    assert [len(i) for i in got.ids] == sizes
    assert got.batches == [[3, 1], [4, 2], [0]]
    tokens, lengths, places = respond.padded(got, [0])
    assert places == [0, 0]
    assert tokens.shape == (2, 16)
    assert lengths.tolist() == [3, 3]
    rows = [e._replace(prompt="y" * 40 + e.prompt) for e in rows]
    got = respond.tokenized(rows, TEXT, batch_size=2, room=81)
    assert got.shared == 42
    more = [*rows, rows[0]._replace(id="x", prompt="y" * 85)]
    assert respond.tokenized(more, TEXT, batch_size=2, room=90).shared == 0
    assert respond.padded(got, [0])[0].shape == (2, 42 + 16)
    assert respond.padded(got, [3])[0].shape == (2, 42 + 64)
    assert respond.tokenized(rows[:1], TEXT, batch_size=2, room=81).shared == 0


@pytest.mark.parametrize("method", ["", *generate.METHODS])
@pytest.mark.parametrize("rest", ["", "smoke"])
def test_every_variant_of_the_config_binds(method, rest):
    c = generate.get_config(",".join(x for x in (method, rest) if x))
    bound = responder.bind(c)
    assert (bound is None) == (not method)
    assert c.num_steps == 0
    if bound and bound.role == "search":
        assert c.generate.group == 1


def test_controlled_squashes_its_values_as_they_were_trained():
    hyper, trained = generate.METHODS["controlled"][0], value_mean.get_config().loss
    assert (hyper["centre"], hyper["radius"]) == (trained.centre, trained.radius)


# run as they are by `test_rewards_of_searches_read_the_row_of_each_prompt`
JUDGING = ["best_of_n", "rain", "speculative_rejection", "controlled_blocks", "deal"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in generate.METHODS if m not in JUDGING])
def test_every_variant_answers(method, tmp_path):
    c = generate.get_config(f"{method},smoke")
    c.model.sizes.num_layers = 1
    c.generate.max_new, c.prompts.size, c.batch_size = 3, 2, 2
    for name, small in (("n", 2), ("simulations", 4), ("top_k", 2), ("candidates", 2)):
        if name in c.decoder:
            c.decoder[name] = small
    assert respond.respond(c, str(tmp_path))
    rows = answered(tmp_path)
    assert len(rows) == 2
    for row in rows:
        assert 1 <= row["tokens"][0] <= 3
        assert row["finish"][0] in ("eos", "stop", "length")
        assert ("scores" in row) == bool(c.generate.reward)


def test_there_is_no_other_variant():
    with pytest.raises(ValueError, match=r"no variant 'beam,smok' of this config.*proxy"):  # fmt: skip
        generate.get_config("beam,smok")


def ends_with_the_answer(texts, prompts, answer, *, weight=1.0):
    JUDGED.append((tuple(prompts), tuple(answer), tuple(len(g) for g in texts)))
    return [
        [weight * (t[-1:] < a) / 2 + len(p) / 100 for t in group]
        for group, p, a in zip(texts, prompts, answer, strict=True)
    ]


JUDGED: list = []


@pytest.mark.parametrize("method", ["", *JUDGING])
def test_rewards_of_searches_read_the_row_of_each_prompt(config, tmp_path, toy, method):
    JUDGED.clear()
    lines = ["Say a word", "Two?", "Three", "é", "Five"]  # of one width when padded
    want = dict(zip(lines, "mnopq", strict=True))
    rows = [{"prompt": p, "answer": a} for p, a in want.items()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config(method)
    c.prompts = {"name": "prompts", "path": str(path), "size": 0}
    c.generate.reward = {"name": f"{__name__}.ends_with_the_answer"}
    if method:
        c.generate.group = 1
    assert respond.respond(c, str(tmp_path / "out"))
    assert {p for prompts, _, _ in JUDGED for p in prompts} == {*lines}
    for prompts, answers, _ in JUDGED:
        assert answers == tuple(want[p] for p in prompts)
    for row in answered(tmp_path / "out"):
        for text, score in zip(row["responses"], row["scores"], strict=True):
            expected = (text[-1:] < want[row["prompt"]]) / 2 + len(row["prompt"]) / 100
            assert score == pytest.approx(expected, rel=1e-5)


def test_a_reward_of_a_column_that_is_not_there_is_refused_at_once(config, tmp_path):
    c = config()
    c.generate.reward = {"name": f"{__name__}.ends_with_the_answer"}
    with pytest.raises(ValueError, match=r"takes 'answer'.*neither a column"):
        respond.respond(c, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_responses_follow_a_grammar_and_a_run_keeps_its_own(config, tmp_path):
    path = tmp_path / "answer.json"
    path.write_text('{"enum": [true, "é", [1]]}')
    c = config(**{"generate.grammar": f"json_schema:{path}", "generate.max_new": 8})
    assert respond.respond(c, str(tmp_path / "run"))
    found = [x for row in answered(tmp_path / "run") for x in row["responses"]]
    assert {*found} <= {"true", '"é"', "[1]"}
    assert all(f == "eos" for row in answered(tmp_path / "run") for f in row["finish"])
    assert respond.respond(c, str(tmp_path / "run"))
    path.write_text('{"enum": [true, "é", [2]]}')
    with pytest.raises(ValueError, match=r"answers something else.*grammar"):
        respond.respond(c, str(tmp_path / "run"))
    c.generate.grammar = "regex:("
    with pytest.raises(ValueError, match=r"generate\.grammar: '\(' is no regular"):
        respond.respond(c, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
