#!/usr/bin/env python3
"""Renders conversations with transformers' own chat-template engine: the oracle of src/data/template.rs.

    gen_chat.py OUT TEMPLATE.jinja...     one OUT/NAME.json for each template

Each file holds the template and, for every conversation it accepts, the text with and without the
generation prompt. Where the template has `{% generation %}` blocks, their character ranges are there
too; where it has none, but NAME_training.jinja beside it has (as TRL's do) and gives the same text,
those of the latter. A conversation that the template refuses has its error message instead. The
clock stands at 2024-07-26.

Needs transformers 5. `tests/data/chat` holds the output for `tests/data/chat/*.jinja`.
"""

import datetime
import json
import re
import sys
from pathlib import Path

from transformers.utils import chat_template_utils as engine


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 9, 5, 3)


engine.datetime = Clock

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a place, in °C & more: <now>",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Town"},
                    "days": {"type": "integer", "enum": [1, 3, 7]},
                },
                "required": ["place"],
            },
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Köln", "days": 3, "exact": True}},
}
CONVERSATIONS = {
    "one": ([user("Hi"), assistant("Hello!")], None),
    "system": ([{"role": "system", "content": "Be brief."}, user("2+2?"), assistant("4")], None),
    "turns": ([user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")], None),
    "system turns": (
        [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d")],
        None,
    ),
    "open": ([user("a"), assistant("b"), user("c")], None),
    "space": ([user("  lead\n"), assistant("\n  kept?  \n"), user("\t"), assistant("x\n\ny")], None),
    "unicode": ([user("Grüße 🤖 \"quoted\" <b>&amp;</b>"), assistant("日本語 — ok{{ 1 }}")], None),
    "same text": ([user("b"), assistant("b"), user("b"), assistant("b")], None),
    "thinking": (
        [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("<think>\nso\n</think>\n\nd")],
        None,
    ),
    "reasoning": ([user("a"), assistant("b", reasoning_content="because"), user("c"), assistant("d", reasoning_content="thus")], None),
    "two answers": ([user("a"), assistant("b"), assistant("c")], None),
    "tools": (
        [
            user("Weather in Köln?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "{\"t\": 21.5}"},
            assistant("21.5 °C."),
        ],
        TOOLS,
    ),
    "unused tools": ([user("Hi"), assistant("Hello!")], TOOLS),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, assistant("Hello!")], None),
}  # fmt: skip


def render(source, messages, tools, prompt, specials):
    compiled = engine._compile_jinja_template(source)
    plain = [{key: value for key, value in m.items() if value is not None} for m in messages]
    plain = engine._alias_reasoning_fields(engine._plain_template_data(plain))
    return engine._render_with_assistant_indices(
        compiled, plain, tools, None, prompt, **specials
    )


def cases(source, twin, specials):
    for name, (messages, tools) in CONVERSATIONS.items():
        case = {"name": name, "messages": messages, "tools": tools}
        try:
            case["text"], spans = render(source, messages, tools, False, specials)
            if not spans and twin:
                text, spans = render(twin, messages, tools, False, specials)
                spans = spans if text == case["text"] else None
            if spans:
                case["turns"] = spans
            case["prompt"] = render(source, messages, tools, True, specials)[0]
        except Exception as error:
            case["error"] = str(error)
        yield case


def main():
    out, specials = Path(sys.argv[1]), {"bos_token": "<s>", "eos_token": "</s>"}
    out.mkdir(parents=True, exist_ok=True)
    for path in map(Path, sys.argv[2:]):
        source = path.read_text(encoding="utf-8")
        twin = path.with_name(f"{path.stem}_training.jinja")
        twin = twin.read_text(encoding="utf-8") if twin.exists() else None
        golden = {"template": source, **specials, "cases": list(cases(source, twin, specials))}
        text = json.dumps(golden, ensure_ascii=False, indent=1)
        name = re.sub(r"[^\w.-]", "_", path.stem)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
