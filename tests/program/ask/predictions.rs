//! `eval --predictions`: answers to a whole file.

use std::fs;
#[cfg(unix)]
use std::process::Output;
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::scene::{adapter, add_template, generate, stdout};
use crate::training::{Workplace, error_of, fail, stderr, succeed};

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
        let words = "wrote answers.jsonl: 2 answers, 0 of them equal to the label\n2 cut off: at";
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_stop_string_ends_them() {
    let place = Workplace::new();
    add_template(&place);
    write_chats(&place, &[&["w7 w31", "w5 w6"]]);
    let whole = generate(&place, &["--prompt", "w7 w31"]);
    let word = whole.split(' ').nth(2).unwrap();
    let stop = format!(" {word}");
    let (said, lines) = predict(&place, &["--stop-strings", &stop]);
    assert_eq!(texts(&lines, "predict"), [&whole[..whole.find(&stop).unwrap()]]);
    assert_eq!(lines[0]["finish_reason"], "stop");
    assert!(!said.contains("cut off"), "{said}");
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
    let words = "wrote answers.jsonl: 3 answers, 1 of them equal to the label\n3 cut off: at";
    assert!(said.contains(words), "{said}");
    let (json, lines) = predict(&place, &["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["predictions"]["exact_match"], 1.0 / 3.0);
    assert!(json["predictions"]["cut"] == 3 && texts(&lines, "finish_reason") == ["length"; 3]);
    // Where what the model says ends sequences, it comes to an end.
    let last = answer.rsplit(' ').next().unwrap();
    fs::write(place.path("model/tokenizer_config.json"), json!({"eos_token": last}).to_string())
        .unwrap();
    let (said, lines) = predict(&place, &[]);
    assert!(said.ends_with("equal to the label") && !said.contains("cut off"), "{said}");
    assert_eq!(texts(&lines, "finish_reason"), ["stop"; 3]);
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
    #[cfg(unix)]
    {
        // Of a disk that is not there now.
        std::os::unix::fs::symlink("nowhere/answers", place.path("answers.jsonl")).unwrap();
        assert!(refused(&[]).contains("answers.jsonl is there already\nhint: remove it"));
        fs::remove_file(place.path("answers.jsonl")).unwrap();
    }
    assert!(refused(&["--save-logits", "answers.jsonl"]).contains("name one file\nhint: "));
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

/// Starts `eval` with `flags`, and waits until `partial` has as many bytes.
fn at_work(place: &Workplace, flags: &[&str], partial: &str, least_bytes: u64) -> Child {
    let mut command = place.nibble(&["eval", "--model", "model", "--quantization", "none"]);
    command.args(flags).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut eval = command.spawn().unwrap();
    let path = place.path(partial);
    while fs::metadata(&path).map_or(true, |file| file.len() < least_bytes) {
        assert!(eval.try_wait().unwrap().is_none(), "it ended before {partial} was seen");
        std::thread::sleep(Duration::from_millis(1));
    }
    eval
}

#[test]
fn answers_have_their_name_when_all_are_made() {
    let place = Workplace::new();
    add_template(&place);
    write_chats(&place, &[&["w7 w31", "w5 w6"][..]; 64]);
    let flags = ["--data", "chats.jsonl", "--predictions", "answers.jsonl"];
    let mut eval = at_work(&place, &flags, ".answers.jsonl.partial", 1);
    eval.kill().unwrap();
    eval.wait().unwrap();
    assert!(!place.path("answers.jsonl").exists());
    let partial = String::from_utf8(place.read(".answers.jsonl.partial")).unwrap();
    let first: Value = serde_json::from_str(partial.lines().next().unwrap()).unwrap();
    assert_eq!(first["prompt"], "w92 w7 w31 w93");
    // What it left is in nobody's way.
    assert_eq!(predict(&place, &[]).1.len(), 64);
    assert!(!place.path(".answers.jsonl.partial").exists());
}

/// What Ctrl-C leaves of so many answers, pressed once the file of answers has so many bytes.
#[cfg(unix)]
fn interrupted(chats: usize, least_bytes: u64) -> (Workplace, Output) {
    let place = Workplace::new();
    add_template(&place);
    write_chats(&place, &vec![&["w7 w31", "w5 w6"][..]; chats]);
    let flags = ["--data", "chats.jsonl", "--predictions", "answers.jsonl"];
    let eval = at_work(&place, &flags, ".answers.jsonl.partial", least_bytes);
    crate::training::signal(&eval, "INT");
    let output = eval.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    (place, output)
}

#[cfg(unix)]
#[test]
fn answers_that_are_made_outlive_ctrl_c() {
    let (place, output) = interrupted(512, 1);
    let said = stderr(&output);
    let lines = String::from_utf8(place.read("answers.jsonl")).unwrap().lines().count();
    let words = format!("interrupted: {lines} of 512 documents are answered in answers.jsonl");
    assert!((1..512).contains(&lines) && said.contains(&words), "{lines}: {said}");
    // The figures were there before.
    assert!(stdout(&output).contains("exact match"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_before_the_first_answer_leaves_nothing() {
    let (place, output) = interrupted(4096, 0);
    let said = stderr(&output);
    assert!(said.contains("interrupted; nothing was written"), "{said}");
    let left: Vec<String> =
        place.list("").into_iter().filter(|name| name.contains("answers")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn files_that_come_meanwhile_are_left_alone() {
    let place = Workplace::new();
    add_template(&place);
    write_chats(&place, &[&["w7 w31", "w5 w6"][..]; 64]);
    let row = json!({"input_ids": vec![3; 24]}).to_string();
    fs::write(place.path("rows.jsonl"), vec![row; 512].join("\n")).unwrap();
    for (flags, least_bytes) in [
        (["--data", "chats.jsonl", "--predictions", "a.jsonl"], 1),
        (["--data", "rows.jsonl", "--save-logits", "a.safetensors"], 0),
    ] {
        let name = flags[3];
        let eval = at_work(&place, &flags, &format!(".{name}.partial"), least_bytes);
        fs::write(place.path(name), "mine").unwrap();
        let output = eval.wait_with_output().unwrap();
        let text = stderr(&output);
        let kept = name.replace("a.", "a-2.");
        assert!(!output.status.success() && text.contains(&format!("is {kept}")), "{text}");
        assert_eq!(place.read(name), b"mine");
        let figures = String::from_utf8_lossy(&output.stdout);
        assert!(figures.contains("perplexity"), "{figures}");
        assert!(place.read(&kept).len() > 4096);
    }
}
