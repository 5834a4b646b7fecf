//! Tokens of the real SmolLM2 tokenizer: `tests/data/tokenizer/smollm2.json` was made with
//! transformers' tokenizer on the model that `gguf_to_hf.py` wrote.

use std::path::Path;

use nibble::data::ChatTokenizer;
use serde_json::{Value, json};

fn data() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer"))
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(data().join("smollm2.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// transformers 5 rebuilds a `GPT2Tokenizer` without the pre-tokenizer of its `tokenizer.json`; the
/// golden ids of this one text show it. SmolLM2 was trained with digits split off, other scripts'
/// digits too, and so do transformers 4, llama.cpp and the tokenizers library with our file.
const NON_ASCII_DIGITS: &str = "½ ² ٣ ৪ Ⅷ";

#[test]
fn digits_of_all_scripts_are_split() {
    let tokenizer = ChatTokenizer::open(&data().join("smollm2")).unwrap();
    // Computed with the Python package tokenizers 0.23.3 from the saved tokenizer.json.
    let expected = [16738, 216, 19133, 216, 164, 113, 216, 47827, 120, 216, 173, 223, 117];
    assert_eq!(tokenizer.encode(NON_ASCII_DIGITS).unwrap(), expected);
}

#[test]
fn every_text_encodes_and_decodes_as_in_transformers() {
    let tokenizer = ChatTokenizer::open(&data().join("smollm2")).unwrap();
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 15);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        if text == NON_ASCII_DIGITS {
            continue;
        }
        assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
        if case["round_trip"].as_bool().unwrap() {
            assert_eq!(tokenizer.decode(&expected, false).unwrap(), text);
        }
    }
}

#[test]
fn a_saved_tokenizer_opens_as_the_same() {
    let tokenizer = ChatTokenizer::open(&data().join("smollm2")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let again = ChatTokenizer::open(folder.path()).unwrap();
    let text = "<|im_start|>user\nGrüße, 12345!<|im_end|>\n";
    assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
    assert_eq!(again.chat_template(), tokenizer.chat_template());
    assert_eq!(again.eos(), tokenizer.eos());
    assert_eq!(again.eos().unwrap().text, "<|im_end|>");
    assert_eq!(again.own_vocab_size(), 49152);
}

/// transformers 5 reads the post-processor of `tokenizer.json`, and no `add_bos_token`.
#[test]
fn a_saved_tokenizer_puts_its_bos_in_front_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = data().join("smollm2");
    std::fs::copy(source.join("tokenizer.json"), path("tokenizer.json")).unwrap();
    for (add_bos_token, expected) in [(true, vec![1, 19556]), (false, vec![19556])] {
        let config = json!({"bos_token": "<|im_start|>", "add_bos_token": add_bos_token});
        std::fs::write(path("tokenizer_config.json"), config.to_string()).unwrap();
        let saved = tempfile::tempdir().unwrap();
        ChatTokenizer::open(folder.path()).unwrap().save(saved.path()).unwrap();
        let raw = tokenizers::Tokenizer::from_file(saved.path().join("tokenizer.json")).unwrap();
        let ids = |text| raw.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(ids("Hello"), expected);
        // Without a key, and where the key says otherwise, as transformers 5 reads it.
        for key in [json!(null), json!(false)] {
            let mut config = config.clone();
            config["add_bos_token"] = key;
            let file = saved.path().join("tokenizer_config.json");
            std::fs::write(file, config.to_string()).unwrap();
            let opened = ChatTokenizer::open(saved.path()).unwrap();
            assert_eq!(opened.adds_bos(), add_bos_token);
            assert_eq!(opened.encode("Hello").unwrap(), [19556]);
        }
        // A second time nothing is added.
        let again = tempfile::tempdir().unwrap();
        ChatTokenizer::open(saved.path()).unwrap().save(again.path()).unwrap();
        let read = |folder: &tempfile::TempDir| {
            std::fs::read(folder.path().join("tokenizer.json")).unwrap()
        };
        assert!(read(&again) == read(&saved));
    }
}
