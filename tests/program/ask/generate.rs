//! Answers to a prompt.

use std::fs;
use std::io::Read;
use std::process::Stdio;

use serde_json::{Value, json};

use super::scene::{adapter, add_model, add_template, generate, ids, logits, stdout};
use crate::training::{Workplace, error_of, fail, stderr, succeed};

/// Each word is the likeliest one after a forward pass over all words before it: what the
/// key/value cache remembers is what the whole model computes, in every family, past the end of a
/// sliding window.
#[test]
fn greedy_words_are_the_likeliest_of_a_whole_forward_pass() {
    let place = Workplace::new();
    let prompt = "w7 w31 w90 w15";
    let llamas = ["llama_s0", "llama_tied_s2", "mistral_s0", "qwen2_s0", "qwen3_s0"];
    let others = ["gemma_s0", "gemma2_s0", "gemma3_s0", "gpt2_s0"];
    for case in llamas.into_iter().chain(others) {
        add_model(&place, case);
        let flags = ["--model", case, "--raw", "--prompt", prompt, "--max-new-tokens", "24"];
        let mut command = place.nibble(&["generate", "--quantization", "none"]);
        command.args(flags);
        let answer = stdout(&succeed(command));
        let row = [ids(prompt), ids(&answer)].concat();
        assert!(row.len() >= 20, "{case}: {answer}");
        let whole = logits(&place, case, std::slice::from_ref(&row), &[]);
        for (position, &id) in row.iter().enumerate().skip(ids(prompt).len()) {
            assert_eq!(id, whole.likeliest(0, position - 1), "{case}: {answer}");
        }
    }
}

/// A prompt is fed in pieces of 512 tokens; where they meet, nothing is lost.
#[test]
fn a_long_prompt_is_fed_in_pieces() {
    let place = Workplace::new();
    let prompt: Vec<u64> = (0..1030).map(|index| 3 + (index * index + 5 * index) % 120).collect();
    let words: Vec<String> = prompt.iter().map(|id| format!("w{id}")).collect();
    let answer = generate(&place, &["--raw", "--prompt", &words.join(" ")]);
    let row = [prompt, ids(&answer)].concat();
    let whole = logits(&place, "model", std::slice::from_ref(&row), &[]);
    for (position, &id) in row.iter().enumerate().skip(1030) {
        assert_eq!(id, whole.likeliest(0, position - 1), "{answer}");
    }
    let flags = ["--raw", "--context-length", "1030", "--prompt", &words.join(" ")];
    let mut command = place.nibble(&["generate", "--model", "model"]);
    command.args(flags);
    let (code, text) = fail(command);
    assert_eq!(code, 2);
    let message =
        "error: the prompt has 1030 tokens, the context 1030\nhint: raise `--context-length`";
    assert!(error_of(&text).starts_with(message), "{text}");
}

#[test]
fn an_end_of_sequence_ends_the_answer() {
    let place = Workplace::new();
    let answer = generate(&place, &["--raw", "--prompt", "w7 w31"]);
    let words: Vec<&str> = answer.split(' ').collect();
    let first = words.iter().position(|word| *word == words[4]).unwrap();
    let path = place.path("model/tokenizer_config.json");
    fs::write(path, format!(r#"{{"eos_token": "{}", "bos_token": "w1"}}"#, words[4])).unwrap();
    let cut = generate(&place, &["--raw", "--prompt", "w7 w31"]);
    assert_eq!(cut, words[..first].join(" "), "of {answer}");
}

/// The text before it is the answer, wherever tokens begin and end, and none is cut.
#[test]
fn a_stop_string_ends_the_answer() {
    let place = Workplace::new();
    let prompt = ["--raw", "--prompt", "w7 w31"];
    let answer = generate(&place, &prompt);
    let words: Vec<&str> = answer.split(' ').collect();
    let within = format!("{} {}", &words[3][1..], &words[4][..2]);
    let never = format!("{} {}?", words[0], words[1]);
    let ask = |stops: &[&str]| {
        let stops = stops.iter().flat_map(|text| ["--stop-strings", text]);
        let flags: Vec<&str> = prompt.into_iter().chain(stops).collect();
        let base = ["generate", "--model=model", "--quantization=none", "--max-new-tokens=8"];
        let output = succeed(place.nibble(&[&base[..], &flags].concat()));
        (stdout(&output), stderr(&output))
    };
    let (cut, said) = ask(&[&never, &within]);
    assert_eq!(cut, answer[..answer.find(&within).unwrap()], "of {answer}");
    assert!(cut.len() > 4 && !said.contains("[cut"), "{cut} {said}");
    assert_eq!(ask(&[&never]).0, answer);
    let (_, said) = ask(&["\\nUser:"]);
    assert!(said.contains("note: `\\n` in the stop string \\nUser: is a backslash"), "{said}");
    let mut command = place.nibble(&["generate", "--model", "model", "--stop-strings", ""]);
    command.args(prompt);
    let (code, text) = fail(command);
    assert!(code == 2 && text.contains("'--stop-strings <TEXT>': expected some text"), "{text}");
    // A token that is in no text.
    let path = place.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let special = json!({
        "id": ids(words[4])[0], "content": words[4], "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true,
    });
    tokenizer["added_tokens"].as_array_mut().unwrap().push(special);
    fs::write(path, tokenizer.to_string()).unwrap();
    assert!(!ask(&[]).0.contains(words[4]));
    let first = words.iter().position(|word| *word == words[4]).unwrap();
    assert_eq!(ask(&[words[4]]).0, words[..first].join(" "), "of {answer}");
}

/// Whoever reads stderr, a person or a file.
#[test]
fn an_answer_that_is_cut_is_told() {
    let place = Workplace::new();
    let flags = ["--raw", "--prompt", "w7 w31", "--max-new-tokens", "2"];
    let output = succeed(place.nibble(&[&["generate", "--model", "model"][..], &flags].concat()));
    assert!(stderr(&output).contains("[cut: --max-new-tokens 2 or"), "{}", stderr(&output));
}

#[test]
fn each_way_of_sampling_does_what_its_name_says() {
    let place = Workplace::new();
    let ask = |flags: &[&str]| {
        generate(&place, &[&["--raw", "--prompt", "w7 w31 w12"][..], flags].concat())
    };
    let greedy = ask(&[]);
    let hot = ["--temperature", "8", "--top-k", "0"];
    let drawn = ask(&hot);
    assert_ne!(drawn, greedy);
    assert_eq!(drawn, ask(&[&hot[..], &["--seed", "42"]].concat()));
    assert_ne!(drawn, ask(&[&hot[..], &["--seed", "43"]].concat()));
    for only_the_likeliest in [
        ["--temperature", "1e-4", "--top-k", "0"],
        ["--temperature", "8", "--top-k", "1"],
        ["--temperature", "8", "--top-p", "1e-6"],
        ["--temperature", "8", "--min-p", "1"],
    ] {
        assert_eq!(ask(&only_the_likeliest), greedy, "{only_the_likeliest:?}");
    }
    let mut command = place.nibble(&["generate", "--model", "model", "--raw", "--prompt", "w7"]);
    command.args(["--top-p", "0.9", "--seed", "1"]);
    let said = stderr(&succeed(command));
    assert!(
        said.contains("note: `--top-p`, `--seed` without effect: `--temperature` is 0"),
        "{said}"
    );
    let mut words = ids(&ask(&["--repetition-penalty", "100"]));
    words.extend([7, 31, 12]);
    let count = words.len();
    words.sort();
    words.dedup();
    assert_eq!(words.len(), count, "no word comes twice, nor one of the prompt");
}

#[test]
fn the_chat_template_is_applied_unless_the_prompt_is_raw() {
    let place = Workplace::new();
    let mut command = place.nibble(&["generate", "--model", "model"]);
    command.args(["--prompt", "w5"]);
    let (code, text) = fail(command);
    assert_eq!(code, 1);
    assert!(error_of(&text).contains("--raw"), "{text}");
    add_template(&place);
    let raw = |prompt: &str| generate(&place, &["--raw", "--prompt", prompt]);
    assert_eq!(generate(&place, &["--prompt", "w5 w6"]), raw("w92 w5 w6 w93"));
    assert_eq!(
        generate(&place, &["--prompt", "w5 w6", "--system", "w40"]),
        raw("w90 w40 w91 w92 w5 w6 w93")
    );
    assert_ne!(raw("w92 w5 w6 w93"), raw("w5 w6"));
}

#[test]
fn several_adapters_answer_one_after_the_other() {
    let place = Workplace::new();
    let (plain, other) = (adapter("llama_s0.plain"), adapter("llama_s0.rslora"));
    let prompt = ["--raw", "--prompt", "w7 w31 w12"];
    let ask = |flags: &[&str]| generate(&place, &[&prompt[..], flags].concat());
    let alone = [ask(&["--adapter", &plain]), ask(&["--adapter", &other])];
    assert_ne!(alone[0], alone[1]);
    assert_ne!(alone[0], ask(&[]));
    let named = format!("second={other}");
    let both = ask(&["--adapter", &plain, "--adapter", &named]);
    assert_eq!(both, format!("llama_s0.plain: {}\nsecond: {}", alone[0], alone[1]));
}

/// Text is written as it is made: it can be read long before the answer is complete.
#[test]
fn the_answer_streams() {
    let place = Workplace::new();
    let mut command =
        place.nibble(&["generate", "--model", "model", "--raw", "--prompt", "w7 w31"]);
    command.args(["--max-new-tokens", "40000", "--context-length", "50000"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert!(child.try_wait().unwrap().is_none(), "the answer came at once");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(first.starts_with(b"w"));
}

#[test]
fn the_prompt_may_come_from_standard_input() {
    use std::io::Write;
    let place = Workplace::new();
    let ask = ["generate", "--model", "model", "--quantization", "none", "--raw"];
    let mut command = place.nibble(&ask);
    command.args(["--max-new-tokens", "8"]).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"w7 w31\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), generate(&place, &["--raw", "--prompt", "w7 w31"]));
    let (code, text) = fail(place.nibble(&ask));
    assert_eq!(code, 2);
    assert!(error_of(&text).contains("hint: give `--prompt TEXT`"), "{text}");
}

#[test]
fn a_prompt_may_begin_with_a_dash() {
    let place = Workplace::new();
    add_template(&place);
    let spaced = ["--raw", "--prompt", "- w7 w31"];
    assert_eq!(generate(&place, &spaced), generate(&place, &["--raw", "--prompt=- w7 w31"]));
    for text in ["-5", "-w5", "--raw", "--", "--max_new_tokens"] {
        let apart = ["--prompt", text, "--system", text];
        let joined = [format!("--prompt={text}"), format!("--system={text}")];
        let joined = joined.each_ref().map(String::as_str);
        assert_eq!(generate(&place, &apart), generate(&place, &joined), "{text}");
    }
}

#[test]
fn an_adapters_folder_may_have_an_equals_sign() {
    let place = Workplace::new();
    let copied = |to: &str| {
        let from = std::path::PathBuf::from(adapter("llama_s0.plain"));
        fs::create_dir_all(place.path(to)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(from.join(file), place.path(to).join(file)).unwrap();
        }
    };
    ["od=d", "runs/lr=1e-4"].into_iter().for_each(copied);
    let prompt = ["--raw", "--prompt", "w7 w31 w12"];
    let ask = |flags: &[&str]| generate(&place, &[&prompt[..], flags].concat());
    let alone = ask(&["--adapter", &adapter("llama_s0.plain")]);
    for folder in ["od=d", "./od=d", "runs/lr=1e-4", "name=od=d"] {
        assert_eq!(ask(&["--adapter", folder]), alone, "{folder}");
    }
    let two = ask(&["--adapter", "od=d", "--adapter", "runs/lr=1e-4"]);
    assert_eq!(two, format!("od=d: {alone}\nlr=1e-4: {alone}"));
}

#[test]
fn adapters_without_a_name_of_their_own_are_refused() {
    let place = Workplace::new();
    for (adapters, message) in [
        (&["a="][..], "no folder stands behind the `=`, expected NAME=DIR"),
        (&["=a"], "no name stands before the `=`, expected NAME=DIR"),
        (
            &["a/run", "b/run"],
            "error: two adapters are called `run`: a/run and b/run\n\
             hint: name one of them: `--adapter NAME=b/run`",
        ),
    ] {
        for name in ["generate", "chat"] {
            let mut command = place.nibble(&[name, "--model", "model"]);
            command.args(adapters.iter().map(|adapter| format!("--adapter={adapter}")));
            let (code, text) = fail(command);
            assert_eq!(code, 2, "{text}");
            assert!(error_of(&text).contains(message), "{text}");
        }
    }
}

#[cfg(unix)]
#[test]
fn a_context_that_memory_cannot_hold_is_named() {
    let place = Workplace::new();
    let script = "ulimit -v 8000000; exec \"$0\" generate --model model --raw --prompt w5 \
                  --context-length 100000000";
    let mut command = std::process::Command::new("bash");
    command.current_dir(place.path("")).args(["-c", script, env!("CARGO_BIN_EXE_nibble")]);
    let (code, text) = fail(command);
    assert_eq!(code, 1);
    let error = error_of(&text);
    assert!(error.starts_with("error: cannot reserve "), "{error}");
    assert!(error.contains("\nhint: lower `--context-length`, which is 100000000"), "{error}");
}
