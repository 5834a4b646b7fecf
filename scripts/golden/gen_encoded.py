#!/usr/bin/env python3
"""Ids and loss masks of records of every format, from transformers: the oracle of src/data/encode.rs.

    gen_encoded.py TOKENIZER_FOLDER TEMPLATE_WITH_GENERATION_BLOCKS OUT.json

Chats go through `apply_chat_template(return_assistant_tokens_mask=True)`. Texts and completions are
what TRL's SFTTrainer makes of them: the tokenizer on the whole text, an EOS behind it, and for a
completion the tokens of the prompt masked. Needs transformers 5.
"""

import json
import sys
from pathlib import Path

from gen_chat import CONVERSATIONS
from transformers import AutoTokenizer

TEXTS = ["Once upon a time.", "Grüße 🤖\n\n  ok", "<|im_start|>user\nHi<|im_end|>"]
COMPLETIONS = [("2 + 2 =", " 4"), ("Q: Köln?\nA:", " Ja.\n"), ("Say hi", "!"), ("a b ", "c"), ("x<|im_end|>", "y<|im_end|>")]


def main():
    folder, template, out = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = Path(template).read_text(encoding="utf-8")
    records = []
    for messages, tools in CONVERSATIONS.values():
        try:
            encoded = tokenizer.apply_chat_template(
                messages, tools, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:
            continue
        record = {"messages": messages} | ({"tools": tools} if tools else {})
        records.append(
            {"record": record, "input_ids": encoded["input_ids"], "trained": encoded["assistant_masks"]}
        )
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
        records.append({"record": {"text": text}, "input_ids": ids, "trained": [1] * len(ids)})
    for prompt, completion in COMPLETIONS:
        ids = tokenizer(prompt + completion)["input_ids"]
        ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
        prompt_ids = tokenizer(prompt)["input_ids"]
        # A token that spans the border is trained.
        masked = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids)) if a != b), len(prompt_ids))
        records.append(
            {
                "record": {"prompt": prompt, "completion": completion},
                "input_ids": ids,
                "trained": [0] * masked + [1] * (len(ids) - masked),
            }
        )
    golden = {"template": source, "records": records}
    Path(out).write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
