//! Data files that cannot be trained on.

use std::fs;

use serde_json::json;

use crate::scene::{assert_not_trained, assert_refused};
use crate::training::{Workplace, stderr, succeed};

fn with_data(text: impl AsRef<[u8]>) -> Workplace {
    let place = Workplace::new();
    fs::write(place.path("train.jsonl"), text).unwrap();
    place
}

#[test]
fn a_token_that_the_model_does_not_have() {
    let row = json!({"input_ids": [3, 5, 128, 7]}).to_string();
    let place = with_data(format!("{}\n{row}\n", json!({"input_ids": [3, 4, 5]})));
    assert_not_trained(&place, 1, &[], &["train.jsonl:2", "128"]);
}

#[test]
fn the_tokenizer_of_another_model() {
    let place = with_data(json!({"text": "w1 w2 w3 foreign w4"}).to_string());
    let path = place.path("model/tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    // As many words as rows of embeddings, and one id beyond them.
    fs::write(&path, text.replace("\"w3\":3", "\"foreign\":40000")).unwrap();
    assert_not_trained(&place, 1, &[], &["train.jsonl:1", "40000", "128", "tokenizer"]);
    fs::write(&path, text.replace("\"w3\":3", "\"foreign\":128,\"w3\":3")).unwrap();
    assert_not_trained(&place, 1, &[], &["tokenizer has 129 ids", "model 128"]);
}

#[test]
fn a_prompt_in_the_tokenizer_of_another_model() {
    let place = Workplace::new();
    let path = place.path("model/tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"w3\":3", "\"foreign\":40000,\"w3\":3")).unwrap();
    let command = place.nibble(&[
        "generate",
        "--model",
        "model",
        "--raw",
        "--prompt",
        "w1 foreign",
        "--max-new-tokens",
        "3",
    ]);
    assert_refused(&place, command, 1, &["40000", "tokenizer"]);
}

#[test]
fn a_line_that_is_no_json() {
    for (line, says) in [
        (&b"{\"text\": \"w5 w6\""[..], "not valid JSON"),
        (b"{\"text\": \"\xff\xfe\"}", "not UTF-8"),
        (b"[1, 2", "not valid JSON"),
        (b"null", "null"),
    ] {
        let good: &[u8] = b"{\"text\": \"w1 w2 w3\"}\n";
        let place = with_data([good, good, line, b"\n", good].concat());
        assert_not_trained(&place, 1, &[], &["train.jsonl:3", says]);
    }
}

/// Streams of objects without line breaks, and tables as pandas writes them.
#[test]
fn records_that_are_not_one_a_line() {
    for format in ["", "--format=prompt"] {
        let flags: &[&str] = if format.is_empty() { &[] } else { &[format] };
        let place = with_data("{\"prompt\": \"w1\", \"completion\": \"w2\"}".repeat(2));
        let says = ["train.jsonl:1", "hint: one object follows another", "`jq -c . FILE`"];
        assert_not_trained(&place, 1, flags, &says);
        let table =
            "{\"prompt\":{\"0\":\"w1\",\"1\":\"w2\"},\"completion\":{\"0\":\"w3\",\"1\":\"w4\"}}";
        let says = ["train.jsonl:1", "one table of the columns", "lines=True"];
        assert_not_trained(&with_data(table), 1, flags, &says);
    }
}

#[test]
fn a_field_of_the_wrong_type() {
    let place = with_data("{\"text\": \"w1 w2\"}\n{\"text\": [1, 2]}\n");
    assert_not_trained(&place, 1, &[], &["train.jsonl:2", "`text`"]);
    let place = with_data("{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, -2]}\n");
    assert_not_trained(&place, 1, &[], &["train.jsonl:2", "`input_ids`"]);
    let place = with_data("{\"input_ids\": [1, 2, 3], \"labels\": [1, 2]}\n");
    assert_not_trained(&place, 1, &[], &["train.jsonl:1", "labels"]);
}

#[test]
fn records_of_no_known_format() {
    let place = with_data("{\"title\": \"w1\", \"body\": \"w2\"}\n");
    assert_not_trained(&place, 1, &[], &["train.jsonl:1", "title", "prompt and completion"]);
    let place = with_data("{\"question\": \"w1\", \"answer\": \"w2\"}\n");
    let flags = "--rename-columns question=instruction --rename-columns answer=output";
    assert_not_trained(&place, 1, &[], &["train.jsonl:1", flags]);
}

#[test]
fn an_empty_data_set() {
    for text in ["", "\n\n  \n", "[]", "[\n]\n"] {
        let place = with_data(text);
        assert_not_trained(&place, 1, &[], &["train.jsonl", "no records"]);
        let command = place.nibble(&["data", "--model", "model", "--data", "train.jsonl"]);
        assert_refused(&place, command, 1, &["train.jsonl", "no records"]);
        let command = place.nibble(&["eval", "--model", "model", "--data", "train.jsonl"]);
        assert_refused(&place, command, 1, &["train.jsonl", "no records"]);
    }
}

#[test]
fn a_list_that_is_cut_off() {
    let place = with_data("[{\"text\": \"w1 w2\"}, {\"text\": \"w3");
    assert_not_trained(&place, 1, &[], &["train.jsonl", "list is not closed", "cut"]);
}

#[test]
fn data_with_all_labels_masked() {
    let row = json!({"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, -100]});
    let place = with_data(format!("{row}\n{row}\n"));
    assert_not_trained(&place, 1, &[], &["train.jsonl", "no record has a token to train on"]);
    let command = place.nibble(&["eval", "--model", "model", "--data", "train.jsonl"]);
    assert_refused(&place, command, 1, &["train.jsonl", "no record has a token to train on"]);
}

#[test]
fn evaluation_data_with_all_labels_masked() {
    let row = json!({"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, -100]});
    let place = Workplace::new();
    fs::write(place.path("eval.jsonl"), format!("{row}\n")).unwrap();
    let says = ["eval.jsonl", "no record has a token to train on"];
    assert_not_trained(&place, 1, &["--eval-data", "eval.jsonl"], &says);
}

#[test]
fn a_data_file_that_is_not_there() {
    let place = Workplace::new();
    fs::remove_file(place.path("train.jsonl")).unwrap();
    assert_not_trained(&place, 1, &[], &["train.jsonl", "(os error 2)"]);
}

#[test]
fn rows_without_a_trained_token_are_left_out_aloud() {
    let masked = json!({"input_ids": [1, 2, 3], "labels": [-100, -100, -100]});
    let good = json!({"input_ids": [1, 2, 3, 4, 5, 6]});
    let place = with_data(format!("{masked}\n{good}\n"));
    let output = succeed(place.train("out", &["--max-steps", "1"]));
    let text = stderr(&output);
    assert!(text.contains("1 without a token to train on, left out"), "{text}");
}
