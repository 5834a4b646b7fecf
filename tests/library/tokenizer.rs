//! Tokens of the real SmolLM2 tokenizer: `tests/data/tokenizer/smollm2.json` was made with
//! transformers' tokenizer on the model that `gguf_to_hf.py` wrote.

use std::path::Path;

use nibble::data::ChatTokenizer;
use serde_json::Value;

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
    assert_eq!(again.vocab_size(), 49152);
}
