//! Chat templates of well-known models against transformers.
//!
//! `tests/data/chat/*.json` were made by `scripts/golden/gen_chat.py`: the texts by transformers' own
//! template engine, the turns by TRL's training variants of the same templates.

use std::ops::Range;
use std::path::{Path, PathBuf};

use nibble::data::chat::Chat;
use nibble::data::template::ChatTemplate;
use nibble::data::{ChatTokenizer, TemplateChoice};
use serde_json::{Map, Value, json};

/// 2024-07-26 09:05:03 UTC, when the generator's clock stands.
const CLOCK: u64 = 1_721_984_703;
/// End-of-turn tokens of all the templates.
const ENDS: [&str; 7] = [
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<｜end▁of▁sentence｜>",
];

struct Golden {
    name: String,
    template: ChatTemplate,
    cases: Vec<Value>,
}

/// More files of the generator can be given in a folder, to look at templates that are not in the
/// repository.
fn folder() -> PathBuf {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/chat");
    std::env::var_os("NIBBLE_CHAT_GOLDEN").map_or(own.into(), PathBuf::from)
}

fn read(path: &Path) -> Golden {
    let name = path.file_stem().unwrap().to_str().unwrap().to_string();
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokens: Map<String, Value> = ["bos_token", "eos_token"]
        .into_iter()
        .map(|key| (key.to_string(), golden[key].clone()))
        .collect();
    let template = ChatTemplate::at(CLOCK, golden["template"].as_str().unwrap(), tokens);
    let template = template.unwrap_or_else(|e| panic!("{name}: {e}"));
    Golden { name, template, cases: golden["cases"].as_array().unwrap().clone() }
}

fn all() -> impl Iterator<Item = Golden> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    assert!(!paths.is_empty());
    paths.into_iter().map(|path| read(&path))
}

fn chat(case: &Value) -> Chat {
    let mut variables = Map::new();
    if !case["tools"].is_null() {
        variables.insert("tools".into(), case["tools"].clone());
    }
    let messages = case["messages"].as_array().unwrap().clone();
    Chat { messages, variables, prompt_messages: 0 }
}

/// Ranges of characters as ranges of bytes.
fn bytes(text: &str, ranges: &Value) -> Vec<Range<usize>> {
    let mut at: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    at.push(text.len());
    let ranges: Vec<(usize, usize)> = serde_json::from_value(ranges.clone()).unwrap();
    ranges.into_iter().map(|(begin, end)| at[begin]..at[end]).collect()
}

/// Complaints of Python about its types, not of the template: minijinja is milder.
fn is_pythons(error: &Value) -> bool {
    let error = error.as_str().unwrap();
    ["is not iterable", "is not JSON serializable"].iter().any(|part| error.contains(part))
}

#[test]
fn every_conversation_renders_as_in_transformers() {
    let (mut rendered, mut wrong) = (0, Vec::new());
    for golden in all() {
        for case in &golden.cases {
            let chat = chat(case);
            for (key, prompt) in [("text", false), ("prompt", true)] {
                let got = golden.template.render(&chat.messages, &chat.variables, prompt);
                let place = format!("{}: {} {key}", golden.name, case["name"]);
                match (case[key].as_str(), got) {
                    (Some(text), Ok(got)) if text == got => rendered += 1,
                    (Some(text), Ok(got)) => wrong.push(format!("{place}\n{text:?}\n{got:?}")),
                    (Some(_), Err(e)) => wrong.push(format!("{place}: {e}")),
                    (None, Ok(_)) if case["text"].is_null() && !is_pythons(&case["error"]) => {
                        wrong.push(format!("{place}: accepted, expected {}", case["error"]));
                    }
                    (None, _) => {}
                }
            }
        }
    }
    println!("{rendered} texts");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n\n"));
}

/// What the template adds behind a question for the model to answer.
fn header(template: &ChatTemplate, chat: &Chat) -> String {
    let question = chat.messages.iter().position(|message| message["role"] == "user").unwrap();
    let render = |prompt| {
        template.render(&chat.messages[..=question], &chat.variables, prompt).unwrap_or_default()
    };
    render(true).strip_prefix(&render(false)).unwrap_or_default().to_string()
}

/// Phi-3 has two ends, of which TRL makes a turn of its own.
fn without_end(said: &str) -> &str {
    let mut said = said.trim_end();
    while let Some(rest) = ENDS.iter().find_map(|end| said.strip_suffix(end)) {
        said = rest.trim_end();
    }
    said
}

/// TRL also trains, here and there, (the rest of) the generation prompt before a turn and white space
/// behind it: things that a model is not asked to write.
#[test]
fn assistant_turns_are_where_trl_has_them() {
    let ends = ENDS.map(str::to_string);
    let (mut compared, mut wrong) = (0, Vec::new());
    for golden in all() {
        for case in golden.cases.iter().filter(|case| case["text"].is_string()) {
            let place = format!("{}: {}", golden.name, case["name"]);
            let rendered = match golden.template.render_with_turns(&chat(case), &ends) {
                Ok(rendered) => rendered,
                Err(e) => {
                    wrong.push(format!("{place}: {e}"));
                    continue;
                }
            };
            assert_eq!(rendered.text, case["text"].as_str().unwrap(), "{place}");
            if case["turns"].is_null() {
                continue;
            }
            let turns = rendered.turns.iter().map(|turn| turn.range.clone()).collect();
            let expected = bytes(&rendered.text, &case["turns"]);
            let text = &rendered.text;
            let header = header(&golden.template, &chat(case));
            let said = |ranges: Vec<Range<usize>>| -> Vec<&str> {
                let all = ranges.into_iter().map(|range| without_end(&text[range]));
                all.filter(|said| !said.is_empty()).collect()
            };
            let (got, expected) = (said(turns), said(expected));
            compared += 1;
            let same = |(got, expected): (&&str, &&str)| {
                expected.strip_suffix(*got).is_some_and(|prompt| header.ends_with(prompt))
            };
            if got.len() != expected.len() || !got.iter().zip(&expected).all(same) {
                wrong.push(format!("{place}\n trl {expected:?}\n got {got:?}"));
            }
        }
    }
    println!("{compared} conversations");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n\n"));
}

/// A tokenizer of a word, `bos`, an end of sequence and `added`.
fn tokenizer(template: &str, bos: Option<&str>, added: &[&str]) -> ChatTokenizer {
    let special = |(id, text): (usize, &&str)| {
        json!({"id": id + 1, "content": text, "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false})
    };
    let all: Vec<&str> =
        [bos.unwrap_or("<unused>"), "</s>"].into_iter().chain(added.to_vec()).collect();
    let added: Vec<Value> = all.iter().enumerate().map(special).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"word": 0}, "unk_token": "word"}
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let config = json!({"bos_token": bos, "eos_token": "</s>", "add_bos_token": bos.is_some()});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    assert!(ChatTokenizer::open(folder.path()).unwrap().compile_template().unwrap().is_none());
    let chosen = TemplateChoice { template: Some(template.into()), ..TemplateChoice::default() };
    ChatTokenizer::open_for(folder.path(), &chosen, None).unwrap()
}

/// Those that `--chat-template` knows by name write what the published ones do, of text.
#[test]
fn known_templates_write_what_the_published_ones_do() {
    let roles = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"];
    let turns = ["<start_of_turn>", "<end_of_turn>"];
    for (name, published, bos, added) in [
        ("chatml", "chatml", None, &["<|im_start|>", "<|im_end|>"][..]),
        ("zephyr", "zephyr", None, &[]),
        ("llama-3", "llama3", Some("<s>"), &roles),
        ("gemma", "gemma3", Some("<s>"), &turns),
    ] {
        let tokenizer = tokenizer(name, bos, added);
        let known = tokenizer.compile_template().unwrap().unwrap();
        let golden = read(&folder().join(format!("{published}.json")));
        let (mut alike, none) = (0, Map::new());
        for case in golden.cases.iter().filter(|case| case["tools"].is_null()) {
            let messages = case["messages"].as_array().unwrap();
            let is_plain = |message: &Value| {
                let plain = ["system", "user", "assistant"].map(Value::from);
                message["content"].is_string() && plain.contains(&message["role"])
            };
            if !messages.iter().all(is_plain) || !case["text"].is_string() {
                continue;
            }
            for (key, prompt) in [("text", false), ("prompt", true)] {
                let Some(expected) = case[key].as_str() else { continue };
                assert_eq!(known.render(messages, &none, prompt).unwrap(), expected, "{name}");
                alike += 1;
            }
        }
        assert!(alike >= 6, "{name}: {alike}");
        let tools = Map::from_iter([("tools".to_string(), json!([{"name": "add"}]))]);
        let question = json!({"role": "user", "content": "1 + 1?"});
        let call = json!({"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]});
        for (messages, variables) in
            [(vec![question.clone()], &tools), (vec![question, call], &none)]
        {
            let refused = known.render(&messages, variables, true).unwrap_err().to_string();
            assert!(refused.contains("no place for tools"), "{refused}");
        }
    }
}

/// Stanford's text of an instruction without an input, which `alpaca` records have without a template, too.
#[test]
fn alpaca_is_the_text_of_its_authors() {
    let tokenizer = tokenizer("alpaca", Some("<s>"), &[]);
    let template = tokenizer.compile_template().unwrap().unwrap();
    let said = |role: &str, content: &str| json!({"role": role, "content": content});
    let turns = [said("user", "Count."), said("assistant", "One."), said("user", "On.")];
    let text = "<s>Below is an instruction that describes a task. Write a response that \
                appropriately completes the request.\n\n### Instruction:\nCount.\n\n\
                ### Response:\nOne.</s>\n\n### Instruction:\nOn.\n\n### Response:\n";
    assert_eq!(template.render(&turns, &Map::new(), true).unwrap(), text);
    let turns = [said("system", "Be brief."), said("user", "Count."), said("assistant", "One.")];
    let text = "<s>Be brief.\n\n### Instruction:\nCount.\n\n### Response:\nOne.</s>";
    assert_eq!(template.render(&turns, &Map::new(), false).unwrap(), text);
}
