//! Several adapters, evaluated side by side.

use std::fs;
use std::process::Output;

use serde_json::{Value, json};

use super::scene::{adapter, add_template, ids, stdout, write_rows};
use crate::training::{Workplace, error_of, fail, stderr, succeed};

const EVAL: [&str; 7] =
    ["eval", "--model", "model", "--quantization", "none", "--data", "rows.jsonl"];

fn eval(place: &Workplace, flags: &[&str]) -> Output {
    succeed(place.nibble(&[&EVAL[..], flags].concat()))
}

fn figures(place: &Workplace, flags: &[&str]) -> Value {
    serde_json::from_slice(&eval(place, &[flags, &["--json"]].concat()).stdout).unwrap()
}

/// The usage error of a command that reads no weights.
fn refused(place: &Workplace, flags: &[&str]) -> String {
    let (code, text) = fail(place.nibble(&[&EVAL[..], flags].concat()));
    assert_eq!(code, 2, "{text}");
    error_of(&text).to_string()
}

#[test]
fn each_has_the_figures_that_it_has_alone() {
    let place = Workplace::new();
    write_rows(&place, "rows.jsonl", &[ids("w5 w6 w7 w8 w9"), ids("w30 w31 w32")]);
    // The second one is merged into the weights, which are read again before and after it.
    let folders = ["llama_s0.plain", "llama_s0.dora", "llama_s0.rslora"].map(adapter);
    let alone = folders.each_ref().map(|folder| figures(&place, &["--adapter", folder]));
    let [plain, dora, rslora] = &folders;
    let (dora, rslora) = (format!("second={dora}"), format!("third={rslora}"));
    for order in [[plain, &dora, &rslora], [&dora, &rslora, plain]] {
        let flags = order.map(|folder| ["--adapter", folder]).concat();
        let got = figures(&place, &flags);
        assert_eq!(got["base"], alone[0]["base"], "{got}");
        assert!(got["adapter"].is_null(), "{got}");
        for (name, alone) in ["llama_s0.plain", "second", "third"].iter().zip(&alone) {
            assert_eq!(got["adapters"][name], alone["adapter"], "{name}: {got}");
            assert_ne!(got["adapters"][name], got["base"], "{name}");
        }
        let output = eval(&place, &flags);
        assert!(!stderr(&output).contains("are not shown"), "{}", stderr(&output));
        let names: Vec<String> = stdout(&output)
            .lines()
            .filter_map(|line| line.contains(" of 2").then(|| line.split(' ').next()).flatten())
            .map(String::from)
            .collect();
        let name = |folder: &&String| match folder.split_once('=') {
            Some((name, _)) => name.to_string(),
            None => "llama_s0.plain".to_string(),
        };
        let expected: Vec<String> =
            ["base".to_string()].into_iter().chain(order.iter().map(name)).collect();
        assert_eq!(names, expected);
    }
    let only_merged = ["--adapter", &dora, "--adapter", &format!("again={}", folders[1])];
    let output = eval(&place, &only_merged);
    assert!(stderr(&output).contains("figures of the base alone are not shown"));
    assert!(!stdout(&output).contains("base"), "{}", stdout(&output));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let place = Workplace::new();
    write_rows(&place, "rows.jsonl", &[ids("w5 w6 w7")]);
    let plain = adapter("llama_s0.plain");
    let two = |second: &str| refused(&place, &["--adapter", &plain, "--adapter", second]);
    let error = two(&plain);
    assert!(error.contains("two adapters are called `llama_s0.plain`"), "{error}");
    let error = two(&format!("base={plain}"));
    assert!(error.contains("called `base`, as is the model without one\nhint: "), "{error}");
    let other = format!("b={}", adapter("llama_s0.rslora"));
    for flag in ["--predictions", "--save-logits"] {
        let error = refused(&place, &["--adapter", &plain, "--adapter", &other, flag, "out"]);
        let expected = format!("`{flag}` takes one `--adapter`, not 2\nhint: ");
        assert!(error.contains(&expected), "{error}");
    }
    // One that fits another model is found before the first one is measured.
    let output = place
        .nibble(
            &[&EVAL[..], &["--adapter", &plain, "--adapter", &adapter("gpt2_s0.plain")]].concat(),
        )
        .output()
        .unwrap();
    assert!(!output.status.success() && output.stdout.is_empty(), "{}", stdout(&output));
    assert!(stderr(&output).contains("gpt2_s0.plain"), "{}", stderr(&output));
}

/// Figures of other tokens would look as if they could be compared.
#[test]
fn adapters_that_read_other_tokens_are_not_put_side_by_side() {
    let place = Workplace::new();
    add_template(&place);
    let chat = json!({"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]});
    fs::write(place.path("rows.jsonl"), chat.to_string()).unwrap();
    let copy = |name: &str, template: Option<&str>| {
        let folder = place.path(name);
        fs::create_dir(&folder).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(format!("{}/{file}", adapter("llama_s0.plain")), folder.join(file)).unwrap();
        }
        if let Some(template) = template {
            fs::write(folder.join("chat_template.jinja"), template).unwrap();
        }
    };
    let other = "{% for m in messages %}{% if m.role == 'user' %}w90 {{ m.content }} w93 \
                 {% else %}{{ m.content }} w94 {% endif %}{% endfor %}";
    copy("plain", None);
    copy("other", Some(other));
    // Written in another way, it reads the same.
    copy("like", Some(&format!("{{#- like the model's -#}}{}", other.replace("w90", "w92"))));
    let error = refused(&place, &["--adapter", "plain", "--adapter", "other"]);
    assert!(
        error.contains("rows.jsonl: adapter `other` reads other tokens than `plain`"),
        "{error}"
    );
    assert!(
        error.contains("\nhint: give it a command of its own, or `--chat-template`"),
        "{error}"
    );
    let got = figures(&place, &["--adapter", "plain", "--adapter", "like"]);
    assert_eq!(got["adapters"]["plain"], got["adapters"]["like"]);
    fs::write(place.path("all.jinja"), other).unwrap();
    let all = ["--adapter", "plain", "--adapter", "other", "--chat-template", "all.jinja"];
    assert_eq!(figures(&place, &all)["documents"], 1);
}
