//! Records to ids and labels, with the real SmolLM2 tokenizer and chat template.
//!
//! `tests/data/tokenizer/smollm2.json`'s `chat` cases were made with transformers'
//! `apply_chat_template`; the formats' expectations follow from the tokens' texts.

use std::path::PathBuf;

use nibble::data::chat::Chat;
use nibble::data::template::ChatTemplate;
use nibble::data::{
    ChatTokenizer, DataOptions, Dataset, Document, Encoder, Format, TrainOn, Truncation, load,
};
use serde_json::{Map, Value, json};

use crate::smollm2::{VOCAB, options, tokenizer};

struct File(tempfile::TempDir);

impl File {
    fn new(text: impl AsRef<[u8]>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("data.jsonl"), text).unwrap();
        File(folder)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("data.jsonl")
    }

    fn load(&self, options: &DataOptions) -> nibble::Result<Dataset> {
        let tokenizer = tokenizer();
        let encoder = Encoder::new(tokenizer, VOCAB, options.train_on)?;
        load(&[self.path()], &encoder, options, |_, _| ())
    }
}

/// Texts of the trained and of the masked tokens.
fn trained(document: &Document) -> (String, String) {
    let tokenizer = tokenizer();
    let pick = |wanted: bool| {
        let pairs = document.input_ids.iter().zip(&document.labels);
        let ids: Vec<u32> =
            pairs.filter(|(_, label)| (**label >= 0) == wanted).map(|(id, _)| *id).collect();
        tokenizer.decode(&ids, false).unwrap()
    };
    for (id, label) in document.input_ids.iter().zip(&document.labels) {
        assert!(*label == -100 || *label == *id as i32, "labels are not shifted");
    }
    (pick(true), pick(false))
}

fn one(text: &str) -> Document {
    let dataset = File::new(text).load(&options()).unwrap();
    dataset.report.check(&["data.jsonl".into()], &options()).unwrap();
    assert_eq!(dataset.documents.len(), 1);
    dataset.documents[0].clone()
}

#[test]
fn chats_render_and_encode_as_in_transformers() {
    let tokenizer = tokenizer();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let template = tokenizer.compile_template().unwrap().unwrap();
    let cases = golden["chat"].as_array().unwrap();
    assert!(cases.len() >= 2);
    for case in cases {
        let messages = case["messages"].as_array().unwrap();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let text = template.render(messages, &Map::new(), prompt).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap(), ids);
    }
}

/// Phi-3's markers take the spaces behind them: an answer that begins with one does not begin with its
/// marker.
#[test]
fn a_marker_that_takes_spaces_is_not_trained() {
    let source =
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2/tokenizer.json");
    let mut tokens: Value = serde_json::from_slice(&std::fs::read(source).unwrap()).unwrap();
    let added = tokens["added_tokens"].as_array_mut().unwrap();
    let marker = added.iter_mut().find(|token| token["content"] == "<|im_start|>").unwrap();
    marker["rstrip"] = true.into();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokens.to_string()).unwrap();
    let template = "{% for m in messages %}{{ m.role }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant<|im_start|>{% endif %}";
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template}).to_string();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = ChatTokenizer::open(folder.path()).unwrap();
    let encoder = Encoder::new(&tokenizer, VOCAB, TrainOn::Assistant).unwrap();
    for (answer, expected) in [("Hello", "Hello<|im_end|>"), ("\n Hello", "Hello<|im_end|>")] {
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let record = json!({"messages": [said("user", "Hi"), said("assistant", answer)]});
        let file = File::new(record.to_string());
        let dataset = load(&[file.path()], &encoder, &options(), |_, _| ()).unwrap();
        assert_eq!(trained(&dataset.documents[0]).0, expected);
    }
}

#[test]
fn only_assistant_turns_are_trained_and_each_ends_in_eos() {
    let line = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
        "content": "Hello!"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content":
        "See you."}]}"#
        .replace('\n', " ");
    let (yes, no) = trained(&one(&line));
    assert_eq!(yes, "Hello!<|im_end|>See you.<|im_end|>");
    assert!(no.ends_with("user\nBye<|im_end|>\n<|im_start|>assistant\n\n"), "{no:?}");
    let last = DataOptions { train_on: TrainOn::Completion, ..options() };
    let dataset = File::new(&line).load(&last).unwrap();
    assert_eq!(trained(&dataset.documents[0]).0, "See you.<|im_end|>");
    let all = DataOptions { train_on: TrainOn::All, ..options() };
    let dataset = File::new(&line).load(&all).unwrap();
    assert!(dataset.documents[0].labels.iter().all(|&label| label >= 0));
}

#[test]
fn every_format_is_detected_and_masked() {
    let sharegpt = r#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}"#;
    assert_eq!(trained(&one(sharegpt)).0, "Hello!<|im_end|>");
    let prompt = r#"{"prompt": "2 + 2 =", "completion": " 4"}"#;
    assert_eq!(trained(&one(prompt)), (" 4<|im_end|>".into(), "2 + 2 =".into()));
    let alpaca = r#"{"instruction": "Add.", "input": "1 and 2", "output": "3"}"#;
    let (yes, no) = trained(&one(alpaca));
    assert_eq!(yes, "3<|im_end|>");
    assert!(no.ends_with("user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n\n"), "{no:?}");
    assert_eq!(trained(&one(r#"{"text": "Once."}"#)).0, "Once.<|im_end|>");
    let tokens = one(r#"{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}"#);
    assert_eq!((tokens.input_ids, tokens.labels), (vec![5, 6, 7], vec![-100, 6, 7]));
    let list = one(r#"  [{"text": "Once."}]"#);
    assert_eq!(trained(&list).0, "Once.<|im_end|>");
}

fn template(source: &str, eos_token: &str) -> ChatTemplate {
    ChatTemplate::new(source, Map::from_iter([("eos_token".to_string(), eos_token.into())]))
        .unwrap()
}

fn chat(messages: Value) -> Chat {
    Chat { messages: messages.as_array().unwrap().clone(), ..Chat::default() }
}

#[test]
fn generation_marks_say_what_is_trained() {
    let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}\
        {% generation %}{{ m.content }}{{ eos_token }}{%- endgeneration -%}{% else %}\
        {{ m.content }}{% endif %}{% endfor %}";
    let chat =
        chat(json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]));
    let rendered = template(source, "<e>").render_with_turns(&chat, &[]).unwrap();
    assert_eq!(rendered.text, "<user>a<assistant>b<e>");
    assert_eq!(rendered.turns.len(), 1);
    assert_eq!(&rendered.text[rendered.turns[0].range.clone()], "b<e>");
    assert_eq!(rendered.turns[0].message, Some(1));
}

#[test]
fn a_template_that_hides_who_said_what_is_refused() {
    let source =
        "{{ messages | length }}:{% for m in messages %}{{ m.content | upper }}{% endfor %}";
    let chat =
        chat(json!([{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]));
    let error = template(source, "").render_with_turns(&chat, &[]);
    // Marks are found where text before the turn depends on later ones.
    assert_eq!(error.unwrap().turns[0].range, 2..3);
    let source = "{{ messages | length }}:{% for m in messages %}{{ m.content | replace('b', m.content | length) }}{% endfor %}";
    let error = template(source, "").render_with_turns(&chat, &[]).unwrap_err().to_string();
    assert!(error.contains("turn 0 depends on later turns"), "{error}");
    assert!(error.contains("--train-on all"), "{error}");
}

/// gpt-oss and Command-R+ prompt once for a call, its result and the answer.
#[test]
fn what_a_tool_says_is_not_trained_as_the_assistants() {
    let source = |result: &str| {
        format!(
            "{{{{ messages | length }}}}{{% for m in messages %}}{{% if m.role == 'user' %}}<q>{{{{ m.content }}}}<a>\
             {{% elif m.role == 'tool' %}}{result}{{% elif m.tool_calls %}}<call>{{{{ m.tool_calls[0].name }}}}\
             {{% else %}}{{{{ m.content }}}}<e>{{% endif %}}{{% endfor %}}\
             {{% if add_generation_prompt %}}<a>{{% endif %}}"
        )
    };
    let call = |name: &str| json!({"role": "assistant", "tool_calls": [{"name": name}]});
    let ask = json!({"role": "user", "content": "?"});
    let result = json!({"role": "tool", "content": "line \"1\"\nline 2"});
    let answer = json!({"role": "assistant", "content": "42"});
    let ends = ["<e>".to_string(), "<stop>".to_string()];
    let chat = chat(json!([ask, call("f"), result, ask, answer]));
    for (written, held) in [
        ("{{ m.content }}", true),
        ("{{ m.content | tojson }}", true),
        ("<stop>{{ m.content }}", false),
    ] {
        let rendered = template(&source(written), "").render_with_turns(&chat, &ends);
        match rendered {
            Ok(rendered) => {
                let said = rendered.turns.iter().map(|turn| &rendered.text[turn.range.clone()]);
                assert!(!held && said.eq(["<call>f<stop>", "42<e>"]), "{written}: {rendered:?}");
            }
            Err(error) => {
                assert!(held && error.to_string().contains("depends on later turns"), "{error}");
            }
        }
    }
}

#[test]
fn long_documents_are_never_cut_silently() {
    let file = File::new(r#"{"input_ids": [1, 2, 3, 4, 5, 6, 7]}"#);
    let with = |truncation| DataOptions { truncation, max_length: 3, ..options() };
    let load = |truncation| {
        let dataset = file.load(&with(truncation)).unwrap();
        let ids: Vec<Vec<u32>> = dataset.documents.iter().map(|d| d.input_ids.clone()).collect();
        (ids, dataset)
    };
    let (_, dataset) = load(Truncation::Error);
    let error =
        dataset.report.check(&["f".into()], &with(Truncation::Error)).unwrap_err().to_string();
    assert!(
        error.contains(
            "data.jsonl:1: document is longer than 3 tokens (1 of 1 is, the longest has 7)"
        ),
        "{error}"
    );
    assert!(error.contains("raise `--max-length` to 7"), "{error}");
    assert_eq!(load(Truncation::Right).0, [[1, 2, 3]]);
    assert_eq!(load(Truncation::Left).0, [[5, 6, 7]]);
    assert_eq!(load(Truncation::Right).1.report.tokens_removed, 4);
    // The last piece has one token: nothing to predict.
    assert_eq!(load(Truncation::Split).0, [[1, 2, 3], [4, 5, 6]]);
    assert!(load(Truncation::Drop).0.is_empty());
}

#[test]
fn bad_records_are_named_by_file_and_line() {
    let rejected = |text: &[u8], expected: &str| {
        let error = File::new(text)
            .load(&options())
            .and_then(|dataset| dataset.report.check(&["data.jsonl".into()], &options()))
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}\nexpected: {expected}");
    };
    let good = "{\"text\": \"a\"}\n";
    rejected(
        format!("{good}\n{{\"text\": ").as_bytes(),
        "data.jsonl:3: not valid JSON at column 9: ",
    );
    rejected(format!("{good}{{\"txt\": 1}}\n").as_bytes(), ":2: record has no field `text`");
    rejected(format!("{good}{{\"text\": 1}}\n").as_bytes(), ":2: field `text` is a number");
    rejected(
        b"{\"text\": \"\xff\"}\n{\"text\": \"a\"}\n",
        "data.jsonl:1: record is not UTF-8 at byte 11",
    );
    rejected(b"", "has no records");
    rejected(b"\n\n", "has no records");
    rejected(b"[1, 2", "the JSON list is not closed");
    rejected(b"{\"foo\": 1}", "cannot tell the format of a record with the fields [\"foo\"]");
    rejected(b"{\"messages\": []}", "no record has a token to train on");
    rejected(b"{\"messages\": [{\"content\": \"a\"}]}", "messages[0].role is missing");
    rejected(b"{\"input_ids\": [1, 49152]}", "token id 49152 is outside the vocabulary of 49152");
    let digits = "1".repeat(40);
    rejected(
        format!("{good}{{\"text\": \"a\", \"id\": {digits}}}").as_bytes(),
        ":2: an integer of 40 digits is longer than 128 bits\nhint: write it as text",
    );
    rejected(b"{\"text\": 18446744073709551616}", ":1: field `text` is a number, expected text");
    rejected(b"{\"input_ids\": [1, 2], \"labels\": [1]}", "1 label for 2 input_ids");
    rejected(
        b"{\"input_ids\": [1, 2], \"labels\": [1, -100]}",
        "no record has a token to train on",
    );
    let other = b"{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}";
    rejected(other, "pass `--format prompt` if the whole file has");
}

/// Rows of real data sets with nothing in them, or nothing after the prompt.
#[test]
fn empty_records_are_left_out() {
    for text in [
        r#"{"text": "a b"} {"text": ""} {"text": null}"#,
        r#"{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": ""}
           {"prompt": "a", "completion": null}"#,
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
           {"messages": []} {"messages": null}"#,
        r#"{"system": "s", "messages": [{"role": "user", "content": "a"},
                                        {"role": "assistant", "content": "b"}]}
           {"system": "s", "messages": []} {"system": "s", "messages": null}"#,
        r#"{"input_ids": [1, 2]} {"input_ids": []} {"input_ids": [3]}"#,
    ] {
        let lines = text.replace("},\n", "}, ").replace("} {", "}\n{");
        let report = File::new(lines.as_bytes()).load(&options()).unwrap().report;
        assert_eq!((report.records, report.documents), (3, 1), "{text}");
        assert_eq!((report.without_targets, report.rejected.len()), (vec![2, 3], 0), "{text}");
        assert!(report.duplicates.is_empty(), "{text}");
    }
}

/// Python writes them, and JSON has no such numbers.
#[test]
fn numbers_that_are_none_are_null() {
    let text =
        br#"{"text": "NaN \"Infinity\" -1", "score": NaN, "low": -Infinity, "high": Infinity}
                   {"text": "b", "score": Nothing}"#;
    let report = File::new(text).load(&options()).unwrap().report;
    assert_eq!((report.documents, report.rejected.len()), (1, 1));
    assert!(report.rejected[0].rejection.reason.starts_with("not valid JSON at column "));
    assert!(report.unused_fields.is_empty(), "null is nothing: {:?}", report.unused_fields);
}

#[test]
fn fields_without_a_use_are_told() {
    let text = br#"{"instruction": "a", "output": "b", "context": "c", "id": 7, "input": ""}
                   {"instruction": "a", "output": "d", "context": "", "note": null, "source": "web"}"#;
    let unused = |rename_columns: &[(&str, &str)]| {
        let pairs = rename_columns.iter().map(|(old, new)| (old.to_string(), new.to_string()));
        let options = DataOptions { rename_columns: pairs.collect(), ..options() };
        File::new(text).load(&options).unwrap().report.unused_fields
    };
    assert_eq!(unused(&[]), ["context", "id", "source"]);
    assert_eq!(unused(&[("context", "input"), ("id", "unused")]), ["source"]);
}

#[test]
fn repeated_records_and_formats_are_reported() {
    let text = "{\"text\": \"a b c\"}\n{\"text\": \"d e f\"}\n{\"text\": \"a b c\"}\n";
    let dataset = File::new(text).load(&options()).unwrap();
    assert_eq!(dataset.report.duplicates, [3]);
    assert_eq!((dataset.report.records, dataset.report.format), (3, Some(Format::Text)));
    assert_eq!(dataset.documents.iter().map(|d| d.line).collect::<Vec<_>>(), [1, 2, 3]);
}

/// A mixture: each file is what its own first record is.
#[test]
fn files_may_have_formats_of_their_own() {
    let text = File::new("{\"text\": \"a\"}\n");
    let folder = text.path().parent().unwrap().to_path_buf();
    let pairs = "{\"prompt\": \"b\", \"completion\": \"c\"}\n{\"text\": \"d\"}\n";
    std::fs::write(folder.join("more.jsonl"), pairs).unwrap();
    let encoder = Encoder::new(tokenizer(), VOCAB, TrainOn::Assistant).unwrap();
    let report =
        load(std::slice::from_ref(&folder), &encoder, &options(), |_, _| ()).unwrap().report;
    assert_eq!((report.documents, report.formats()), (2, "text, prompt".to_string()));
    // Within a file it is a mistake.
    let [bad] = &report.rejected[..] else { panic!("{:?}", report.rejected) };
    assert!(bad.rejection.reason.contains("no field `prompt`"), "{bad:?}");
    let options = DataOptions { format: Some(Format::Text), ..options() };
    let report = load(std::slice::from_ref(&folder), &encoder, &options, |_, _| ()).unwrap().report;
    assert_eq!((report.documents, report.rejected.len()), (2, 1));
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let tokenizer = tokenizer();
    let error = Encoder::new(tokenizer, 32000, TrainOn::Assistant).err().unwrap().to_string();
    assert!(error.contains("49152 ids, the model 32000 rows"), "{error}");
}
