//! `eval --predictions`: answers to a whole file.

use std::fs;

use serde_json::{Value, json};

use crate::scene::{adapter, add_template, generate, stdout};
use crate::training::{Workplace, error_of, fail, succeed};

const FLAGS: [&str; 8] = [
    "--model",
    "model",
    "--quantization",
    "none",
    "--data",
    "chats.jsonl",
    "--predictions",
    "answers.jsonl",
];

/// Conversations of a user and an assistant in turns.
fn write_chats(place: &Workplace, chats: &[&[&str]]) {
    let message = |(index, content): (usize, &&str)| {
        let role = if index % 2 == 0 { "user" } else { "assistant" };
        json!({"role": role, "content": content})
    };
    let line = |chat: &&[&str]| {
        let messages: Vec<Value> = chat.iter().enumerate().map(message).collect();
        json!({ "messages": messages }).to_string()
    };
    let lines: Vec<String> = chats.iter().map(line).collect();
    fs::write(place.path("chats.jsonl"), lines.join("\n")).unwrap();
}

/// What `eval` prints, and the lines of the file that it writes.
fn predict(place: &Workplace, flags: &[&str]) -> (String, Vec<Value>) {
    let mut command = place.nibble(&["eval", "--max-new-tokens", "8"]);
    command.args(FLAGS).args(flags);
    let said = stdout(&succeed(command));
    let text = String::from_utf8(place.read("answers.jsonl")).unwrap();
    fs::remove_file(place.path("answers.jsonl")).unwrap();
    (said, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

fn texts<'a>(lines: &'a [Value], key: &str) -> Vec<&'a str> {
    lines.iter().map(|line| line[key].as_str().unwrap()).collect()
}

#[test]
fn answers_are_those_of_generate() {
    let place = Workplace::new();
    add_template(&place);
    let plain = adapter("llama_s0.plain");
    write_chats(&place, &[&["w7 w31", "w5 w6"], &["w9", "w8", "w7", "w6"]]);
    for flags in [&[][..], &["--adapter", &plain]] {
        let answer = generate(&place, &[&["--prompt", "w7 w31"], flags].concat());
        assert!(answer.split(' ').count() > 1, "{answer}");
        let (said, lines) = predict(&place, flags);
        assert_eq!(texts(&lines, "predict")[0], answer, "{flags:?}");
        let prompts = ["w92 w7 w31 w93", "w92 w9 w93 w8 w94 w92 w7 w93"];
        assert_eq!(texts(&lines, "prompt"), prompts);
        assert_eq!(texts(&lines, "label"), ["w5 w6 w94", "w6 w94"]);
        assert_eq!(lines[1]["line"], 2);
        assert!(said.ends_with("wrote answers.jsonl: 2 answers, 0 as in the data"), "{said}");
    }
}

#[test]
fn answers_that_are_those_of_the_data_are_counted() {
    let place = Workplace::new();
    let answer = generate(&place, &["--raw", "--prompt", "w7 w31"]);
    let line = |completion: &str| {
        json!({"prompt": "w7 w31", "completion": format!(" {completion}")}).to_string()
    };
    let lines = [line("w5"), line(&answer), line("w6")];
    fs::write(place.path("chats.jsonl"), lines.join("\n")).unwrap();
    let (said, lines) = predict(&place, &[]);
    assert_eq!(texts(&lines, "predict"), [&answer; 3]);
    assert_eq!(texts(&lines, "label"), ["w5", &answer, "w6"]);
    assert!(said.ends_with("wrote answers.jsonl: 3 answers, 1 as in the data"), "{said}");
    let (json, _) = predict(&place, &["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["predictions"]["exact_match"], 1.0 / 3.0);
}

#[test]
fn nothing_is_replaced_and_text_has_no_questions() {
    let place = Workplace::new();
    add_template(&place);
    write_chats(&place, &[&["w7 w31", "w5 w6"]]);
    let refused = |flags: &[&str]| {
        let mut command = place.nibble(&["eval"]);
        command.args(FLAGS).args(flags);
        let (code, text) = fail(command);
        assert_eq!(code, 2, "{text}");
        error_of(&text).to_string()
    };
    fs::write(place.path("answers.jsonl"), "mine").unwrap();
    assert!(refused(&[]).contains("answers.jsonl is there already\nhint: remove it"));
    assert_eq!(place.read("answers.jsonl"), b"mine");
    fs::remove_file(place.path("answers.jsonl")).unwrap();
    let error = refused(&["--train-on", "all"]);
    assert!(error.contains("record 1 has nothing before its answer\nhint: "), "{error}");
    assert!(!place.path("answers.jsonl").exists());
    let mut command = place.nibble(&["eval", "--max-new-tokens", "100000000000"]);
    command.args(FLAGS);
    let (code, text) = fail(command);
    assert_eq!(code, 1, "{text}");
    assert!(error_of(&text).contains("hint: lower `--max-new-tokens`"), "{text}");
    assert!(!place.path("answers.jsonl").exists());
}
