//! Conversations, with adapters that are swapped while they last.

use super::scene::{adapter, add_template, chat, generate};
use crate::training::Workplace;

fn raw(place: &Workplace, prompt: &str, adapter: Option<&str>) -> String {
    let adapter: Vec<&str> = adapter.into_iter().flat_map(|folder| ["--adapter", folder]).collect();
    let flags = ["--raw", "--prompt", prompt, "--max-new-tokens", "6"];
    let mut command = place.nibble(&["generate", "--model", "model", "--quantization", "none"]);
    command.args(flags).args(adapter);
    super::scene::stdout(&crate::training::succeed(command))
}

#[test]
fn adapters_are_swapped_between_answers() {
    let place = Workplace::new();
    add_template(&place);
    let (plain, rslora) = (adapter("llama_s0.plain"), adapter("llama_s0.rslora"));
    let named = [format!("one={plain}"), format!("two={rslora}")];
    let flags = ["--adapter", &named[0], "--adapter", &named[1]];
    let swap_to_folder = format!("/adapter {plain}");
    let lines = [
        "w5 w6",
        "/adapter two",
        "/reset",
        "w5 w6",
        "/base",
        "/reset",
        "w5 w6",
        &swap_to_folder,
        "/reset",
        "w5 w6",
        "/adapter two",
        "/reset",
        "w5 w6",
    ];
    let (answers, said) = chat(&place, &flags, &lines);
    let prompt = "w92 w5 w6 w93";
    let [one, two, base] = [Some(&plain[..]), Some(&rslora), None].map(|a| raw(&place, prompt, a));
    assert!(one != two && two != base && one != base);
    assert_eq!(answers, [&one[..], &two, &base, &one, &two]);
    for who in ["adapter one; /help", "\nadapter two\n", "\nbase model\n", "adapter llama_s0.plain"]
    {
        assert!(said.contains(who), "{who} in {said}");
    }
}

/// What was not said is not remembered either.
#[test]
fn a_stop_string_ends_an_answer_in_the_conversation() {
    let place = Workplace::new();
    add_template(&place);
    let (answers, _) = chat(&place, &[], &["w5 w6"]);
    let stop = format!(" {}", answers[0].split(' ').nth(2).unwrap());
    let first = &answers[0][..answers[0].find(&stop).unwrap()];
    let (answers, _) = chat(&place, &["--stop-strings", &stop], &["w5 w6", "w9"]);
    let second = raw(&place, &format!("w92 w5 w6 w93 {first} w94 w92 w9 w93"), None);
    assert_eq!(answers[0], first);
    assert_eq!(answers[1], second[..second.find(&stop).unwrap_or(second.len())]);
}

/// DoRA and trained embeddings are merged into the weights; what follows has the base's again.
#[test]
fn adapters_that_must_be_merged_leave_nothing_behind() {
    let place = Workplace::new();
    add_template(&place);
    let [plain, dora, saved] =
        ["plain", "dora", "modules_to_save"].map(|kind| adapter(&format!("llama_s0.{kind}")));
    let commands = [&plain, &saved, &dora].map(|folder| format!("/adapter {folder}"));
    let lines = [
        "w5 w6",
        "/reset",
        "/base",
        "w5 w6",
        "/reset",
        &commands[0],
        "w5 w6",
        "/reset",
        &commands[1],
        "w5 w6",
        "/reset",
        &commands[2],
        "w5 w6",
        "/reset",
        &commands[0],
        "w5 w6",
    ];
    let (answers, said) = chat(&place, &["--adapter", &dora], &lines);
    let of = |adapter: Option<&str>| raw(&place, "w92 w5 w6 w93", adapter);
    let (base, plain, dora, saved) =
        (of(None), of(Some(&plain)), of(Some(&dora)), of(Some(&saved)));
    assert!(base != dora && base != saved && dora != saved);
    assert_eq!(
        answers,
        [&dora, &base, &plain, &saved, &dora, &plain].map(String::as_str),
        "{said}"
    );
}

#[test]
fn a_conversation_is_remembered_until_it_is_reset() {
    let place = Workplace::new();
    add_template(&place);
    let lines = ["w5 w6", "w9", "/reset", "w9", "/system w41", "w9"];
    let (answers, _) = chat(&place, &["--system", "w40"], &lines);
    let system = "w90 w40 w91";
    let first = raw(&place, &format!("{system} w92 w5 w6 w93"), None);
    assert_eq!(answers[0], first);
    let history = format!("{system} w92 w5 w6 w93 {first} w94 w92 w9 w93");
    assert_eq!(answers[1], raw(&place, &history, None));
    assert_eq!(answers[2], raw(&place, &format!("{system} w92 w9 w93"), None));
    assert_eq!(answers[3], raw(&place, "w90 w41 w91 w92 w9 w93", None));
    assert_eq!(answers.len(), 4);
}

#[test]
fn a_mistake_does_not_end_the_conversation() {
    let place = Workplace::new();
    add_template(&place);
    let plain = format!("one={}", adapter("llama_s0.plain"));
    let foreign = format!("/adapter {}", adapter("qwen2_s0.bias_all"));
    let long = "w5 ".repeat(70);
    let lines = [
        "/adaptr one",
        "/adapter onne",
        &foreign,
        "/adapter model",
        &long,
        "w5 ? w6",
        "w5 w6",
        "/adapter",
    ];
    let (answers, said) = chat(&place, &["--adapter", &plain, "--context-length", "64"], &lines);
    let prompt = "w92 w5 w6 w93";
    assert_eq!(answers, [raw(&place, prompt, Some(&adapter("llama_s0.plain")))]);
    for message in [
        "error: unknown command `/adaptr`\nhint: did you mean `/adapter`?",
        "error: no adapter or folder is called `onne`\nhint: did you mean `one`?",
        "the context 64\nhint: raise `--context-length`",
        "error: this line is not UTF-8, and was not read",
        "* one  ",
    ] {
        assert!(said.contains(message), "{message} in {said}");
    }
    assert_eq!(said.matches("error: ").count(), 6, "{said}");
    let list = said.rsplit("(base model)").next().unwrap();
    assert!(!list.contains("bias_all"), "what could not be loaded is not known: {list}");
}

#[test]
fn a_conversation_that_outgrows_the_context_can_be_forgotten() {
    let place = Workplace::new();
    add_template(&place);
    let long = "w5 ".repeat(40);
    let lines = [&long[..], &long, &long, "/reset", &long];
    let (answers, said) = chat(&place, &["--context-length", "64"], &lines);
    assert_eq!(answers.len(), 2, "{said}");
    assert_eq!(answers[0], answers[1]);
    assert_eq!(said.matches("error: the prompt has ").count(), 2, "{said}");
    assert_eq!(said.matches("\nhint: `/reset` forgets the conversation").count(), 2, "{said}");
}

#[test]
fn a_folder_is_known_once_and_a_name_means_one_folder() {
    let place = Workplace::new();
    add_template(&place);
    let [plain, other] = ["plain", "rslora"].map(|kind| adapter(&format!("llama_s0.{kind}")));
    let named = |name: &str, folder: &str| format!("/adapter {name}={folder}");
    let lines = [
        &format!("/adapter {plain}"),
        &format!("/adapter {plain}"),
        &named("llama_s0.plain", &other),
        &named("two", &other),
        "/adapter",
    ];
    let (_, said) = chat(&place, &[], &lines);
    let error = "error: an adapter is called `llama_s0.plain` already: ";
    assert_eq!(said.matches(error).count(), 1, "{said}");
    assert!(
        said.contains(&format!("hint: give this one a name: `/adapter NAME={other}`")),
        "{said}"
    );
    assert!(said.contains("\nadapter two\n"), "{said}");
    assert_eq!(said.matches(&format!("  {plain}\n")).count(), 1, "{said}");
}

#[test]
#[cfg(target_os = "linux")]
fn answers_that_cannot_be_written_end_the_conversation() {
    let place = Workplace::new();
    add_template(&place);
    std::fs::write(place.path("lines"), "w5 w6\nw5 w6\n").unwrap();
    let mut command = place.nibble(&["chat", "--model", "model", "--quantization", "none"]);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    command.stdin(std::fs::File::open(place.path("lines")).unwrap()).stdout(full);
    let (code, text) = crate::training::fail(command);
    assert_eq!((code, text.matches("error: cannot write to standard output").count()), (1, 1));
}

#[test]
fn a_model_without_a_template_is_refused_before_the_first_question() {
    let place = Workplace::new();
    let (code, text) = crate::training::fail(place.nibble(&["chat", "--model", "model"]));
    assert_eq!(code, 1);
    assert!(text.contains("hint: choose one with `--chat-template`"), "{text}");
    assert_eq!(generate(&place, &["--raw", "--prompt", "w5"]).split(' ').count(), 8);
}
