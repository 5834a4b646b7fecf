//! Records of no known format: what their fields may be meant as, by names and by what they hold.

use serde_json::Value;

use super::chat::{Chat, has_messages, says_who, usual_role};
use super::rejection::Rejection;

/// What others call an instruction, and what should follow it.
const INSTRUCTIONS: [&str; 9] = [
    "instruction",
    "question",
    "query",
    "problem",
    "prompt",
    "user",
    "inputs",
    "dialogue",
    "input",
];
const OUTPUTS: [&str; 10] = [
    "output",
    "response",
    "answer",
    "completion",
    "solution",
    "target",
    "targets",
    "assistant",
    "answers",
    "summary",
];
/// What they call fields beside these, and lists of messages.
const BESIDE: [(&str, &str); 2] = [("context", "input"), ("system_prompt", "system")];
const LISTS: [&str; 2] = ["conversation", "dialog"];

/// Says that the format of `record` cannot be told, and what may be done about it.
pub(super) fn unknown(record: &Value) -> Rejection {
    let names = names(record);
    let what = format!("cannot tell the format of a record with the fields {}", listed(&names));
    if names.iter().any(|name| name.contains('\0')) {
        return Rejection::new("the file is UTF-16 text").hint("save it as UTF-8");
    }
    if let [one] = names[..]
        && one.contains(';')
    {
        return Rejection::new(what)
            .hint("columns are set apart by `;` here: save the file with commas");
    }
    if names.contains(&"chosen") && names.contains(&"rejected") {
        return Rejection { reason: what, ..preferences(record) };
    }
    let rejection = Rejection::new(what);
    let flags = flags(&renames(record, &names));
    if !flags.is_empty() {
        return rejection.hint(format!("if they are what they are called: `{flags}`"));
    }
    match records_within(record) {
        Some(list) => rejection.hint(format!(
            "if the records are in its list `{list}`, write them to a file of their own, such as by \
             `jq -c '.{list}[]'`"
        )),
        None => rejection.hint(
            "expected text, prompt and completion, instruction and output, conversations, messages, \
             or input_ids: other names are told with `--rename-columns OLD=NEW`",
        ),
    }
}

/// Says that `record` holds a better and a worse answer, and how the better one can be trained.
pub(super) fn preferences(record: &Value) -> Rejection {
    let names = names(record);
    let keep = "these are preferences; for supervised training keep the `chosen` side";
    let what = format!("the record has the fields {}", listed(&names));
    Rejection::new(what).hint(match chosen(record, &names) {
        Some(pairs) => format!("{keep}: `{}`", flags(&pairs)),
        None => keep.to_string(),
    })
}

fn names(record: &Value) -> Vec<&str> {
    record.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect()
}

/// The one field of a file's only object whose value is a list of objects that are no messages: its records.
fn records_within(record: &Value) -> Option<&String> {
    let is_records = |(_, value): &(&String, &Value)| {
        let items = value.as_array().filter(|items| !items.is_empty());
        items.is_some_and(|items| items.iter().all(|item| item.is_object() && !says_who(item)))
    };
    let mut lists = record.as_object()?.iter().filter(is_records);
    lists.next().filter(|_| lists.next().is_none()).map(|(name, _)| name)
}

/// The fields of a record, the first few.
fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 20;
    let more = names.len().saturating_sub(SHOWN);
    let shown = &names[..names.len() - more];
    if more > 0 { format!("{shown:?} and {more} more") } else { format!("{shown:?}") }
}

/// What a field is called, and what it would be read as.
type Rename<'a> = (&'a str, &'static str);

fn flags(renames: &[Rename]) -> String {
    let flag = |(theirs, ours): &Rename| match theirs.contains(' ') {
        true => format!("--rename-columns '{theirs}={ours}'"),
        false => format!("--rename-columns {theirs}={ours}"),
    };
    let renamed = renames.iter().filter(|(theirs, ours)| theirs != ours);
    renamed.map(flag).collect::<Vec<_>>().join(" ")
}

/// The preferred side of a pair, as what it can be read: a conversation, or an answer to what is asked
/// beside it.
fn chosen<'a>(record: &Value, names: &[&'a str]) -> Option<Vec<Rename<'a>>> {
    let (prompt, chosen) = (&record["prompt"], &record["chosen"]);
    // The conversation that the answers go on from, in LLaMA-Factory's way.
    let asks = |name: &&&str| {
        let last = record[**name].as_array().and_then(|turns| turns.last());
        last.is_some_and(|turn| says_who(turn) && !is_answer(turn))
    };
    if (says_who(chosen) || chosen.is_string())
        && let Some(asked) = ["conversations", "messages"].iter().find(asks)
    {
        return Some(vec![(asked, "prompt"), ("chosen", "completion")]);
    }
    if has_messages(chosen) {
        let readable = Chat::new(record, "chosen").is_ok();
        let goes_on = has_messages(prompt);
        return readable.then(|| vec![("chosen", if goes_on { "completion" } else { "messages" })]);
    }
    chosen.as_str()?;
    if has_messages(prompt) || prompt.is_string() {
        return Some(vec![("chosen", "completion")]);
    }
    let asked = asked(&texts(record, names));
    Some(asked.map_or(vec![("chosen", "text")], |asked| {
        vec![(asked, "instruction"), ("chosen", "output")]
    }))
}

/// What gives the fields of a record the names of a format: those of Alpaca, which goes through the chat
/// template, where one field is an instruction and one an output by its name, else that of a conversation.
fn renames<'a>(record: &Value, names: &[&'a str]) -> Vec<Rename<'a>> {
    let texts = texts(record, names);
    if let (Some(asked), [answer]) = (asked(&texts), &called(&texts, &OUTPUTS)[..]) {
        let mut pairs = vec![(asked, "instruction"), (*answer, "output")];
        for (theirs, ours) in BESIDE {
            let known = called(&texts, &[theirs]).into_iter().filter(|_| !names.contains(&ours));
            pairs.extend(known.map(|name| (name, ours)));
        }
        return pairs;
    }
    let is_conversation =
        |name: &&&str| has_messages(&record[**name]) && Chat::new(record, name).is_ok();
    let lists = called(names, &LISTS);
    lists.iter().find(is_conversation).map(|name| (*name, "messages")).into_iter().collect()
}

/// Whether the assistant says a message.
fn is_answer(turn: &Value) -> bool {
    let who = turn["role"].as_str().or_else(|| turn["from"].as_str());
    who.and_then(usual_role).is_some_and(|role| role == "assistant")
}

/// The members of `names` that are in `known`, but for white space and capitals.
fn called<'a>(names: &[&'a str], known: &[&str]) -> Vec<&'a str> {
    let is_known = |name: &&str| known.contains(&name.trim().to_lowercase().as_str());
    names.iter().copied().filter(is_known).collect()
}

/// Fields that hold text, or nothing in this record.
fn texts<'a>(record: &Value, names: &[&'a str]) -> Vec<&'a str> {
    let is_text = |name: &&str| record[*name].is_string() || record[*name].is_null();
    names.iter().copied().filter(is_text).collect()
}

/// The one field that is an instruction; beside another one `input` is what it says.
fn asked<'a>(texts: &[&'a str]) -> Option<&'a str> {
    let is_input = |name: &str| name.trim().eq_ignore_ascii_case("input");
    match called(texts, &INSTRUCTIONS)[..] {
        [one] => Some(one),
        [one, other] | [other, one] if is_input(other) && !is_input(one) => Some(one),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::format::Format;
    use super::super::record::parse;
    use super::*;

    /// The flags of the hint, without words around them.
    fn hinted(record: &Value) -> String {
        let hint = Format::detect(record).unwrap_err().hint.unwrap();
        let flags = hint.split('`').rfind(|part| part.starts_with("--rename-columns "));
        let flags = flags.filter(|flags| !flags.contains("OLD")).unwrap_or_default();
        flags.replace("--rename-columns ", "")
    }

    #[test]
    fn records_within_a_record_are_pointed_to() {
        let hint = |record: &Value| Format::detect(record).unwrap_err().hint.unwrap();
        let wrapped = json!({"version": 1, "data": [{"instruction": "a", "output": "b"}]});
        assert!(hint(&wrapped).contains("`jq -c '.data[]'`"), "{}", hint(&wrapped));
        let two = json!({"train": [{"text": "a"}], "test": [{"text": "b"}]});
        let said = json!({"turns": [{"role": "user", "content": "a"}]});
        for record in [two, said, json!({"data": ["a"]}), json!({"data": []})] {
            assert!(!hint(&record).contains("jq"), "{record}");
        }
    }

    #[test]
    fn hints_are_what_the_record_can_be_read_by() {
        let said = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        let question = json!([{"role": "user", "content": "a"}]);
        let answer = json!([{"role": "assistant", "content": "b"}]);
        for (record, expected) in [
            (json!({"chosen": "a", "rejected": "b"}), "chosen=text"),
            (json!({"prompt": "a", "chosen": "a", "rejected": "b"}), "chosen=completion"),
            (
                json!({"question": "a", "chosen": "a", "rejected": "b"}),
                "question=instruction chosen=output",
            ),
            (json!({"prompt": "a", "chosen": said, "rejected": said}), "chosen=messages"),
            (json!({"chosen": said, "rejected": said}), "chosen=messages"),
            (json!({"prompt": question, "chosen": answer, "rejected": []}), "chosen=completion"),
            (json!({"chosen": [1, 2], "rejected": []}), ""),
            (json!({"chosen": 1, "rejected": 2}), ""),
            (json!({"Question": "a", "answer": "b"}), "Question=instruction answer=output"),
            (json!({"context": "c", "question": "a", "answers": {"text": ["b"]}}), ""),
            (
                json!({"context": ["c"], "question": "a", "answer": "b"}),
                "question=instruction answer=output",
            ),
            (json!({"conversation": said}), "conversation=messages"),
            (json!({"dialog": ["a", "b"]}), "dialog=messages"),
            (json!({"conversation": [{"user": "a", "assistant": "b"}]}), ""),
            (json!({"conversation": "a"}), ""),
        ] {
            let flags = hinted(&record);
            assert_eq!(flags, expected, "{record}");
            if flags.is_empty() {
                continue;
            }
            let mut fields = record.as_object().unwrap().clone();
            for (theirs, ours) in flags.split(' ').map(|flag| flag.split_once('=').unwrap()) {
                let value = fields.shift_remove(theirs).unwrap();
                fields.insert(ours.into(), value);
            }
            let renamed = Value::Object(fields);
            let format = Format::detect(&renamed).unwrap_or_else(|e| panic!("{renamed}: {e:?}"));
            parse(&renamed, format).unwrap_or_else(|e| panic!("{renamed}: {e:?}"));
        }
    }
}
