//! Records of every format to ids and loss masks.
//!
//! `tests/data/tokenizer/encoded.json` was made by `scripts/golden/gen_encoded.py` with transformers.

use std::path::Path;

use nibble::data::record::parse;
use nibble::data::{ChatTokenizer, Document, Encoder, Format, TrainOn};
use serde_json::{Value, json};

const VOCAB: usize = 49152;

/// SmolLM2's tokenizer with changes to its configuration; null removes a field.
fn tokenizer(changes: Value) -> ChatTokenizer {
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2"));
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::copy(source.join("tokenizer.json"), path("tokenizer.json")).unwrap();
    let config = std::fs::read(source.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(path("tokenizer_config.json"), config.to_string()).unwrap();
    ChatTokenizer::open(folder.path()).unwrap()
}

fn encode(tokenizer: &ChatTokenizer, record: &Value) -> Result<Document, String> {
    let encoder = Encoder::new(tokenizer, VOCAB, TrainOn::Assistant).unwrap();
    let format = Format::detect(record).map_err(|e| e.reason)?;
    let encoded = parse(record, format).and_then(|record| encoder.encode(&record));
    encoded.map(|encoded| encoded.document).map_err(|e| e.reason)
}

/// Text of the trained tokens.
fn trained(tokenizer: &ChatTokenizer, record: Value) -> Result<String, String> {
    let document = encode(tokenizer, &record)?;
    let pairs = document.input_ids.iter().zip(&document.labels);
    let ids: Vec<u32> = pairs.filter(|(_, label)| **label >= 0).map(|(id, _)| *id).collect();
    Ok(tokenizer.decode(&ids, false).unwrap())
}

/// All of the record.
fn text(tokenizer: &ChatTokenizer, record: Value) -> String {
    tokenizer.decode(&encode(tokenizer, &record).unwrap().input_ids, false).unwrap()
}

fn exchange(question: &str, answer: &str) -> Vec<Value> {
    vec![
        json!({"role": "user", "content": question}),
        json!({"role": "assistant", "content": answer}),
    ]
}

#[test]
fn ids_and_masks_are_those_of_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/encoded.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokenizer = tokenizer(json!({"chat_template": golden["template"]}));
    let eos = tokenizer.eos().unwrap().id;
    let records = golden["records"].as_array().unwrap();
    assert!(records.len() > 20);
    for golden in records {
        let document = encode(&tokenizer, &golden["record"]).unwrap();
        let ids: Vec<u32> = serde_json::from_value(golden["input_ids"].clone()).unwrap();
        let mut expected: Vec<u8> = serde_json::from_value(golden["trained"].clone()).unwrap();
        if !golden["record"]["messages"].is_null() {
            // The template's blocks have the line break after the end of the turn; it is not said.
            for index in 1..ids.len() {
                expected[index] *= u8::from(ids[index - 1] != eos || ids[index] == eos);
            }
        }
        let mask: Vec<u8> = document.labels.iter().map(|&label| u8::from(label >= 0)).collect();
        assert_eq!(document.input_ids, ids, "{}", golden["record"]);
        assert_eq!(mask, expected, "{}", golden["record"]);
    }
}

#[test]
fn only_the_completion_of_a_conversation_is_trained() {
    let prompt = [exchange("a", "b"), exchange("c", "")[..1].to_vec()].concat();
    let record = json!({"prompt": prompt,
        "completion": [{"role": "assistant", "content": "d"}]});
    assert_eq!(trained(&tokenizer(json!({})), record).unwrap(), "d<|im_end|>");
}

#[test]
fn what_the_system_says_is_said_once() {
    let tokenizer = tokenizer(json!({}));
    let (user, answer) = (exchange("a", "b")[0].clone(), exchange("a", "b")[1].clone());
    let system = json!({"role": "system", "content": "Be brief."});
    let expected = text(&tokenizer, json!({"messages": [system, user, answer]}));
    assert_eq!(expected.matches("Be brief.").count(), 1);
    for record in [
        json!({"system": "Be brief.", "prompt": [user], "completion": [answer]}),
        json!({"system": "Be brief.", "messages": [system, user, answer]}),
        json!({"system": "", "prompt": [system, user], "completion": [answer]}),
        // Cells of a table.
        json!({
            "system": "Be brief.", "prompt": json!([user]).to_string(),
            "completion": json!([answer]).to_string(),
        }),
    ] {
        assert_eq!(text(&tokenizer, record.clone()), expected, "{record}");
        assert_eq!(trained(&tokenizer, record).unwrap(), "b<|im_end|>");
    }
    let other = json!({"system": "Be long.", "messages": [system, user, answer]});
    let refused = encode(&tokenizer, &other).unwrap_err();
    assert_eq!(refused, "field `system` is another than messages[0], the system's");
    // Text that only looks like a list is text.
    let plain = json!({"prompt": "[1, 2] has", "completion": " two"});
    assert_eq!(trained(&tokenizer, plain).unwrap(), " two<|im_end|>");
}

#[test]
fn parts_are_joined_where_the_template_does_not_go_through_them() {
    let parts = json!([{"type": "text", "text": " AB"}, {"type": "text", "text": "CD "}]);
    let mut messages = exchange("", "E");
    messages[0]["content"] = parts.clone();
    let record = json!({"messages": messages});
    let said = text(&tokenizer(json!({})), record.clone());
    assert!(said.contains("<|im_start|>user\n AB\nCD <|im_end|>"), "{said:?}");
    // As Gemma 3's.
    let template = "{%- for m in messages -%}<|im_start|>{{ m.role }}\n\
                    {%- if m.content is string -%}{{ m.content | trim }}\
                    {%- else -%}{%- for part in m.content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}\
                    <|im_end|>{%- endfor -%}\
                    {%- if add_generation_prompt -%}<|im_start|>assistant{%- endif -%}";
    let tokenizer = tokenizer(json!({"chat_template": template}));
    let said = text(&tokenizer, record.clone());
    assert!(said.contains("<|im_start|>userABCD<|im_end|>"), "{said:?}");
    assert_eq!(trained(&tokenizer, record).unwrap(), "E<|im_end|>");
    messages[1]["content"] = parts;
    let answer = trained(&tokenizer, json!({"messages": messages})).unwrap();
    assert_eq!(answer.replace(' ', ""), "ABCD<|im_end|>");
}

#[test]
fn an_end_of_sequence_is_found_wherever_a_model_names_it() {
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer/smollm2"));
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &Value| {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    };
    std::fs::copy(source.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let eos = || {
        let opened = ChatTokenizer::open(folder.path()).unwrap();
        (opened.eos().map(|eos| eos.text.clone()), opened.eos_ids().to_vec())
    };
    // The hub's GPT-2.
    write("tokenizer_config.json", &json!({"model_max_length": 1024}));
    assert_eq!(eos(), (None, vec![]));
    write("config.json", &json!({"eos_token_id": 0}));
    assert_eq!(eos(), (Some("<|endoftext|>".into()), vec![0]));
    write("generation_config.json", &json!({"eos_token_id": [2, 0]}));
    assert_eq!(eos(), (Some("<|im_end|>".into()), vec![2, 0]));
    write("special_tokens_map.json", &json!({"eos_token": {"content": "<|endoftext|>"}}));
    assert_eq!(eos(), (Some("<|endoftext|>".into()), vec![0, 2]));
    write("tokenizer_config.json", &json!({"eos_token": "<|im_start|>"}));
    assert_eq!(eos(), (Some("<|im_start|>".into()), vec![1, 2, 0]));
    write("tokenizer_config.json", &json!({"eos_token": null}));
    assert_eq!(eos(), (None, vec![2, 0]));
}

#[test]
fn messages_with_weight_zero_are_not_trained() {
    let mut messages = [exchange("a", "b"), exchange("c", "d")].concat();
    messages[1]["weight"] = 0.into();
    messages[3]["weight"] = 1.into();
    let record = json!({"messages": messages});
    assert_eq!(trained(&tokenizer(json!({})), record).unwrap(), "d<|im_end|>");
    messages[1]["weight"] = 0.0.into();
    let record = json!({"messages": messages});
    assert_eq!(trained(&tokenizer(json!({})), record).unwrap(), "d<|im_end|>");
    let turn = |from: &str, value: &str, weight: u32| json!({"from": from, "value": value, "weight": weight});
    let turns = json!([
        turn("human", "a", 1),
        turn("gpt", "b", 0),
        turn("human", "c", 1),
        turn("gpt", "d", 1)
    ]);
    let record = json!({"conversations": turns});
    assert_eq!(trained(&tokenizer(json!({})), record).unwrap(), "d<|im_end|>");
    messages[1] = json!({"role": "assistant", "content": "b", "train": false});
    messages[3] = json!({"role": "assistant", "content": "d", "train": true});
    let record = json!({"messages": messages});
    assert_eq!(trained(&tokenizer(json!({})), record).unwrap(), "d<|im_end|>");
    messages[1]["train"] = "no".into();
    let refused = encode(&tokenizer(json!({})), &json!({"messages": messages})).unwrap_err();
    assert_eq!(refused, "messages[1].train is \"no\", expected true or false");
    messages[1] = json!({"role": "assistant", "content": "b", "loss": false});
    messages[3] = json!({"role": "assistant", "content": "d", "loss": true, "weight": 1});
    let record = json!({"messages": messages});
    assert_eq!(trained(&tokenizer(json!({})), record).unwrap(), "d<|im_end|>");
    let turns = json!([
        {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": false},
        {"from": "human", "value": "c"}, {"from": "gpt", "value": "d", "loss": null},
    ]);
    let record = json!({"conversations": turns});
    assert_eq!(trained(&tokenizer(json!({})), record).unwrap(), "d<|im_end|>");
    for (name, value, reason) in [
        ("loss", json!(0.5), ".loss is 0.5, expected true or false"),
        ("weight", json!(1), " is to be trained by one of `weight` and `loss` alone"),
        ("train", json!(true), " is to be trained by one of `train` and `loss` alone"),
    ] {
        let mut messages = messages.clone();
        messages[1][name] = value;
        let refused = encode(&tokenizer(json!({})), &json!({"messages": messages})).unwrap_err();
        assert_eq!(refused, format!("messages[1]{reason}"));
    }
    messages[1] = json!({"role": "assistant", "content": "b"});
    for weight in [json!(0.5), json!(-1), json!("0"), json!(false)] {
        messages[1]["weight"] = weight.clone();
        let refused = encode(&tokenizer(json!({})), &json!({"messages": messages})).unwrap_err();
        assert_eq!(refused, format!("messages[1].weight is {weight}, expected 0 or 1"));
    }
}

#[test]
fn sharegpt_and_openai_are_the_same_conversation() {
    let tokenizer = tokenizer(json!({}));
    let openai = json!({"messages": [{"role": "system", "content": "S"}, {"role": "user",
        "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]});
    let expected = encode(&tokenizer, &openai).unwrap();
    for record in [
        json!({"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt",
            "value": "b"}]}),
        json!({"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "a"},
            {"from": "assistant", "value": "b"}]}),
        json!({"conversations": openai["messages"]}),
        json!({"messages": openai["messages"].to_string()}),
        json!({"system": "S", "instruction": "a", "input": "", "output": "b"}),
    ] {
        assert_eq!(encode(&tokenizer, &record).unwrap(), expected, "{record}");
    }
}

#[test]
fn calls_of_tools_are_trained_however_they_are_written() {
    let golden = include_str!("../data/chat/qwen2_5.json");
    let golden: Value = serde_json::from_str(golden).unwrap();
    let tokenizer = tokenizer(json!({"chat_template": golden["template"]}));
    let arguments = json!({"city": "Köln"});
    let call = |arguments: Value| {
        json!({"role": "assistant", "content": null, "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": arguments}}]})
    };
    let answer = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n\
                  </tool_call><|im_end|>";
    let tools = json!([{"type": "function", "function": {"name": "weather"}}]);
    let ask = json!({"role": "user", "content": "?"});
    for record in [
        json!({"messages": [ask, call(arguments.clone())], "tools": tools}),
        json!({"messages": [ask, call(arguments.to_string().into())], "tools": tools.to_string()}),
        json!({"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value":
            json!({"name": "weather", "arguments": arguments}).to_string()}], "tools": tools.to_string()}),
        // OpenAI's first names for both.
        json!({"messages": [ask, {"role": "assistant", "content": null, "tool_calls": null,
            "function_call": {"name": "weather", "arguments": arguments.to_string()}}],
            "functions": [{"name": "weather"}]}),
    ] {
        assert_eq!(trained(&tokenizer, record.clone()).unwrap(), answer, "{record}");
        assert!(text(&tokenizer, record).contains("\n{\"type\": \"function\", \"function\": {"));
    }
}

/// DeepSeek-V3's template puts them together with other text; functionary's does so, too.
#[test]
fn arguments_stay_text_where_the_template_needs_text() {
    let with_arguments = |written: &str| {
        let turn = format!(
            "{{% for c in m.tool_calls or [] %}}{{{{ {written} }}}}{{% endfor %}}{{{{ m.content or '' }}}}"
        );
        let template = format!(
            "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{turn}<|im_end|>\n{{% endfor %}}\
             {{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
        );
        tokenizer(json!({"chat_template": template}))
    };
    let arguments = "{\"n\":  18446744073709551616, \"x\": 2e-5}";
    let call = json!({"type": "function", "function": {"name": "f", "arguments": arguments}});
    let record = json!({"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]});
    for (written, expected) in [
        ("'f: ' + c.function.arguments", format!("f: {arguments}")),
        ("c.function.arguments | tojson", "{\"n\": 18446744073709551616, \"x\": 2e-05}".into()),
        ("c.function.arguments.n", "18446744073709551616".into()),
    ] {
        let said = trained(&with_arguments(written), record.clone()).unwrap();
        assert_eq!(said, format!("{expected}<|im_end|>c<|im_end|>"), "{written}");
    }
    // Where neither will do, the template is to blame.
    let refused = encode(&with_arguments("c.function.arguments.none_such()"), &record).unwrap_err();
    assert!(refused.starts_with("chat template: "), "{refused}");
}

/// Bad answers would be learned as good ones, and better ones lost.
#[test]
fn ratings_preferences_and_pictures_are_refused() {
    let tokenizer = tokenizer(json!({}));
    let rating =
        |field| Err(format!("field `{field}` is true or false: whether the answer is a good one"));
    let said = [json!({"from": "human", "value": "a"}), json!({"from": "gpt", "value": "b"})];
    for (record, field) in [
        (json!({"messages": exchange("a", "b"), "label": false}), "label"),
        (json!({"conversations": said, "kto_tag": true}), "kto_tag"),
        (json!({"instruction": "a", "output": "b", "kto_tag": false}), "kto_tag"),
        (json!({"prompt": "a", "completion": "b", "label": "False"}), "label"),
    ] {
        assert_eq!(trained(&tokenizer, record), rating(field));
    }
    for (seen, field) in [(json!(["a.jpg"]), "images"), (json!({"bytes": [1]}), "image")] {
        let mut record = json!({"messages": exchange("<image>a", "b")});
        record[field] = seen;
        let reason = format!("field `{field}`: only text can be trained");
        assert_eq!(trained(&tokenizer, record.clone()), Err(reason));
        record[field] = json!([]);
        assert_eq!(trained(&tokenizer, record).unwrap(), "b<|im_end|>");
    }
    let classified = json!({"text": "a", "label": true});
    assert!(encode(&tokenizer, &classified).is_ok(), "of a text it says nothing about an answer");
    // LLaMA-Factory's: the answers go on from the conversation.
    let answer = |text: &str| json!({"from": "gpt", "value": text});
    let asked = &said[..1];
    let pair = json!({"conversations": asked, "chosen": answer("good"), "rejected": answer("bad")});
    let rejection = parse(&pair, Format::Sharegpt).unwrap_err();
    assert_eq!(
        rejection.reason,
        r#"the record has the fields ["conversations", "chosen", "rejected"]"#
    );
    let hint = rejection.hint.unwrap();
    let flags = "`--rename-columns conversations=prompt --rename-columns chosen=completion`";
    assert!(hint.ends_with(flags), "{hint}");
    // Whatever their shape, the renames of the hint train the better one, and it alone.
    let both = |answer: &str| json!(exchange("a", answer));
    let question = json!(&exchange("a", "")[..1]);
    for pair in [
        pair,
        json!({"messages": question, "chosen": both("good"), "rejected": both("bad")}),
        json!({"messages": question, "chosen": "good", "rejected": "bad"}),
        json!({"prompt": question, "chosen": [both("good")[1]], "rejected": [both("bad")[1]]}),
    ] {
        let refused = Format::detect(&pair).and_then(|format| parse(&pair, format)).unwrap_err();
        let (mut renamed, hint) = (pair.clone(), refused.hint.unwrap());
        let flags = hint.split('`').rfind(|part| part.starts_with("--rename-columns")).unwrap();
        let flags: Vec<_> = flags.split("--rename-columns").map(str::trim).skip(1).collect();
        let fields = renamed.as_object_mut().unwrap();
        let moved: Vec<(&str, Value)> = flags
            .iter()
            .map(|flag| flag.split_once('=').unwrap())
            .map(|(old, new)| (new, fields.remove(old).unwrap()))
            .collect();
        moved.into_iter().for_each(|(new, value)| drop(fields.insert(new.into(), value)));
        let said = trained(&tokenizer, renamed.clone());
        assert!(
            said.as_ref().is_ok_and(|said| said.trim() == "good<|im_end|>"),
            "{pair} {hint} {said:?}"
        );
        assert_eq!(text(&tokenizer, renamed).matches("good").count(), 1, "{pair}");
    }
    // The better one is the record's messages.
    let kept = json!({"messages": both("good"), "chosen": both("good"), "rejected": both("bad")});
    assert_eq!(trained(&tokenizer, kept).unwrap(), "good<|im_end|>");
}

#[test]
fn messages_are_read_in_the_shapes_that_others_write() {
    let tokenizer = tokenizer(json!({}));
    let part = |text: &str, weight: f64| json!({"role": "assistant", "content": [{"type": "text", "value": text}], "loss_weight": weight});
    let parts = json!({"messages": [exchange("a", "b")[0], part("c", 0.0), part("d", 1.0)]});
    assert_eq!(trained(&tokenizer, parts).unwrap(), "d<|im_end|>");
    let columns = json!({"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}});
    let rows = json!({"messages": exchange("a", "b")});
    assert_eq!(encode(&tokenizer, &columns), encode(&tokenizer, &rows));
    let uneven = json!({"messages": {"role": ["user", "assistant"], "content": ["a"]}});
    let is_object = "field `messages` is an object, expected a list";
    assert_eq!(encode(&tokenizer, &uneven).unwrap_err(), is_object);
    let image = json!({"role": "user", "content": [{"type": "image", "url": "x"}]});
    let reason = "messages[0].content has a part of type `image`";
    assert_eq!(encode(&tokenizer, &json!({"messages": [image]})).unwrap_err(), reason);
}

/// Qwen3's template puts the text before the calls, whatever it is.
#[test]
fn a_call_without_text_has_an_empty_one_where_the_template_needs_it() {
    let template = |said: &str| {
        let source = format!(
            "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' + {said} }}}}\
             {{% for c in m.tool_calls or [] %}}<call>{{{{ c.function.arguments.x }}}}{{% endfor %}}\
             <|im_end|>\n{{% endfor %}}\
             {{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
        );
        tokenizer(json!({"chat_template": source}))
    };
    let call = json!({"function": {"name": "f", "arguments": "{\"x\": 5}"}});
    let silent = |content: &[(&str, Value)]| {
        let mut message = json!({"role": "assistant", "tool_calls": [call]});
        content.iter().for_each(|(key, value)| message[*key] = value.clone());
        json!({"messages": [exchange("a", "")[0], message]})
    };
    for said in ["m.content", "(m.content or '')"] {
        let tokenizer = template(said);
        for record in [silent(&[]), silent(&[("content", Value::Null)])] {
            assert_eq!(trained(&tokenizer, record).unwrap(), "<call>5<|im_end|>", "{said}");
        }
    }
    let given = template("(m.content if m.content is defined else 'none')");
    assert_eq!(trained(&given, silent(&[])).unwrap(), "none<call>5<|im_end|>", "as it was first");
}

/// Dropped without a word, the model would learn answers to something that it never saw.
#[test]
fn a_field_of_another_type_is_refused() {
    let tokenizer = tokenizer(json!({}));
    let with = |record: Value, key: &str, value: Value| {
        let mut record = record;
        record[key] = value;
        encode(&tokenizer, &record)
    };
    let alpaca = json!({"instruction": "a", "output": "b"});
    let openai = json!({"messages": exchange("a", "b")});
    let sharegpt = json!({"conversations": exchange("a", "b")});
    let pair = json!({"prompt": "a", "completion": "b"});
    for (record, key, value, reason) in [
        (&alpaca, "input", json!(5), "field `input` is a number, expected text"),
        (&alpaca, "input", json!(["x"]), "field `input` is a list, expected text"),
        (&alpaca, "system", json!(["s"]), "field `system` is a list, expected text"),
        (&alpaca, "history", json!("q"), "field `history` is text, expected a list"),
        (&alpaca, "history", json!({"q": "x"}), "field `history` is an object, expected a list"),
        (&alpaca, "tools", json!([{"name": "f"}]), "the chat template leaves field `tools` out"),
        (&openai, "system", json!(1), "field `system` is a number, expected text"),
        (&sharegpt, "system", json!(["s"]), "field `system` is a list, expected text"),
        (&openai, "functions", json!(1), "field `functions` is a number, expected a list"),
        (&pair, "system", json!("s"), "field `system` has no place beside a `prompt` that is text"),
        (
            &pair,
            "label",
            json!(false),
            "field `label` is true or false: whether the answer is a good one",
        ),
        (&pair, "tools", json!([1]), "field `tools` has no place beside a `prompt` that is text"),
    ] {
        assert_eq!(with(record.clone(), key, value).unwrap_err(), reason);
    }
    for key in ["input", "system", "history", "tools", "functions"] {
        for record in [&alpaca, &openai, &sharegpt, &pair] {
            let nothing = [Value::Null, json!("")];
            let no_tools = (key == "tools").then(|| json!("[]"));
            for nothing in nothing.into_iter().chain(no_tools) {
                let plain = encode(&tokenizer, record).unwrap();
                assert_eq!(with(record.clone(), key, nothing).unwrap(), plain, "{key}");
            }
        }
    }
}

#[test]
fn templates_see_the_records_own_variables() {
    let source = "{{ mood }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    let tokenizer = tokenizer(json!({"chat_template": source}));
    let record = json!({"messages": exchange("a", "b"), "chat_template_kwargs": {"mood": "calm"}});
    assert_eq!(text(&tokenizer, record), "calm<user>a<assistant>b<|im_end|>");
}

#[test]
fn turns_end_in_the_templates_own_token() {
    // A base model's tokenizer: the end of text is another token than the end of a turn.
    let tokenizer = tokenizer(json!({"eos_token": "<|endoftext|>"}));
    assert_eq!(tokenizer.eos_ids(), [0, 2], "generation stops at <|im_end|> too");
    let messages = [exchange("a", "b"), exchange("c", "d")].concat();
    let record = json!({"messages": messages});
    assert_eq!(trained(&tokenizer, record).unwrap(), "b<|im_end|>d<|im_end|>");
    assert_eq!(trained(&tokenizer, json!({"text": "a"})).unwrap(), "a<|endoftext|>");
}

#[test]
fn instructions_are_alpacas_text_without_a_chat_template() {
    let tokenizer = tokenizer(json!({"chat_template": null}));
    let record = json!({"instruction": "Add.", "input": "1 and 2", "output": "3"});
    assert_eq!(trained(&tokenizer, record.clone()).unwrap(), "3<|im_end|>");
    let text = text(&tokenizer, record);
    assert!(text.ends_with("### Input:\n1 and 2\n\n### Response:\n3<|im_end|>"), "{text:?}");
    let chat = json!({"messages": exchange("a", "b")});
    assert_eq!(encode(&tokenizer, &chat).unwrap_err(), "the tokenizer has no chat template");
}

#[test]
fn a_second_bos_is_noticed_and_none_is_added() {
    let tokenizer = tokenizer(json!({"add_bos_token": true}));
    let encoder = Encoder::new(&tokenizer, VOCAB, TrainOn::Assistant).unwrap();
    let encode = |record: Value| {
        encoder.encode(&parse(&record, Format::detect(&record).unwrap()).unwrap()).unwrap()
    };
    let plain = encode(json!({"text": "a"}));
    assert_eq!((plain.document.input_ids[0], plain.double_bos), (1, false));
    assert_eq!(encode(json!({"text": "<|im_start|>a"})).document, plain.document);
    assert!(encode(json!({"text": "<|im_start|><|im_start|>a"})).double_bos);
    assert!(encode(json!({"input_ids": [1, 1, 5]})).double_bos);
}

/// As data sets are published that are neither OpenAI's nor ShareGPT's.
#[test]
fn conversations_of_other_shapes() {
    let tokenizer = tokenizer(json!({}));
    let messages = [exchange("a", "b"), exchange("c", "d")].concat();
    let expected = text(&tokenizer, json!({"messages": messages}));
    for (format, record) in [
        (Format::Sharegpt, json!({"conversations": ["a", "b", "c", "d"]})),
        (
            Format::Messages,
            json!({"messages": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}),
        ),
        (
            Format::Messages,
            json!({"messages": [
                {"role": "human", "content": "a"}, {"role": "gpt", "content": "b"},
                {"role": "user", "value": "c"}, {"role": "model", "value": "d"},
            ]}),
        ),
        (
            Format::Prompt,
            json!({"prompt": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ], "completion": "d"}),
        ),
        (Format::Sharegpt, json!({"conversations": ["a", "b", "c", "d"], "tools": "null"})),
    ] {
        assert_eq!(Format::detect(&record).unwrap(), format);
        assert_eq!(text(&tokenizer, record.clone()), expected, "{record}");
        let says = if format == Format::Prompt { "d<|im_end|>" } else { "b<|im_end|>d<|im_end|>" };
        assert_eq!(trained(&tokenizer, record.clone()).unwrap(), says, "{record}");
    }
}

/// What would do is typed out, for data sets as they are published.
#[test]
fn names_of_other_data_sets_have_their_flags() {
    for (fields, flags) in [
        ("question answer", "question=instruction answer=output"),
        ("instruction context response category", "response=output context=input"),
        (
            "id system_prompt question response",
            "question=instruction response=output system_prompt=system",
        ),
        ("type query original_question response", "query=instruction response=output"),
        ("instruction input response", "response=output"),
        ("input output", "input=instruction"),
        ("problem solution", "problem=instruction solution=output"),
        ("prompt response", "prompt=instruction response=output"),
        ("Instruction Output", "Instruction=instruction Output=output"),
    ] {
        let record: Value = fields.split(' ').map(|name| (name, Value::from("a"))).collect();
        let hint = Format::detect(&record).unwrap_err().hint.unwrap();
        let expected: Vec<String> =
            flags.split(' ').map(|pair| format!("--rename-columns {pair}")).collect();
        assert!(hint.ends_with(&format!("`{}`", expected.join(" "))), "{fields}: {hint}");
    }
    // Nobody can tell these.
    for fields in ["question answer response", "title body", "answers"] {
        let record: Value = fields.split(' ').map(|name| (name, Value::from("a"))).collect();
        let hint = Format::detect(&record).unwrap_err().hint.unwrap();
        assert!(hint.contains("`--rename-columns OLD=NEW`"), "{fields}: {hint}");
    }
    let says = |record: Value| Format::detect(&record).unwrap_err();
    assert!(says(json!({"a;b": "1;2"})).hint.unwrap().contains("`;`"));
    assert_eq!(says(json!({"t\0e\0": "1"})).reason, "the file is UTF-16 text");
}

#[test]
fn what_no_format_fits_is_explained() {
    for (record, reason, hint) in [
        (
            json!({"text": "a", "messages": []}),
            "fit several formats",
            "`--format text` or `--format messages`",
        ),
        (
            json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
            "cannot tell",
            "these are preferences",
        ),
        (json!({"title": "a", "body": "b"}), "[\"title\", \"body\"]", "expected text, prompt"),
        (json!([1]), "record is a list, expected an object", ""),
    ] {
        let rejection = Format::detect(&record).unwrap_err();
        assert!(rejection.reason.contains(reason), "{rejection:?}");
        assert!(rejection.hint.unwrap_or_default().contains(hint));
    }
}

#[test]
fn keys_of_the_wrong_type_are_named() {
    let tokenizer = tokenizer(json!({}));
    for (record, reason) in [
        (json!({"text": 5}), "field `text` is a number, expected text"),
        (json!({"prompt": null, "completion": "b"}), "field `prompt` is null, expected text"),
        (json!({"prompt": "a", "completion": 5}), "field `completion` is a number, expected text"),
        (json!({"instruction": null, "output": "b"}), "field `instruction` is null, expected text"),
        (json!({"messages": {}, "id": 3}), "field `messages` is an object, expected a list"),
        (json!({"messages": "a"}), "field `messages` is text, expected a list"),
        (json!({"input_ids": null}), "field `input_ids` is null, expected a list"),
    ] {
        assert_eq!(encode(&tokenizer, &record).unwrap_err(), reason);
    }
    let columns = json!({"text": null, "messages": exchange("a", "b")});
    assert_eq!(Format::detect(&columns).unwrap(), Format::Messages, "an empty column is no key");
}

/// `tokenizer(…, padding="max_length")` writes such rows.
#[test]
fn padding_of_ready_tokens_goes() {
    let tokenizer = tokenizer(json!({}));
    let padded = json!({
        "input_ids": [0, 0, 4, 5, 6, 0], "labels": [-100, -100, -100, 5, 6, -100],
        "attention_mask": [0, 0, 1, 1, 1, 0],
    });
    let document = encode(&tokenizer, &padded).unwrap();
    assert_eq!((document.input_ids, document.labels), (vec![4, 5, 6], vec![-100, 5, 6]));
    for (mask, reason) in [
        (json!([1, 1]), "2 attention_masks for 3 input_ids"),
        (json!([1, "1", 0]), "`attention_mask` holds something else than numbers"),
    ] {
        let record = json!({"input_ids": [4, 5, 6], "attention_mask": mask});
        assert_eq!(encode(&tokenizer, &record).unwrap_err(), reason);
    }
    for (mask, ids) in [
        (Value::Null, vec![4, 5, 6]),
        (json!([true, true, false]), vec![4, 5]),
        (json!([1, 2, 0]), vec![4, 5]),
    ] {
        let record = json!({"input_ids": [4, 5, 6], "attention_mask": mask});
        assert_eq!(encode(&tokenizer, &record).unwrap().input_ids, ids);
    }
}

/// TRL's and Megatron's columns.
#[test]
fn masks_beside_ready_tokens_mask() {
    let tokenizer = tokenizer(json!({}));
    let with = |fields: Value| {
        let mut record = json!({"input_ids": [4, 5, 6, 7]});
        record.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        encode(&tokenizer, &record)
    };
    for mask in ["completion_mask", "assistant_masks", "loss_mask"] {
        for ones in
            [json!([0, 1, 0, 1]), json!([0.0, 1.0, 0.0, 1.0]), json!([false, true, false, true])]
        {
            assert_eq!(with(json!({mask: ones})).unwrap().labels, [-100, 5, -100, 7]);
        }
        let labels = with(json!({mask: [0, 1, 0, 1], "labels": [4, -100, 6, 7]})).unwrap().labels;
        assert_eq!(labels, [-100, -100, -100, 7]);
        let short = with(json!({mask: [0, 1]})).unwrap_err();
        assert_eq!(
            short,
            format!("2 {mask} for 4 input_ids")
                .replace("2 loss_mask ", "2 loss_masks ")
                .replace("2 completion_mask ", "2 completion_masks ")
        );
    }
    let padded = json!({"completion_mask": [1, 0, 1, 1], "attention_mask": [0, 1, 1, 1]});
    assert_eq!(with(padded).unwrap().labels, [-100, 6, 7]);
    let counted =
        json!({"position_ids": [1, 0, 1, 2], "attention_mask": [0, 1, 1, 1], "seq_lengths": [4]});
    assert_eq!(with(counted).unwrap().input_ids, [5, 6, 7]);
    for packed in [json!({"position_ids": [0, 1, 0, 1]}), json!({"seq_lengths": [2, 2]})] {
        assert_eq!(with(packed).unwrap_err(), "several documents are packed into one record");
    }
    let outside = with(json!({"labels": [4, 5, 6, 49152]})).unwrap_err();
    assert_eq!(outside, "label 49152 is outside the vocabulary of 49152");
}

#[test]
fn turns_that_cannot_be_read_are_named() {
    let tokenizer = tokenizer(json!({}));
    for (record, reason) in [
        (json!({"messages": [1]}), "messages[0] is a number, expected an object"),
        (json!({"messages": [{"role": "user"}]}), "messages[0] has no content and no tool_calls"),
        (json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content is a number"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content has a part of type `image_url`",
        ),
        (json!({"conversations": [{"from": "narrator", "value": ""}]}), ".from is `narrator`"),
        (json!({"conversations": [{"from": "gpt", "value": null}]}), ".value is null"),
        (
            json!({"conversations": [{"from": "function_call", "value": "x"}]}),
            "conversations[0].value is a function_call, but no JSON",
        ),
        (json!({"messages": exchange("a", "b"), "tools": {}}), "`tools` is an object"),
        (json!({"messages": exchange("a", "b"), "tools": "x"}), "`tools` is text, but no JSON"),
    ] {
        let got = encode(&tokenizer, &record).unwrap_err();
        assert!(got.contains(reason), "{got:?}, expected {reason:?}");
    }
}
