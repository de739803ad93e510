"""`alignax lm_eval` on tasks of its own, by lm-evaluation-harness itself, without a network."""

import json
import subprocess
import sys

import pytest
import tiny

import alignax as ax
from alignax.harness import adapter, encoding
from alignax.models import transformer

pytest.importorskip("lm_eval")

ROWS = [
    {"question": "2 + 2 =", "choices": [" 4", " five", "?"], "label": 0, "answer": "4"},
    {"question": "Say é:", "choices": [" é", " e", " ee"], "label": 2, "answer": "é"},
    {"question": "A longer question. Is it?", "choices": [" yes", " no", " y"], "label": 1, "answer": "yes"},
]  # fmt: skip
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
"""
TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "own_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
""",
    "own_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(make_lm, tmp_path_factory):
    config = transformer.ModelConfig(
        vocab_size=259, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_width=24, max_length=64, eos_ids=(257,),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("lm_eval")
    ax.save(ax.Model(make_lm(config), ax.tokenizer("bytes")), str(path / "model"))
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = COMMON.replace("FILE", str(path / "rows.jsonl"))
    (path / "tasks").mkdir()
    for name, text in TASKS.items():
        (path / "tasks" / f"{name}.yaml").write_text(f"task: {name}{common}{text}")
    return path


def samples(folder, name):
    (file,) = folder.glob(f"out/**/samples_{name}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def test_the_command_evaluates_tasks_of_a_folder(folder):
    env = tiny.environment(HF_HOME=str(folder / "hub"), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [
            sys.executable, "-m", "alignax.cli", "lm_eval", "--model_args",
            "path=model,batch_size=4,max_length=48", "--include_path", "tasks", "--tasks",
            ",".join(TASKS), "--output_path", "out", "--log_samples",
        ],
        cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = folder.glob("out/**/results_*.json")
    results = json.loads(file.read_text())["results"]
    model = ax.load(str(folder / "model"))

    def nats(prompt, response):
        return float(ax.score(model, [prompt], [response]).logps.sum())

    right = []
    for row, sample in zip(ROWS, samples(folder, "own_choice"), strict=True):
        question = [*row["question"].encode()]
        want = [nats(question, [*choice.encode()]) for choice in row["choices"]]
        got = [float(response[0][0]) for response in sample["resps"]]
        assert got == pytest.approx(want, abs=1e-3)
        right.append(max(range(3), key=want.__getitem__) == row["label"])
    assert results["own_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    for row, sample in zip(ROWS, samples(folder, "own_text"), strict=True):
        want = nats([256], [*row["question"].encode()])
        assert float(sample["resps"][0][0]) == pytest.approx(want, abs=1e-3)
    for row, sample in zip(ROWS, samples(folder, "own_answer"), strict=True):
        ids = [*row["question"].encode()]
        out = ax.generate(model, [ids], max_new=6, temperature=0, stops="\n")
        assert sample["resps"][0][0] == out.texts[0][0]


def test_rolling_windows_are_those_of_the_harness():
    from lm_eval import utils

    for many in range(20):
        for length in range(1, 8):
            ids = [*range(many)]
            found = utils.get_rolling_token_windows(ids, -1, length, 1)
            want = [tuple(utils.make_disjoint_window(window)) for window in found]
            got = encoding.windows(ids, -1, length)
            assert [tuple(row) for row in got] == want, (many, length)


def test_the_model_is_registered_once():
    assert adapter.register() is adapter.register()
