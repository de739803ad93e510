"""Makes the golden scores of a sequence classifier: transformers on CPU in float32.

    python -m pip install torch transformers
    python tests/golden/make_classifier.py

`classifier/` is a tiny random LlamaForSequenceClassification as transformers saves it, and
`classifier/golden.json` a list of dialogues with the score of each, by chat template: prompt
and response by `apply_chat_template`, in one padded batch. The template chatml writes a line
break behind the end of a turn, and the score is read there.
"""

import json
import pathlib
import tempfile
import zipfile

import make_transformers as tiny
import torch
import transformers

HERE = pathlib.Path(__file__).parent
TEMPLATES = ("chatml", "qwen25", "llama3")
DIALOGUES = [
    ([{"role": "user", "content": "Hello there, friend."}], "Sure."),
    (
        [{"role": "user", "content": "Hello there, friend."}],
        "No more, please!\n\nGo on.",
    ),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is two plus two?"},
            {"role": "assistant", "content": "four"},
            {"role": "user", "content": "And now?"},
        ],
        "Let me look.",
    ),
]


def scores(model, name):
    """The scores of all dialogues under a chat template."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(HERE / "templates" / f"{name}.zip") as packed:
            packed.extractall(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt, response in DIALOGUES:
        turns = [*prompt, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    pad = model.config.pad_token_id
    assert all(pad not in row for row in rows)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        return model(ids, attention_mask=(ids != pad).long()).logits[:, 0].tolist()


def main():
    config = transformers.LlamaConfig(
        **{**tiny.COMMON, "vocab_size": 448}, num_labels=1, pad_token_id=447,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).float()
    tiny.save(tiny.randomise(model, 7), HERE / "classifier")
    cases = []
    for name in TEMPLATES:
        for (prompt, response), score in zip(
            DIALOGUES, scores(model, name), strict=True
        ):
            cases.append(
                {
                    "template": name,
                    "prompt": prompt,
                    "response": response,
                    "score": score,
                }
            )
    text = json.dumps(cases, indent=1)
    (HERE / "classifier/golden.json").write_text(text + "\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main()
