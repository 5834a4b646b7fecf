//! A chat template that the model does not bring: chosen by a flag, kept with the adapter.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::scene::{adapter, chat, generate, stdout};
use crate::training::{Workplace, error_of, fail, stderr, succeed};

/// A question between w92 and w93, an answer before w94.
const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'user' %}w92 {{ m.content }} w93 \
                        {% else %}{{ m.content }} w94 {% endif %}{% endfor %}";

/// A model without a template, a template, and conversations. w94 is an added token.
fn place() -> Workplace {
    let place = Workplace::new();
    fs::write(place.path("turns.jinja"), TEMPLATE).unwrap();
    let mut tokenizer = place.json("model/tokenizer.json");
    tokenizer["added_tokens"] = json!([{"id": 94, "content": "w94", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]);
    fs::write(place.path("model/tokenizer.json"), tokenizer.to_string()).unwrap();
    let record = |index: u64| {
        let words = |first: u64| format!("w{} w{} w{}", first, first + 1, first + 2);
        let said = |role: &str, content: String| json!({"role": role, "content": content});
        let (question, answer) = (words(3 + index), words(50 + index));
        json!({"messages": [said("user", question), said("assistant", answer)]}).to_string()
    };
    let records: Vec<String> = (0..12).map(record).collect();
    fs::write(place.path("chat.jsonl"), records.join("\n")).unwrap();
    place
}

fn train(place: &Workplace, out: &str, flags: &[&str]) -> std::process::Command {
    let mut command = place.nibble(&["train", "--model", "model", "--data", "chat.jsonl"]);
    command.args(["--out", out, "--max-length", "32", "--save-steps", "2"]);
    command.args(["--save-total-limit", "9"]);
    command.args(["--learning-rate", "1e-2"]).args(flags);
    command
}

/// `nibble chat` answers with at most six.
fn six_words(answer: &str) -> String {
    answer.split(' ').take(6).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_file_is_used_in_place_of_what_the_model_brings() {
    let place = place();
    let raw = generate(&place, &["--raw", "--prompt", "w92 w5 w6 w93"]);
    let flags = ["--prompt", "w5 w6", "--chat-template", "turns.jinja"];
    assert_eq!(generate(&place, &flags), raw);
    let (answers, _) = chat(&place, &["--chat-template", "turns.jinja"], &["w5 w6"]);
    assert_eq!(answers, [six_words(&raw)]);
    // As Windows' editors save it.
    fs::write(
        place.path("windows.jinja"),
        format!("\u{feff}{{%- if 1 -%}}\r\n{TEMPLATE}{{%- endif -%}}"),
    )
    .unwrap();
    assert_eq!(generate(&place, &["--prompt", "w5 w6", "--chat-template", "windows.jinja"]), raw);
    let path = place.path("model/tokenizer_config.json");
    let config = json!({"eos_token": "w2", "bos_token": "w1", "chat_template": "w7"});
    fs::write(path, config.to_string()).unwrap();
    assert_eq!(generate(&place, &flags), raw);
}

#[test]
fn a_template_may_be_given_variables() {
    let place = place();
    let template = TEMPLATE.replace("w93 ", "w93 {% if think %}w50 {% endif %}");
    fs::write(place.path("thinks.jinja"), template).unwrap();
    let flags = ["--prompt", "w5 w6", "--chat-template", "thinks.jinja"];
    let said = |think: bool| {
        let kwargs = json!({ "think": think }).to_string();
        generate(&place, &[&flags[..], &["--chat-template-kwargs", &kwargs]].concat())
    };
    let raw = |prompt: &str| generate(&place, &["--raw", "--prompt", prompt]);
    assert_eq!(said(true), raw("w92 w5 w6 w93 w50"));
    assert_eq!(said(false), raw("w92 w5 w6 w93"));
    assert_ne!(said(true), said(false));
    let chats = ["--chat-template", "thinks.jinja", "--chat-template-kwargs", r#"{"think": true}"#];
    let (answers, _) = chat(&place, &chats, &["w5 w6"]);
    assert_eq!(answers, [six_words(&said(true))]);
    let plain = ["generate", "--model", "model", "--prompt", "w5", "--chat-template-kwargs"];
    let (code, text) = fail(place.nibble(&[&plain[..], &["{\"think\": 1}"]].concat()));
    assert!(code == 2 && text.contains("the tokenizer has no chat template\nhint: "), "{text}");
}

#[test]
fn what_cannot_be_a_template_is_refused() {
    let place = place();
    let refused = |name: &str| {
        let flags = ["generate", "--model", "model", "--prompt", "w5", "--chat-template", name];
        let (code, text) = fail(place.nibble(&flags));
        (code, error_of(&text).to_string())
    };
    let (code, text) = refused("chat-ml");
    assert!(code == 2 && text.contains("did you mean `chatml`?"), "{text}");
    let (code, text) = refused("missing.jinja");
    assert!(code == 2 && text.contains("alpaca, chatml, gemma, llama-3, zephyr"), "{text}");
    let (code, text) = refused("chatml");
    assert!(code == 1 && text.contains("no token <|im_start|>"), "{text}");
    fs::write(place.path("broken.jinja"), "{% for %}").unwrap();
    let (code, text) = refused("broken.jinja");
    assert!(code == 1 && text.contains("broken.jinja"), "{text}");
}

/// A known template that needs no tokens of its own, and the data as it writes them.
#[test]
fn a_known_template_writes_the_turns() {
    let place = place();
    let base = ["data", "--model", "model", "--data", "chat.jsonl"];
    let (code, text) = fail(place.nibble(&base));
    assert!(code == 1 && text.contains("--chat-template"), "{text}");
    let output = succeed(place.nibble(&[&base[..], &["--chat-template", "zephyr"]].concat()));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ok    every answer ends in a trained end-of-sequence token"), "{text}");
}

/// The model's own template ends answers with another token than its tokenizer names: merged, it says so.
#[test]
fn a_merged_model_ends_where_it_was_trained_to() {
    let place = place();
    fs::rename(place.path("turns.jinja"), place.path("model/chat_template.jinja")).unwrap();
    succeed(train(&place, "out", &["--max-steps", "2"]));
    let merge = ["merge", "--model", "model", "--adapter", "out", "--out", "merged"];
    succeed(place.nibble(&[&merge[..], &["--quantization", "none"]].concat()));
    let generation: Value = place.json("merged/generation_config.json");
    assert_eq!(generation["eos_token_id"], json!([2, 94]));
    // What is named already stays as it is written.
    fs::write(place.path("model/generation_config.json"), "{\"eos_token_id\": [94, 2]}").unwrap();
    let again = ["merge", "--model", "model", "--adapter", "out", "--out", "again"];
    succeed(place.nibble(&[&again[..], &["--quantization", "none"]].concat()));
    assert_eq!(place.read("again/generation_config.json"), b"{\"eos_token_id\": [94, 2]}");
}

#[test]
fn an_adapter_keeps_the_template_that_it_was_trained_with() {
    let place = place();
    let (code, text) = fail(train(&place, "out", &["--max-steps", "4"]));
    assert!(code == 1 && text.contains("--chat-template"), "{text}");
    let steps = ["--max-steps", "4", "--lr-scheduler-type", "constant"];
    let warm_up = ["--warmup-steps", "0"];
    let flags = [&steps[..], &warm_up, &["--chat-template", "turns.jinja"]].concat();
    succeed(train(&place, "out", &flags));
    for folder in ["out", "out/checkpoint-2", "out/checkpoint-4"] {
        assert_eq!(place.read(&format!("{folder}/chat_template.jinja")), TEMPLATE.as_bytes());
    }
    let settings = String::from_utf8(place.read("out/settings.toml")).unwrap();
    assert!(settings.contains("chat_template = \"turns.jinja\"\n"), "{settings}");

    // Without the file: the adapter has it.
    let ask = |flags: &[&str]| generate(&place, &[&["--prompt", "w5 w6 w7"], flags].concat());
    let with_flag = ask(&["--adapter", "out", "--chat-template", "turns.jinja"]);
    succeed(train(&place, "out", &["--resume", "--max-steps", "6"]));
    fs::rename(place.path("turns.jinja"), place.path("elsewhere.jinja")).unwrap();
    let said = stderr(&succeed(train(&place, "out", &["--resume", "--max-steps", "8"])));
    assert!(said.contains("chat template turns.jinja is gone; the run has a copy"), "{said}");
    let its_own = ["--chat-template", "out/checkpoint-4/chat_template.jinja"];
    succeed(train(&place, "out", &[&["--resume", "--max-steps", "10"], &its_own[..]].concat()));
    assert_eq!(ask(&["--adapter", "out/checkpoint-4"]), with_flag);
    // What was trained ends with w94, where generation stops.
    assert!(!with_flag.is_empty() && !with_flag.contains("w94"), "{with_flag}");

    // A run that starts from it speaks as it does, and so does the model that it is merged into.
    succeed(train(&place, "next", &["--init-adapter", "out", "--max-steps", "4"]));
    assert_eq!(place.read("next/chat_template.jinja"), TEMPLATE.as_bytes());
    let merge = ["merge", "--model", "model", "--adapter", "out/checkpoint-4", "--out", "merged"];
    succeed(place.nibble(&[&merge[..], &["--quantization", "none"]].concat()));
    assert_eq!(place.read("merged/chat_template.jinja"), TEMPLATE.as_bytes());
    let generation: Value = place.json("merged/generation_config.json");
    assert_eq!(generation["eos_token_id"], json!([2, 94]));
    assert_eq!(
        ask(&["--model", "merged"]),
        ask(&["--model", "model", "--adapter", "out/checkpoint-4"])
    );

    // In a conversation, adapters speak each with its own.
    let other = adapter("llama_s0.plain");
    fs::create_dir(place.path("other")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(format!("{other}/{file}"), place.path("other").join(file)).unwrap();
    }
    fs::write(place.path("other/chat_template.jinja"), "w9 {{ messages[-1].content }}").unwrap();
    let (answers, said) =
        chat(&place, &["--adapter", "out", "--adapter", "other"], &["w5", "/adapter other", "w5"]);
    let alone =
        ["out", "other"].map(|name| generate(&place, &["--adapter", name, "--prompt", "w5"]));
    assert_eq!(answers, alone.each_ref().map(|answer| six_words(answer)), "{said}");
    let both = ["--adapter", "out", "--adapter", "other", "--prompt", "w5"];
    let [first, second] = alone;
    assert_eq!(generate(&place, &both), format!("out: {first}\nother: {second}"));
}

/// What a conversation begins with is for the template to say; text begins as the tokenizer wants.
#[test]
fn a_conversation_has_no_beginning_of_its_own() {
    let place = place();
    let path = place.path("model/tokenizer_config.json");
    let config = json!({"eos_token": "w2", "bos_token": "w1", "add_bos_token": true});
    fs::write(path, config.to_string()).unwrap();
    let question = ["--prompt", "w5", "--chat-template", "turns.jinja"];
    let written = generate(&place, &["--raw", "--prompt", "w1 w92 w5 w93"]);
    assert_eq!(generate(&place, &["--raw", "--prompt", "w92 w5 w93"]), written);
    assert_ne!(generate(&place, &question), written);
    fs::write(place.path("turns.jinja"), format!("{{{{ bos_token }}}} {TEMPLATE}")).unwrap();
    assert_eq!(generate(&place, &question), written);
}

/// As TRL and Unsloth save one: with its tokenizer beside it. Here w5 and w6 have changed places.
#[test]
fn an_adapter_speaks_with_the_tokenizer_that_it_brings() {
    let place = place();
    let other = adapter("llama_s0.plain");
    let take = |from: &Path, name: &str| {
        fs::create_dir(place.path(name)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(from.join(file), place.path(name).join(file)).unwrap();
        }
    };
    take(Path::new(&other), "own");
    let swapped = |text: &str| {
        let swap = |word: &str| match word {
            "w5" => "w6".to_string(),
            "w6" => "w5".to_string(),
            other => other.to_string(),
        };
        text.split(' ').map(swap).collect::<Vec<_>>().join(" ")
    };
    let mut tokenizer = place.json("model/tokenizer.json");
    let vocabulary = &mut tokenizer["model"]["vocab"];
    (vocabulary["w5"], vocabulary["w6"]) = (6.into(), 5.into());
    fs::write(place.path("own/tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"eos_token": "w2", "bos_token": "w1", "chat_template": TEMPLATE});
    fs::write(place.path("own/tokenizer_config.json"), config.to_string()).unwrap();
    let expected = generate(&place, &["--adapter", &other, "--raw", "--prompt", "w92 w6 w93"]);
    let got = generate(&place, &["--adapter", "own", "--prompt", "w5"]);
    assert_eq!(got, swapped(&expected));
    // `data` shows what a run that starts from it would write.
    fs::create_dir(place.path("whole")).unwrap();
    for (from, file) in
        [("model", "config.json"), ("own", "tokenizer.json"), ("own", "tokenizer_config.json")]
    {
        fs::copy(place.path(from).join(file), place.path("whole").join(file)).unwrap();
    }
    let turns = json!({"messages": [
        {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6 w7"}
    ]});
    fs::write(place.path("talk.jsonl"), turns.to_string()).unwrap();
    let data = |flags: &[&str]| {
        let base = ["data", "--data", "talk.jsonl", "--show", "1"];
        stdout(&succeed(place.nibble(&[&base[..], flags].concat())))
    };
    let shown = data(&["--model", "model", "--adapter", "own"]);
    assert_eq!(shown, data(&["--model", "whole"]));
    assert!(shown.contains("w6"), "{shown}");
    let missing = ["data", "--model", "model", "--adapter", "nope", "--data", "talk.jsonl"];
    let (code, error) = fail(place.nibble(&missing));
    assert!(code == 1 && error.contains("nope"), "{code}: {error}");
    // A run that starts from it keeps all of that, whatever becomes of the first folder.
    succeed(train(&place, "next", &["--init-adapter", "own", "--max-steps", "2"]));
    for folder in ["next", "next/checkpoint-2"] {
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            assert_eq!(place.read(&format!("{folder}/{file}")), place.read(&format!("own/{file}")));
        }
    }
    let answer = generate(&place, &["--adapter", "next", "--prompt", "w5"]);
    take(&place.path("next"), "bare");
    let raw = ["--adapter", "bare", "--raw", "--prompt", "w92 w6 w93"];
    // Where the template ends a turn, its answer stops, and the raw text need not.
    let raw = swapped(&generate(&place, &raw));
    assert!(!answer.is_empty() && raw.starts_with(&answer), "{answer} of {raw}");
    // And the base again with its own.
    let (answers, _) = chat(
        &place,
        &["--adapter", "own", "--chat-template", "turns.jinja"],
        &["w5", "/base", "/reset", "w5"],
    );
    let base = generate(&place, &["--chat-template", "turns.jinja", "--prompt", "w5"]);
    assert_eq!(answers, [six_words(&got), six_words(&base)]);
}

/// Two templates, one of them for conversations with tools, stay two.
#[test]
fn templates_for_tools_are_kept_with_those_for_talk() {
    let place = place();
    let start = ["--chat-template", "turns.jinja", "--max-steps", "4"];
    succeed(train(&place, "start", &start));
    fs::remove_file(place.path("start/chat_template.jinja")).unwrap();
    let both = json!([{"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "w9 {{ messages[0].content }}"}]);
    let config = json!({"chat_template": both}).to_string();
    fs::write(place.path("start/tokenizer_config.json"), &config).unwrap();
    succeed(train(&place, "next", &["--init-adapter", "start", "--max-steps", "4"]));
    for folder in ["next", "next/checkpoint-2"] {
        assert_eq!(place.json(&format!("{folder}/tokenizer_config.json"))["chat_template"], both);
    }
    let merge = ["merge", "--model", "model", "--adapter", "next", "--out", "merged"];
    succeed(place.nibble(&[&merge[..], &["--quantization", "none"]].concat()));
    assert_eq!(place.json("merged/tokenizer_config.json")["chat_template"], both);
    assert_eq!(place.json("merged/tokenizer_config.json")["eos_token"], "w2");
    succeed(place.nibble(&[&merge[..], &["--quantization", "none", "--overwrite"]].concat()));
}
