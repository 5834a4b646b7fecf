//! What is learned from.

use std::fs;

use serde_json::{Value, json};

use super::runs::{Run, Runs, arguments};
use crate::training::fail;

/// What a run took from its training data.
fn training(run: &Run) -> Value {
    run.start()["data"][0].clone()
}

/// Pre-tokenized rows of these lengths.
fn write_lengths(runs: &Runs, name: &str, lengths: &[usize]) {
    let row = |length: &usize| {
        let ids: Vec<usize> = (0..*length).map(|index| 3 + (7 * index + length) % 120).collect();
        json!({ "input_ids": ids }).to_string()
    };
    let lines: Vec<String> = lengths.iter().map(row).collect();
    fs::write(runs.place.path(name), lines.join("\n")).unwrap();
}

#[test]
fn data() {
    let runs = Runs::new();
    write_lengths(&runs, "other.jsonl", &[9, 12]);
    let run = runs.train("data=other.jsonl");
    let data = training(&run);
    assert_eq!((&data["file"], &data["tokens"]), (&json!("other.jsonl"), &json!(21)));
    assert_eq!(run.numbers("step", "num_input_tokens_seen"), [21.0]);
    // Several files.
    fs::create_dir(runs.place.path("parts")).unwrap();
    write_lengths(&runs, "parts/b.jsonl", &[12, 999]);
    write_lengths(&runs, "parts/a.jsonl", &[9]);
    let error = runs.refused("data=parts max-length=64").replace('\\', "/");
    assert!(error.contains("parts/b.jsonl:2: document is longer than 64 tokens"), "{error}");
    write_lengths(&runs, "parts/b.jsonl", &[12]);
    let together = runs.train("data=parts/*.jsonl");
    assert_eq!(together.numbers("step", "loss"), run.numbers("step", "loss"));
    assert_eq!(training(&together)["file"], "parts/*.jsonl");
    // Those that are named: behind one flag, with one each, in a file; and again from the run's own settings.
    let rest = arguments("!data");
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    let named = ["--data", "parts/a.jsonl", "parts/b.jsonl"];
    let each = ["--data=parts/a.jsonl", "--data=parts/b.jsonl"];
    fs::write(runs.place.path("run.toml"), "data = ['parts/a.jsonl', 'parts/b.jsonl']").unwrap();
    let config = ["--config", "run.toml"];
    for given in [&named[..], &each, &config] {
        let several = runs.nibble(&[&rest, given].concat());
        assert_eq!(several.numbers("step", "loss"), run.numbers("step", "loss"), "{given:?}");
        assert_eq!(training(&several)["file"], "parts/a.jsonl, parts/b.jsonl");
        let more = ["--resume", "--max-steps", "2"];
        let resumed = runs.nibble_into(&several.out, &more);
        assert_eq!(resumed.end()["step"], 2);
    }
    // What gives nothing, or is for something else by its name, is told; what is missing is, before a file is read.
    fs::write(runs.place.path("empty.jsonl"), "\n").unwrap();
    write_lengths(&runs, "test.jsonl", &[7]);
    let odd =
        runs.nibble(&[&rest, &["--data", "other.jsonl", "empty.jsonl", "test.jsonl"][..]].concat());
    let says =
        "no record in empty.jsonl; test.jsonl among the others, which by its name is for test";
    assert!(odd.said.contains(says), "{}", odd.said);
    fs::write(runs.place.path("bad.jsonl"), "no JSON").unwrap();
    let mut command =
        runs.place.nibble(&["train", "--out", "none", "--data", "bad.jsonl", "none.jsonl"]);
    command.args(&rest);
    let error = fail(command).1;
    assert!(error.contains("cannot open none.jsonl"), "{error}");
    let error = runs.refused("data=run.toml");
    assert!(error.contains("hint: settings are read by `--config run.toml`"), "{error}");
}

#[test]
fn bad_records() {
    let runs = Runs::new();
    let rows = [json!({"input_ids": [3, 4, 5]}), json!({"input_ids": "none"}), json!({"text": 5})];
    let rows = rows.map(|row| row.to_string()).join("\n");
    fs::write(runs.place.path("some.jsonl"), rows).unwrap();
    let error = runs.refused("data=some.jsonl");
    assert!(
        error.contains("some.jsonl:2: ") && error.contains("(and 1 more bad record)"),
        "{error}"
    );
    let run = runs.train("data=some.jsonl bad-records=skip");
    assert_eq!(training(&run)["documents"], 1);
    assert!(run.said.contains("; 2 that cannot be used, left out"), "{}", run.said);
}

#[test]
fn rename_columns() {
    let runs = Runs::new();
    let rows = ["w3 w4", "w5"].map(|text| json!({"body": text, "text": "w9 w9 w9"}).to_string());
    fs::write(runs.place.path("named.jsonl"), rows.join("\n")).unwrap();
    let error = runs.refused("data=named.jsonl rename-columns=body=text");
    assert!(error.contains("named.jsonl:1: `--rename-columns`: the record has a field"), "{error}");
    let run = runs.train("data=named.jsonl rename-columns=body=text rename-columns=text=other");
    // Three words, and an end to each.
    assert_eq!(training(&run)["tokens"], 5);
    let swapped = "data=named.jsonl rename-columns=body=text rename-columns=text=body";
    assert_eq!(training(&runs.train(swapped))["tokens"], 5);
    let error = runs.refused(&format!("{swapped} rename-columns=title=x"));
    assert!(error.contains("no record of named.jsonl has a field `title`"), "{error}");
    // Several in one, whether the records can be told without them or not.
    fs::write(runs.place.path("strange.jsonl"), json!({"a": "w3", "b": "w4"}).to_string()).unwrap();
    let once = "hint: the flag is given once for each field: `--rename-columns ";
    for (file, value, says, pair) in [
        ("named", "body", "expected one `OLD=NEW`", "a=b"),
        ("named", "body=text,text", "expected one `OLD=NEW`", "a=b"),
        ("named", "body=text,text=other", "has a field `body=text,text`", "body=text"),
        ("strange", "a=prompt,b=completion", "no field `a=prompt,b`", "a=prompt"),
    ] {
        let error = runs.refused(&format!("data={file}.jsonl rename-columns={value}"));
        assert!(error.contains(says) && error.contains(&format!("{once}{pair} ")), "{error}");
    }
    // Evaluation data may have the right names already, and records have nothing where others have it.
    let rows = [json!({"body": "w3 w4", "text": null}), json!({"body": null, "text": "w5"})];
    let rows = rows.map(|row| row.to_string()).join("\n");
    fs::write(runs.place.path("either.jsonl"), rows).unwrap();
    fs::write(runs.place.path("right.jsonl"), json!({"text": "w6 w7"}).to_string()).unwrap();
    let run = runs.train("data=either.jsonl eval-data=right.jsonl rename-columns=body=text");
    assert_eq!(training(&run)["tokens"], 5);
    assert_eq!(run.numbers("eval", "num_documents"), [1.0]);
    // A table in a file may have any name in it.
    let rows = ["a, b=c,text", "w3 w4,w9"].join("\n").replacen("a, b=c", "\"a, b=c\"", 1);
    fs::write(runs.place.path("table.csv"), rows).unwrap();
    let toml = "[rename_columns]\n\"a, b=c\" = \"text\"\ntext = \"rest\"\n";
    fs::write(runs.place.path("renames.toml"), toml).unwrap();
    assert_eq!(training(&runs.train("data=table.csv config=renames.toml"))["tokens"], 3);
}

#[test]
fn eval_data() {
    let runs = Runs::new();
    let run = runs.train("eval-data=eval.jsonl max-steps=2");
    assert_eq!(run.numbers("eval", "num_documents"), [4.0]);
    assert_eq!(run.numbers("eval", "step"), [2.0], "once, at the end");
    let text = String::from_utf8(runs.place.read("eval.jsonl")).unwrap();
    let targets = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        row["input_ids"].as_array().unwrap().len() as f64 - 1.0
    };
    let expected: f64 = text.lines().map(targets).sum();
    assert_eq!(run.numbers("eval", "num_target_tokens"), [expected]);
    assert!(!run.said.contains("also trained on"), "{}", run.said);
    let some = [text.as_bytes(), b"\n", &runs.place.read("train.jsonl")].concat();
    fs::write(runs.place.path("both.jsonl"), some).unwrap();
    let said = runs.train("eval-data=both.jsonl max-steps=1").said;
    let warning = "warning: 24 of 28 evaluation documents are also trained on: ";
    assert!(said.contains(warning), "{said}");
}

#[test]
fn validation_split() {
    let runs = Runs::new();
    let run = runs.train("validation-split=0.25");
    write_lengths(&runs, "one.jsonl", &[90]);
    let one = "data=one.jsonl max-length=16 truncation=split validation-split=0.2";
    let error = runs.refused(one);
    assert!(
        error.contains("`--validation-split 0.2`: there is one record, or all are the same"),
        "{error}"
    );
    let said = "validation split: 6 of the documents held out, 18 to train on";
    assert!(run.said.contains(said), "{}", run.said);
    assert_eq!(training(&run)["documents"], 18);
    assert_eq!(run.numbers("eval", "num_documents"), [6.0]);
}

#[test]
fn max_length() {
    let runs = Runs::new();
    write_lengths(&runs, "rows.jsonl", &[20, 20, 20, 20]);
    for (length, rows) in [(20, 4), (39, 4), (40, 2), (80, 1)] {
        let run = runs.train(&format!("data=rows.jsonl max-length={length}"));
        assert_eq!(training(&run)["rows"], rows, "{length}");
    }
    let error = runs.refused("data=rows.jsonl max-length=19");
    assert!(error.contains("rows.jsonl:1") && error.contains("--max-length"), "{error}");
}

#[test]
fn format() {
    let runs = Runs::new();
    let row = json!({"text": "w3 w4 w5", "input_ids": [7, 8, 9, 10, 11]}).to_string();
    fs::write(runs.place.path("both.jsonl"), row).unwrap();
    let error = runs.refused("data=both.jsonl");
    assert!(error.contains("--format text") && error.contains("--format tokens"), "{error}");
    let tokens = |format: &str| {
        let run = runs.train(&format!("data=both.jsonl format={format} self-checks=false"));
        training(&run)["tokens"].as_u64().unwrap()
    };
    // text: three words, and an end
    assert_eq!((tokens("tokens"), tokens("text")), (5, 4));
}

#[test]
fn chat_template_kwargs() {
    let runs = Runs::new();
    let source = "{% for m in messages %}{{ m.content }} {% if think | default(true) %}w9 {% endif %}w2 \
                  {% endfor %}";
    fs::write(runs.place.path("turns.jinja"), source).unwrap();
    let record = |kwargs: Value| {
        let turn = |role: &str| json!({"role": role, "content": "w3 w4"});
        let messages = ["user", "assistant"].map(turn);
        json!({"messages": messages, "chat_template_kwargs": kwargs}).to_string()
    };
    let records = [record(Value::Null), record(json!({"think": true}))].join("\n");
    fs::write(runs.place.path("chat.jsonl"), records).unwrap();
    let kwargs = |text: &str| {
        let toml = format!("chat_template = \"turns.jinja\"\nchat_template_kwargs = '{text}'\n");
        fs::write(runs.place.path("kwargs.toml"), toml).unwrap();
        "data=chat.jsonl config=kwargs.toml"
    };
    let tokens = |run: &Run| training(run)["tokens"].as_u64().unwrap();
    let [by_default, without] = ["{}", r#"{"think": false}"#].map(|text| {
        let run = runs.train(kwargs(text));
        let again = runs.train(&format!("data=chat.jsonl config={}/settings.toml", run.out));
        assert_eq!(tokens(&again), tokens(&run));
        tokens(&run)
    });
    assert_eq!(by_default - without, 2, "of the record that says nothing itself");
    let error = runs.refused(kwargs(r#"{"enable_thinking": false}"#));
    let says = "`--chat-template-kwargs`: the chat template reads no `enable_thinking`\n\
                hint: it reads `think`";
    assert!(error.contains(says), "{error}");
    let error = runs.refused(kwargs("think"));
    assert!(error.contains("expected a JSON object"), "{error}");
}

#[test]
fn chat_template() {
    let runs = Runs::new();
    let turns =
        json!([{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]);
    fs::write(runs.place.path("chat.jsonl"), json!({"messages": turns}).to_string()).unwrap();
    let error = runs.refused("data=chat.jsonl");
    assert!(error.contains("--chat-template"), "{error}");
    let template = |ending: &str| {
        let source =
            format!("{{% for m in messages %}}{{{{ m.content }}}} {ending} {{% endfor %}}");
        fs::write(runs.place.path("turns.jinja"), &source).unwrap();
        source
    };
    // The answer and what the template ends it with.
    for (ending, targets) in [("w2", 2.0), ("w9 w2", 3.0)] {
        let source = template(ending);
        let run = runs.train("data=chat.jsonl chat-template=turns.jinja");
        assert_eq!(run.numbers("step", "num_target_tokens_seen"), [targets], "{ending}");
        let kept = runs.place.read(&format!("{}/chat_template.jinja", run.out));
        assert_eq!(String::from_utf8(kept).unwrap(), source);
    }
}

/// Its copy in the checkpoint is used.
#[test]
fn a_template_that_is_gone_is_that_of_the_checkpoint() {
    let runs = Runs::new();
    let turns =
        json!([{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]);
    fs::write(runs.place.path("chat.jsonl"), json!({"messages": turns}).to_string()).unwrap();
    let write = |name: &str, source: &str| fs::write(runs.place.path(name), source).unwrap();
    write("turns.jinja", "{% for m in messages %}{{ m.content }} w9 w2 {% endfor %}");
    let flags = "data=chat.jsonl chat-template=turns.jinja max-steps";
    let whole = runs.train(&format!("{flags}=2"));
    let run = runs.train(&format!("{flags}=1"));
    fs::remove_file(runs.place.path("turns.jinja")).unwrap();
    let resumed = runs.nibble_into(&run.out, &["--resume", "--max-steps", "2"]);
    let copy = format!("{}/checkpoint-1/chat_template.jinja", run.out);
    let note = format!("chat template turns.jinja is gone; the run has a copy, {copy}");
    assert!(resumed.said.replace('\\', "/").contains(&note), "{}", resumed.said);
    assert_eq!(resumed.optimizer("master"), whole.optimizer("master"));
    // A new run has no copy.
    let error = runs.refused(&format!("{flags}=1"));
    assert!(error.contains("chat template `turns.jinja` is neither a file nor"), "{error}");
    let error = runs.refused("data=chat.jsonl chat-template=~/turns.jinja");
    assert!(error.contains("hint: `~` is not expanded in quotes or in a file"), "{error}");
}

#[test]
fn train_on() {
    let runs = Runs::new();
    let row = json!({"prompt": "w3 w4 w5 w6 ", "completion": "w7 w8 w9"}).to_string();
    fs::write(runs.place.path("pairs.jsonl"), row).unwrap();
    // The completion and its end; with the prompt, all but the first token.
    for (part, targets) in [("assistant", 4.0), ("completion", 4.0), ("all", 7.0)] {
        let run = runs.train(&format!("data=pairs.jsonl train-on={part}"));
        assert_eq!(run.numbers("step", "num_target_tokens_seen"), [targets], "{part}");
    }
}

#[test]
fn truncation() {
    let runs = Runs::new();
    write_lengths(&runs, "rows.jsonl", &[10, 25, 12]);
    let error = runs.refused("data=rows.jsonl max-length=16");
    assert!(error.contains("rows.jsonl:2"), "{error}");
    for (how, documents, tokens) in
        [("drop", 2, 22), ("right", 3, 38), ("left", 3, 38), ("split", 4, 47)]
    {
        let run = runs.train(&format!("data=rows.jsonl max-length=16 truncation={how}"));
        let data = training(&run);
        assert_eq!((&data["documents"], &data["tokens"]), (&json!(documents), &json!(tokens)));
        assert!(run.said.contains("1 longer than `--max-length`"), "{}", run.said);
        assert_eq!(run.said.contains("; 1 answer cut before the end"), how == "right");
    }
    // Which end is kept shows in the loss of the first batch.
    let loss = |how: &str| {
        let flags = "data=rows.jsonl max-length=16 packing=false per-device-train-batch-size=3";
        runs.train(&format!("{flags} truncation={how}")).numbers("step", "loss")
    };
    assert_ne!(loss("left"), loss("right"));
}

#[test]
fn packing() {
    let runs = Runs::new();
    let [packed, apart] = ["true", "false"].map(|on| runs.train(&format!("packing={on}")));
    assert_eq!(training(&apart)["rows"], 24);
    assert!(training(&packed)["rows"].as_u64().unwrap() < 18);
    // Documents of one row do not see each other: the same tokens in one batch, the same gradient.
    write_lengths(&runs, "three.jsonl", &[8, 9, 10]);
    let [packed, apart] = ["true", "false"].map(|on| {
        let flags = "data=three.jsonl shuffle=false per-device-train-batch-size=3";
        runs.train(&format!("{flags} packing={on}"))
    });
    assert_eq!((&training(&packed)["rows"], &training(&apart)["rows"]), (&json!(1), &json!(3)));
    let (packed, apart) = (packed.numbers("step", "loss")[0], apart.numbers("step", "loss")[0]);
    assert!((packed - apart).abs() < 1e-6, "{packed} {apart}");
}

#[test]
fn shuffle() {
    let runs = Runs::new();
    let lengths = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    write_lengths(&runs, "rows.jsonl", &lengths);
    let order = |on: bool| {
        let flags = "data=rows.jsonl packing=false !max-steps num-train-epochs=2";
        let run = runs.train(&format!("{flags} shuffle={on}"));
        let seen = run.numbers("step", "num_input_tokens_seen");
        let before = std::iter::once(&0.0).chain(&seen);
        seen.iter().zip(before).map(|(now, before)| (now - before) as usize).collect::<Vec<_>>()
    };
    assert_eq!(order(false), [lengths, lengths].concat());
    let shuffled = order(true);
    let (first, second) = shuffled.split_at(lengths.len());
    assert!(first != lengths && first != second, "{shuffled:?}");
    for epoch in [first, second] {
        let mut sorted = epoch.to_vec();
        sorted.sort();
        assert_eq!(sorted, lengths, "every row once in an epoch");
    }
}
