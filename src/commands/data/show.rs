//! Documents token by token, with the loss mask in front of each line as in a diff: `+` is trained.

use std::io::IsTerminal;

use crate::data::{ChatTokenizer, DataFiles, Document};
use crate::error::Result;

/// Characters of a line.
const COLUMNS: usize = 100;
const GREEN: &str = "\x1b[32m";
const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// The documents, each under a line that says which it is.
pub fn documents(
    files: &DataFiles,
    documents: &[Document],
    tokenizer: &ChatTokenizer,
) -> Result<String> {
    let colour = std::io::stdout().is_terminal();
    let mut out = String::new();
    for document in documents {
        out += &format!(
            "\n{}: {} tokens, {} trained (+)\n",
            files.place(document.line),
            document.input_ids.len(),
            document.num_targets()
        );
        for (trained, line) in lines(document, tokenizer)? {
            let mark = if trained { '+' } else { ' ' };
            let (begin, end) = match (colour, trained) {
                (false, _) => ("", ""),
                (true, true) => (GREEN, RESET),
                (true, false) => (DIM, RESET),
            };
            out += &format!("{begin}{mark} {line}{end}\n");
        }
    }
    Ok(out)
}

/// Nothing that a terminal would obey.
fn visible(character: char) -> char {
    match character {
        '\n' => '⏎',
        '\t' => '⇥',
        // Unicode's pictures of control characters.
        '\0'..' ' => char::from_u32(0x2400 + u32::from(character)).unwrap_or('␦'),
        '\x7f' => '␡',
        other if other.is_control() => '␦',
        other => other,
    }
}

/// Tokens between bars; a new line after each line break, where the mask changes, and where it is
/// full.
fn lines(document: &Document, tokenizer: &ChatTokenizer) -> Result<Vec<(bool, String)>> {
    let mut lines: Vec<(bool, String)> = Vec::new();
    let mut full = true;
    for (index, (&id, &label)) in document.input_ids.iter().zip(&document.labels).enumerate() {
        let text = tokenizer.decode(&[id], false)?;
        // The first token has nothing to be predicted from.
        let trained = label >= 0 && index > 0;
        let shown: String = text.chars().map(visible).collect();
        match lines.last_mut() {
            Some((before, line)) if *before == trained && !full => {
                line.push('│');
                line.push_str(&shown);
            }
            _ => lines.push((trained, shown)),
        }
        full = text.ends_with('\n')
            || lines.last().is_some_and(|(_, line)| line.chars().count() >= COLUMNS);
    }
    Ok(lines)
}
