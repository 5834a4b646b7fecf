//! `nibble data` as a user runs it: counts, bad lines and the visible loss mask.

use std::io::Write;
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use crate::training::nibble;

const LINES: &str = "\
{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello!\"}]}
{\"messages\": [{\"role\": \"user\", \"content\": \"Nobody answers\"}]}
not json
{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello!\"}]}
";

/// A folder with a model, and a data file `name` that holds `text`.
fn scene(name: &str, text: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2");
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let config = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_position_embeddings": 3000}"#;
    std::fs::write(model.join("config.json"), config).unwrap();
    let path = folder.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
    folder
}

/// What `nibble data` makes of a file.
fn look(name: &str, text: &str, arguments: &[&str]) -> Output {
    let folder = scene(name, text);
    data(&folder, name, arguments)
}

fn data(folder: &TempDir, name: &str, arguments: &[&str]) -> Output {
    let mut command = nibble(folder.path(), &["data", "--model", "model", "--data", name]);
    command.args(arguments).output().unwrap()
}

/// The report on a file that can be trained on.
fn report(text: &str, arguments: &[&str]) -> String {
    let output = look("chat.jsonl", text, arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The report on a file that cannot, and what stands on stderr.
fn refused(text: &str, arguments: &[&str]) -> (String, String) {
    let output = look("chat.jsonl", text, arguments);
    let [report, error] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(output.status.code(), Some(1), "{report}{error}");
    (report, error)
}

/// The report on [`LINES`], which have a bad one.
fn run(arguments: &[&str]) -> String {
    refused(LINES, arguments).0
}

/// They are listed as before; what has nothing else cannot be trained all the same.
#[test]
fn bad_records_may_be_left_out() {
    let skip = ["--bad-records", "skip"];
    let text = report(LINES, &skip);
    assert!(text.contains("bad   records that cannot be used, left out: 1\n"), "{text}");
    assert!(text.contains("      chat.jsonl:3: not valid JSON"), "{text}");
    assert!(text.contains("documents   2\n") && !text.contains("training would stop"), "{text}");
    let (_, error) = refused("{\"messages\": [{}]}\n{\"messages\": 5}\n", &skip);
    assert!(error.contains("chat.jsonl cannot be trained on as it is"), "{error}");
    let (_, error) = refused(LINES, &[]);
    assert!(error.contains("or leave them out by `--bad-records skip`"), "{error}");
}

/// Files that are named, those of a folder, or those that a pattern fits, are one data set; places are those of
/// the files.
#[test]
fn several_files_are_one_data_set() {
    let lines: Vec<&str> = LINES.lines().collect();
    let folder = scene("parts/b.jsonl", &lines[2..].join("\n"));
    std::fs::write(folder.path().join("parts/a.jsonl"), lines[..2].join("\n")).unwrap();
    std::fs::write(folder.path().join("parts/README.md"), "no data").unwrap();
    let look = |name: &str, arguments: &[&str]| {
        let output = data(&folder, name, arguments);
        let text = |bytes| String::from_utf8(bytes).unwrap().replace(r"\\", "/").replace('\\', "/");
        [output.stdout, output.stderr].map(text)
    };
    let both = "parts/a.jsonl, parts/b.jsonl";
    for (first, others, data) in [
        ("parts", &[][..], "parts"),
        ("parts/*.jsonl", &[], "parts/*.jsonl"),
        ("parts/a.jsonl", &["parts/b.jsonl"], both),
        ("parts/a.jsonl", &["--data", "parts/b*"], "parts/a.jsonl, parts/b*"),
    ] {
        let [text, error] = look(first, &[others, &["--show", "2"]].concat());
        assert!(
            text.starts_with(&format!("{data}: 4 records in 2 files, format messages\n")),
            "{text}"
        );
        assert!(text.contains("      parts/b.jsonl:1: not valid JSON"), "{text}");
        assert!(text.contains("records that repeat an earlier one: 1 (parts/b.jsonl:2)"), "{text}");
        assert!(text.contains("left out: 1 (parts/a.jsonl:2)"), "{text}");
        assert!(
            text.contains("\nparts/a.jsonl:1: ") && text.contains("\nparts/b.jsonl:2: "),
            "{text}"
        );
        assert!(error.contains(&format!("{data} cannot be trained on as it is")), "{error}");
    }
    // An error while the first file is read.
    std::fs::create_dir(folder.path().join("odd")).unwrap();
    for (name, text) in
        [("a.jsonl", "{\"foo\": 1}"), ("b.jsonl", "{\"text\": \"b\"}"), ("c.jsonl", "")]
    {
        std::fs::write(folder.path().join("odd").join(name), text).unwrap();
    }
    let [_, error] = look("odd", &[]);
    assert!(error.contains("odd/a.jsonl:1: cannot tell the format"), "{error}");
    let [text, _] = look("parts", &["--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["files"][1], serde_json::json!({"path": "parts/b.jsonl", "lines_before": 2}));
    assert_eq!(json["rejected"][0]["line"], 3);
    let [_, error] = look("parts/c*", &[]);
    assert!(error.contains("no file fits parts/c*"), "{error}");
}

#[test]
fn one_is_no_plural() {
    let line = LINES.lines().next().unwrap();
    let text = report(line, &["--max-length", "34", "--truncation", "right"]);
    assert!(text.starts_with("chat.jsonl: 1 record, format messages\n"), "{text}");
    assert!(text.contains("cut at the end by 1 token in all: 1 (chat.jsonl:1)"), "{text}");
}

#[test]
fn the_audit_counts_everything_and_names_bad_lines() {
    let text = run(&[]);
    for expected in [
        "chat.jsonl: 4 records, format messages\n",
        "documents   2\n",
        "tokens      70, 6 of them trained: 8.6 % (loss on all answers)\n",
        "length      shortest 35, median 35, 95 % up to 35, longest 35 tokens\n",
        "packed      1 sequence of 2048 tokens, 3.4 % full\n",
        "35 to 35         2  ████████████████████████████████████████\n",
        "ok    no record is longer than 2048 tokens\n",
        "note  records without a token to train on, left out: 1 (chat.jsonl:2)\n",
        "note  records that repeat an earlier one: 1 (chat.jsonl:4)\n",
        "ok    every answer ends in a trained end-of-sequence token (<|im_end|>)\n",
        "bad   records that cannot be used: 1\n      chat.jsonl:3: not valid JSON at column 2: exp",
        "training would stop: chat.jsonl:3: not valid JSON",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
}

#[test]
fn the_exit_code_says_whether_training_would_stop() {
    let good = LINES.lines().next().unwrap();
    assert!(!report(good, &[]).contains("would stop"));
    let json: Value = serde_json::from_str(&report(good, &["--json"])).unwrap();
    assert!(json.as_object().unwrap()["would_stop"].is_null());
    let (text, error) = refused(LINES, &[]);
    assert!(text.contains("\n\ntraining would stop: chat.jsonl:3: not valid JSON"), "{text}");
    assert_eq!(
        error,
        "error: chat.jsonl cannot be trained on as it is\nhint: fix the records named above, \
         or leave them out by `--bad-records skip`\n"
    );
    let (text, error) = refused(good, &["--max-length", "32", "--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    let why = json["would_stop"].as_str().unwrap();
    assert!(why.starts_with("chat.jsonl:1: document is longer than 32 tokens"), "{why}");
    assert!(error.contains("\nhint: raise `--max-length` to 35, or choose"), "{error}");
    let (text, _) = refused(LINES.lines().nth(1).unwrap(), &[]);
    assert!(text.contains("training would stop: chat.jsonl: no record has a token"), "{text}");
}

#[test]
fn a_first_record_with_null_is_left_out_like_others() {
    let records = "{\"text\": null, \"id\": 1}\n{\"text\": \"Once.\", \"url\": \"a\"}\n";
    let text = report(records, &[]);
    assert!(text.starts_with("chat.jsonl: 2 records, format text\n"), "{text}");
    let note = "note  records without a token to train on, left out: 1 (chat.jsonl:1)\n";
    assert!(
        text.contains(note) && text.contains("note  fields that are not used: id, url\n"),
        "{text}"
    );
}

#[test]
fn roles_that_may_be_mistyped_are_named() {
    let record = |roles: [&str; 3]| {
        let messages = roles.map(|role| serde_json::json!({"role": role, "content": "Hi"}));
        serde_json::json!({ "messages": messages }).to_string() + "\n"
    };
    // Whose names are usual, in letters of any case.
    let good = record(["user", "assistant", "tool"]) + &record(["Human", "User", "BOT"]);
    let text = good.clone()
        + &record(["user", "Asistant", "assistant"])
        + &record(["narrator", "assistant", "Asistant"]);
    let roles = "messages with roles that few templates know: 2 of `Asistant` (from line 3), \
                 1 of `narrator` (from line 4)";
    let said = report(&text, &[]);
    assert!(said.contains(&format!("note  {roles}; only `assistant` is trained\n")), "{said}");
    let said = report(&text, &["--train-on", "all"]);
    assert!(said.contains(&format!("note  {roles}\n")), "{said}");
    assert!(!report(&good, &[]).contains("roles that"));
    let json: Value = serde_json::from_str(&report(&text, &["--json"])).unwrap();
    let narrator = serde_json::json!({"messages": 1, "first_line": 4});
    assert_eq!(json["unknown_roles"]["narrator"], narrator);
}

/// A template without tools: what would be left out of the text is refused, or told.
#[test]
fn what_the_template_leaves_out_is_said() {
    let call = serde_json::json!({"type": "function", "function": {"name": "f", "arguments": {}}});
    let record = |answer: &Value, tools: Value| {
        let messages = [serde_json::json!({"role": "user", "content": "Hi"}), answer.clone()];
        serde_json::json!({ "messages": messages, "tools": tools }).to_string() + "\n"
    };
    let plain = serde_json::json!({"role": "assistant", "content": "Hello!"});
    let (mut calls, mut only_calls, mut thinks, mut empty) =
        (plain.clone(), plain.clone(), plain.clone(), plain.clone());
    calls["tool_calls"] = serde_json::json!([call]);
    only_calls["tool_calls"] = serde_json::json!([call]);
    only_calls["content"] = Value::Null;
    thinks["reasoning_content"] = "They greet.".into();
    empty["content"] = "".into();
    let text = record(&calls, Value::Null)
        + &record(&plain, serde_json::json!([{"name": "f"}]))
        + &record(&only_calls, Value::Null)
        + &record(&plain, Value::Null);
    let (said, error) = refused(&text, &[]);
    for reason in [
        "chat.jsonl:1: the chat template leaves messages[1].tool_calls out\n",
        "chat.jsonl:2: the chat template leaves field `tools` out\n",
        "chat.jsonl:3: the chat template leaves messages[1].tool_calls out\n",
    ] {
        assert!(said.contains(reason), "{said}");
    }
    assert!(error.contains("hint: give a `--chat-template` that knows tools"), "{error}");
    let mut odd = tempfile::NamedTempFile::new().unwrap();
    odd.write_all(b"{{ messages[1].none_such.none_such }}").unwrap();
    let options = ["--chat-template", odd.path().to_str().unwrap()];
    let (_, error) = refused(&record(&only_calls, Value::Null), &options);
    assert!(error.contains("the record has tools, of which this template may"), "{error}");
    let two = serde_json::json!({"messages": [
        {"role": "user", "content": "Hi"}, empty, {"role": "user", "content": "Hi"}, plain,
    ]});
    let said = report(&(two.to_string() + "\n"), &["--train-on", "completion"]);
    assert!(!said.contains("empty answers"), "{said}");
    let said = report(&(record(&thinks, Value::Null) + &record(&empty, Value::Null)), &[]);
    for note in [
        "note  messages whose reasoning the chat template leaves out: 1 (chat.jsonl:1)\n",
        "note  empty answers: only their end is trained: 1 (chat.jsonl:2)\n",
    ] {
        assert!(said.contains(note), "{said}");
    }
}

/// The model is asked through its template, which it has not seen in training then.
#[test]
fn prompts_without_the_template_are_noted() {
    let plain = r#"{"prompt": "What is 1 plus 1?", "completion": " 2."}"#;
    let rendered = r#"{"prompt": "<|im_start|>user\n1 plus 1?<|im_end|>\n", "completion": "2."}"#;
    let says = "note  prompts of plain text, without the chat template that `instruction` and `output` \
                go through: 1 (chat.jsonl:1)";
    let text = report(&format!("{plain}\n{rendered}\n"), &[]);
    assert!(text.contains(says), "{text}");
    let marked = r#"{"prompt": "[INST] 1 plus 1? [/INST]", "completion": "2."}"#;
    let text = report(&format!("{rendered}\n{marked}\n"), &[]);
    assert!(!text.contains("without the chat template"), "{text}");
    let (text, _) = refused("Just some text.\n", &[]);
    assert!(text.contains("each line is a JSON object: plain text is `{\"text\""), "{text}");
}

#[test]
fn a_system_message_that_the_template_refuses_is_what_to_change() {
    let template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}\
                    {% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                    {% endfor %}";
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(template.as_bytes()).unwrap();
    let flags = ["--chat-template", file.path().to_str().unwrap()];
    let record = |system: bool| {
        let message = |role: &str| serde_json::json!({"role": role, "content": "Hi"});
        let first = system.then(|| message("system"));
        let all: Vec<_> = first.into_iter().chain(["user", "assistant"].map(message)).collect();
        serde_json::json!({ "messages": all, "tools": [{"name": "f"}] }).to_string() + "\n"
    };
    let (said, error) = refused(&record(true), &flags);
    assert!(said.contains("System role not supported"), "{said}");
    let hint =
        "hint: the template takes no message of the system: put its text before the first one";
    assert!(error.contains(hint), "{error}");
    let (_, error) = refused(&record(false), &flags);
    assert!(!error.contains("no message of the system"), "{error}");
}

/// Notebooks render conversations first, and mask the questions in a step of their own.
#[test]
fn texts_that_a_template_rendered_are_noted() {
    let plain = r#"{"text": "A nibble is four bits.<|im_end|>"}"#;
    let rendered =
        r#"{"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"}"#;
    let says = "note  texts rendered by a chat template, whose questions are trained, too: of `messages` only \
                answers are: 1 (chat.jsonl:2)";
    let text = report(&format!("{plain}\n{rendered}\n"), &[]);
    assert!(text.contains(says), "{text}");
    let joined = r#"{"text": "<|im_start|>One document.<|im_end|>Another, about [INST]."}"#;
    for (records, flags) in [(rendered, &["--train-on", "all"][..]), (plain, &[]), (joined, &[])] {
        let text = report(&format!("{records}\n"), flags);
        assert!(!text.contains("rendered by a chat template"), "{text}");
    }
}

/// A template of other roles renders no answer: what it has of the prompt is not to be trained instead.
#[test]
fn answers_that_the_template_leaves_out_are_refused() {
    let messages = serde_json::json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "It is a nibble."},
    ]);
    let text = serde_json::json!({ "messages": messages }).to_string() + "\n";
    let turn = |role: &str| {
        format!(
            "{{% if m.role == '{role}' %}}<|im_start|>{role}\n{{{{ m.content }}}}<|im_end|>\n{{% endif %}}"
        )
    };
    let folder = tempfile::tempdir().unwrap();
    let template = |roles: &[&str]| {
        let turns: String = roles.iter().map(|role| turn(role)).collect();
        let prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        let path = folder.path().join(format!("{}.jinja", roles.join("-")));
        std::fs::write(&path, format!("{{% for m in messages %}}{turns}{{% endfor %}}{prompt}"))
            .unwrap();
        path.to_str().unwrap().to_string()
    };
    let other = template(&["system", "user", "model"]);
    for train_on in ["assistant", "all"] {
        let (said, error) = refused(&text, &["--chat-template", &other, "--train-on", train_on]);
        let reason = "chat.jsonl:1: the chat template leaves messages[2].content out\n";
        assert!(said.contains(reason), "{said}");
        assert!(error.contains("hint: does it know the role `assistant`?"), "{error}");
    }
    let deaf = template(&["user", "assistant"]);
    let said = report(&text, &["--chat-template", &deaf]);
    let note = "note  messages whose text the chat template leaves out: 1 (chat.jsonl:1)\n";
    assert!(said.contains(note), "{said}");
    let whole = template(&["system", "user", "assistant"]);
    let said = report(&text, &["--chat-template", &whole]);
    assert!(!said.contains("leaves out"), "{said}");
}

/// Nothing is wrong with the records; what the template itself refuses is theirs.
#[test]
fn a_template_that_fails_is_to_blame_for_it() {
    let record = LINES.lines().next().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (source, reason, hint) in [
        ("{{ messages.no_such_thing() }}", "unknown method", "choose another by `--chat-template`"),
        ("{{ raise_exception('no greetings') }}", "no greetings", "fix the records named above"),
    ] {
        let path = folder.path().join("odd.jinja");
        std::fs::write(&path, source).unwrap();
        let (said, error) = refused(record, &["--chat-template", path.to_str().unwrap()]);
        assert!(said.contains(reason), "{said}");
        assert!(error.contains(hint), "{error}");
    }
}

#[test]
fn a_terminal_obeys_nothing_that_is_shown() {
    let text = serde_json::json!({"text": "a\u{1b}[31mb\u{7}\u{7f}\u{9b}c"}).to_string();
    let shown = report(&text, &["--show", "1"]);
    assert!(shown.chars().all(|shown| shown == '\n' || !shown.is_control()), "{shown:?}");
    assert!(shown.contains('␛') && shown.contains('␇') && shown.contains('␡'), "{shown}");
}

#[test]
fn records_of_a_list_on_one_line_are_told_apart() {
    let output =
        look("d.json", "[{\"text\": \"a b c\"}, {\"text\": \"d e f\"}, {\"text\": 3}]", &[]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("d.json:3: field `text` is a number, expected text\n"), "{said}");
}

#[test]
fn lengths_that_the_model_was_not_trained_on_are_noted() {
    let known = "the model was trained on up to 3,000 tokens; ";
    let text = |length: usize| serde_json::json!({"text": " a".repeat(length)}).to_string();
    let lines = format!("{}\n{}\n", text(2000), text(2500));
    assert!(!report(&lines, &["--max-length", "3000"]).contains(known));
    let said = report(&lines, &["--max-length", "5000"]);
    assert!(said.contains(&format!("ok    {known}no document is longer\n")), "{said}");
    let lines = lines + &text(4000);
    let said = report(&lines, &["--max-length", "5000"]);
    let note = format!(
        "note  {known}1 document is longer: its later positions are new to the model \
         (chat.jsonl:3)\n"
    );
    assert!(said.contains(&note), "{said}");
    let json: Value =
        serde_json::from_str(&report(&lines, &["--max-length", "5000", "--json"])).unwrap();
    assert_eq!(
        (&json["trained_length"], &json["beyond_trained_length"][0]),
        (&3000.into(), &3.into())
    );
}

#[test]
fn what_truncation_would_do_is_said() {
    let text = run(&["--max-length", "32"]);
    let refused = "note  records longer than 32 tokens (100.0 %), refused without `--truncation`: 2 \
                   (chat.jsonl:1, 4)\n";
    assert!(text.contains(refused), "{text}");
    let text = run(&["--max-length", "32", "--truncation", "left"]);
    let cut = "(100.0 %), cut at the beginning by 6 tokens in all: 2 (chat.jsonl:1, 4)\n";
    assert!(text.contains(cut), "{text}");
}

#[test]
fn answers_that_lose_their_end_are_counted_after_truncation() {
    let fine = "ok    every answer ends in a trained end-of-sequence token (<|im_end|>)\n";
    let text = run(&["--max-length", "33", "--truncation", "right"]);
    let cut = "note  answers that lost their end to truncation: 2 (chat.jsonl:1, 4)\n";
    assert!(text.contains(cut) && !text.contains(fine), "{text}");
    // Without the line break behind the end, or without the beginning, the ends are there.
    for flags in [["34", "right"], ["33", "left"]] {
        let text = run(&["--max-length", flags[0], "--truncation", flags[1]]);
        assert!(text.contains(fine) && !text.contains("lost their end"), "{text}");
    }
    let json = run(&["--max-length", "33", "--truncation", "right", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["cut_answers"], serde_json::json!([1, 4]));
}

#[test]
fn nothing_is_fine_about_no_document() {
    for flags in [["8", "right"], ["8", "drop"], ["8", "error"]] {
        let flags = ["--max-length", flags[0], "--truncation", flags[1]];
        let text = run(&flags);
        assert!(text.contains("note  no document is left to train on\n"), "{text}");
        assert!(!text.contains("every answer ends in"), "{text}");
    }
}

#[test]
fn the_loss_mask_is_visible_token_by_token() {
    let text = run(&["--show", "1"]);
    let shown = "
chat.jsonl:1: 35 tokens, 3 trained (+)
  <|im_start|>│system│⏎
  You│ are│ a│ helpful│ AI│ assistant│ named│ Sm│ol│LM│,│ trained│ by│ H│ugging│ Face│<|im_end|>│⏎
  <|im_start|>│user│⏎
  Hi│<|im_end|>│⏎
  <|im_start|>│ass│istant│⏎
+ Hello│!│<|im_end|>
  ⏎
";
    assert!(text.ends_with(shown), "{text}");
}

#[test]
fn json_has_the_same_figures() {
    let json: Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!(json["records"], 4);
    assert_eq!(json["targets"], 6);
    assert_eq!(json["rejected"][0]["line"], 3);
    assert_eq!(json["duplicates"], serde_json::json!([4]));
    assert_eq!(json["length"]["longest"], 35);
}
