//! `nibble data` as a user runs it: counts, bad lines and the visible loss mask.

use std::process::Command;

use serde_json::Value;

const LINES: &str = "\
{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello!\"}]}
{\"messages\": [{\"role\": \"user\", \"content\": \"Nobody answers\"}]}
not json
{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello!\"}]}
";

fn run(arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2");
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let config = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}"#;
    std::fs::write(model.join("config.json"), config).unwrap();
    std::fs::write(folder.path().join("chat.jsonl"), LINES).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nibble"));
    command.args(["data", "--model", "model", "--data", "chat.jsonl"]).args(arguments);
    let output = command.current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_audit_counts_everything_and_names_bad_lines() {
    let text = run(&[]);
    for expected in [
        "chat.jsonl: 4 records, format messages",
        "2 documents",
        "1 records without a token to train on: lines 2",
        "1 records that repeat an earlier record: lines 4",
        "0 records with an answer whose end-of-sequence is not trained",
        "1 bad records\n  chat.jsonl:3: not valid JSON",
        "packed into 1 rows of 2048 tokens",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
}

#[test]
fn the_loss_mask_is_visible_token_by_token() {
    let text = run(&["--show", "1"]);
    assert!(text.contains("<|im_start|>assistant\n[Hello][!][<|im_end|>]"), "{text}");
    assert!(text.contains(", 3 trained"), "{text}");
}

#[test]
fn json_has_the_same_figures() {
    let json: Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!(json["records"], 4);
    assert_eq!(json["targets"], 6);
    assert_eq!(json["rejected"][0][0], 3);
    assert_eq!(json["duplicates"], serde_json::json!([4]));
}
