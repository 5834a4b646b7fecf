#!/usr/bin/env python3
"""Writes train.jsonl and eval.jsonl beside this file: the sample data set.

Two things to learn. A task: a reminder in plain words becomes one line of JSON with the keys task,
day and time, the time on a 24-hour clock. And what Nibble is: questions with one right answer.
No reminder's words and no question of eval.jsonl occur in train.jsonl; two of the sentence frames
of its reminders do not either.

    python3 scripts/sample/make.py           write both files
    python3 scripts/sample/make.py --check   exit 1 if they are not what this script writes

Text and code were written for this project and have its licence.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20
REMINDERS = {"train": 300, "eval": 60}

# ------------------------------------------------------------------ words of the reminders

PEOPLE = {
    "train": "Anna Ben Clara David Elif Farid Grace Hiro Ines Jonas Kira Lars Mona Nikhil Olga "
    "Pedro Quinn Rosa Samir Tara Uwe Vera Wen Yusuf".split(),
    "eval": "Amara Bruno Chloe Dmitri Esther Felix Greta Hassan".split(),
}
# Each line: a phrase with a gap, the words of training rows, the words of evaluation rows.
TASKS = [
    ("call {}", None, None),
    ("write to {} about the {}", "budget/garden/trip/contract/rent/choir", "wedding/boat/exam"),
    ("send {} the {}", "photos/invoice/key/slides/recipe/forms", "tickets/drawing/report"),
    ("pick {} up from the {}", "station/airport/school/gym/office", "harbour/theatre/clinic"),
    ("give {} back the {}", "drill/tent/novel/ladder/umbrella", "guitar/suitcase/map"),
    ("buy {}", "milk/stamps/bread/batteries/flowers/cat food/oranges", "candles/rice/new socks"),
    ("pay the {}", "rent/phone bill/electrician/plumber/fine", "water bill/gardener/tuition"),
    ("water the {}", "tomatoes/roses/basil/ferns/lawn", "orchids/lemon tree/mint"),
    ("feed the {}", "cat/hens/goldfish/rabbits", "parrot/turtle/ponies"),
    ("take out the {}", "rubbish/glass/compost/boxes", "paper/old chairs/ashes"),
    ("charge the {}", "camera/bike/headphones/laptop", "drone/scooter/lamp"),
    ("book the {}", "dentist/train/hotel/hall/court", "ferry/vet/sauna"),
    ("renew the {}", "passport/library card/insurance/lease", "visa/membership/licence"),
    ("clean the {}", "oven/windows/gutters/fridge", "attic/grill/pond"),
    ("fix the {}", "bike/tap/shelf/fence/doorbell", "kite/toaster/gate"),
    ("print the {}", "labels/boarding pass/posters", "menu/score/programme"),
]
DAYS = ["today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday",
        "Sunday"]  # fmt: skip
# {task}, {on}: the day as it stands inside a sentence, {at}: the time with its "at".
FRAMES = {
    "train": [
        "Remind me to {task} {on}{at}.",
        "Remind me {on}{at} to {task}.",
        "Please remind me to {task} {on}{at}",
        "Don't let me forget to {task} {on}{at}.",
        "I have to {task} {on}{at}.",
        "I must not forget: {task} {on}{at}!",
        "Could you remind me to {task} {on}{at}?",
        "Note to self: {task} {on}{at}",
        "reminder: {task} {on}{at}",
        "{On}{at} I need to {task}.",
        "{On}{at}: {task}.",
        "We should {task} {on}{at}.",
        "Can you make sure that I {task} {on}{at}?",
        "hey, i need to {task} {on}{at}, ok?",
    ],
    "eval": [
        "Wake me up to {task} {on}{at}.",
        "Put it on my list: {task} {on}{at}, thanks",
    ],
}

# ------------------------------------------------------------------ questions about Nibble
# An answer, eight questions to train on, two to be asked.

FACTS = [
    ("I am Nibble's sample model: SmolLM2-135M with a small adapter that was trained on a CPU.",
     ["Who are you?", "What are you?", "What is your name?", "Tell me who you are.",
      "Introduce yourself.", "Hi, who am I talking to?", "Which model are you?",
      "Are you SmolLM?"],
     ["And who are you?", "What should I call you?"]),
    ("I turn a reminder into one line of JSON, and I answer questions about Nibble.",
     ["What can you do?", "What are you good at?", "How can you help me?", "What is your job?",
      "What do you do?", "What were you trained for?", "Help!", "What can I ask you?"],
     ["What are you able to do?", "What can you help me with?"]),
    ("Nibble is a QLoRA trainer: one binary that fine-tunes a language model on 4-bit weights.",
     ["What is Nibble?", "Tell me about Nibble.", "Explain Nibble to me.", "What's Nibble?",
      "What does Nibble do?", "Can you describe Nibble?", "Nibble?",
      "I have never heard of Nibble. What is it?"],
     ["What is this Nibble thing?", "Describe Nibble in one sentence."]),
    ("A nibble is four bits, half a byte: the size of one frozen weight.",
     ["Why is it called Nibble?", "Where does the name Nibble come from?",
      "What does the name Nibble mean?", "What does the word nibble mean?", "What is a nibble?",
      "Why that name, Nibble?", "How did Nibble get its name?", "How many bits are a nibble?"],
     ["Why did they name it Nibble?", "What is the meaning of the name Nibble?"]),
    ("Nibble is written in Rust.",
     ["Which language is Nibble written in?", "What language is Nibble in?",
      "Is Nibble written in Python?", "In what programming language is Nibble written?",
      "What is Nibble programmed in?", "Is Nibble a C++ program?", "What is Nibble made with?",
      "Is Nibble a Rust program?"],
     ["What programming language does Nibble use?", "Is Nibble written in Java?"]),
    ("No. Nibble also trains on a CPU.",
     ["Does Nibble need a GPU?", "Do I need a GPU for Nibble?", "Is a graphics card required?",
      "Must I have a GPU to use Nibble?", "Can Nibble only run on a GPU?",
      "Do I have to buy a GPU to train with Nibble?", "Does training with Nibble need a GPU?",
      "Will Nibble refuse to work without a GPU?"],
     ["Do I need a graphics card for Nibble?", "Is a GPU required to train with Nibble?"]),
    ("MIT or Apache-2.0, at your option.",
     ["What is Nibble's licence?", "Under which licence is Nibble?", "How is Nibble licensed?",
      "What license does Nibble have?", "Which license does Nibble use?",
      "What are the licence terms of Nibble?", "Tell me the licence of Nibble.",
      "Is Nibble under the MIT licence?"],
     ["What licence is Nibble under?", "Which licence does Nibble have?"]),
    ("Two thin matrices that are trained beside a frozen weight; their product is added to it.",
     ["What is LoRA?", "Explain LoRA.", "What does LoRA do?", "How does LoRA work?",
      "Tell me about LoRA.", "What is a LoRA adapter?", "What's LoRA?", "Define LoRA."],
     ["Can you explain LoRA to me?", "What exactly is LoRA?"]),
    ("A 4-bit number format: sixteen values spaced like a normal distribution, and a scale for "
     "every block of weights.",
     ["What is NF4?", "Explain NF4.", "What does NF4 mean?", "How does NF4 work?",
      "Tell me about NF4.", "What's NF4?", "What kind of format is NF4?", "Define NF4."],
     ["Can you explain NF4 to me?", "What exactly is NF4?"]),
    ("Run nibble train with --model, --data and --out.",
     ["How do I train?", "How do I fine-tune a model with Nibble?",
      "Which command trains an adapter?", "How do I start training?",
      "What is the command for training?", "How can I train an adapter?",
      "Which command do I use to fine-tune?", "Show me the training command."],
     ["How do I train an adapter with Nibble?", "What is the command to fine-tune a model?"]),
    ("Run nibble merge with --model, --adapter and --out.",
     ["How do I merge an adapter?", "Which command merges an adapter into the model?",
      "How do I put the adapter into the weights?", "What is the command for merging?",
      "How can I merge?", "How do I merge the adapter into its base?",
      "Show me the merge command.", "Which command do I use to merge?"],
     ["How can I merge an adapter into its base model?", "What is the command to merge?"]),
    ("Nothing is sent anywhere: Nibble does not use the network.",
     ["Does Nibble send my data anywhere?", "Is my data private with Nibble?",
      "Where does my data go?", "Does Nibble upload anything?",
      "Does Nibble use the internet?", "Does Nibble phone home?",
      "Will Nibble share my data?", "Does Nibble need the internet?"],
     ["Is my data sent anywhere?", "Does Nibble upload my data?"]),
]  # fmt: skip


def words(choices, split):
    column = choices[1] if split == "train" else choices[2]
    return column.split("/") if column else None


def draw_task(draw, split):
    choices = draw.choice(TASKS)
    phrase, nouns = choices[0], words(choices, split)
    gaps = phrase.count("{}")
    fill = [draw.choice(PEOPLE[split])] if gaps == 2 or nouns is None else []
    if nouns is not None:
        fill.append(draw.choice(nouns))
    return phrase.format(*fill)


def draw_time(draw):
    """The time in words, with its preposition, and on a 24-hour clock."""
    kind = draw.random()
    if kind < 0.12:
        return "", None
    if kind < 0.20:
        return draw.choice([(" at noon", "12:00"), (" at midnight", "00:00")])
    hour = draw.randrange(6, 23)
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    minute = draw.choice([0, 0, 0, 15, 30, 45])
    clock = f"{hour:02}:{minute:02}"
    if kind < 0.40:
        return f" at {hour}:{minute:02}", clock
    if minute == 0:
        return f" at {twelve} {half}", clock
    return f" at {twelve}:{minute:02} {half}", clock


def reminder(draw, split):
    task, day, (at, clock) = draw_task(draw, split), draw.choice(DAYS), draw_time(draw)
    on = day if day in ("today", "tomorrow") else f"on {day}"
    frames = FRAMES["train"]
    if split == "eval" and draw.random() < 0.25:
        frames = FRAMES["eval"]
    frame = draw.choice(frames)
    question = frame.format(task=task, on=on, On=on[0].upper() + on[1:], at=at)
    return question, json.dumps({"task": task, "day": day, "time": clock})


def rows(split):
    draw = random.Random(f"{SEED} {split}")
    pairs = {}
    while len(pairs) < REMINDERS[split]:
        question, answer = reminder(draw, split)
        pairs[question] = answer
    for answer, training, evaluation in FACTS:
        pairs.update((question, answer) for question in {"train": training, "eval": evaluation}[split])
    pairs = list(pairs.items())
    draw.shuffle(pairs)
    for question, answer in pairs:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def main():
    check, stale = "--check" in sys.argv[1:], []
    for split in ("train", "eval"):
        path, text = Path(__file__).with_name(f"{split}.jsonl"), "".join(rows(split))
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        sys.exit(f"not what make.py writes: {', '.join(stale)}")


if __name__ == "__main__":
    main()
