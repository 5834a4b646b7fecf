//! From a record to token ids and labels.
//!
//! Labels are not shifted: a token's label is its own id where it is trained, −100 elsewhere. Every
//! trained answer ends in a trained end-of-sequence token; nothing after it in the turn is trained.

use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::batch::{Document, MASKED};
use super::chat::Chat;
use super::ends::TurnEnds;
use super::record::Record;
use super::rejection::Rejection;
use super::spans::{Rendered, Turn};
use super::template::{ChatTemplate, DATE_OF_DATA, TEMPLATE_FAILS};
use super::tokenizer::ChatTokenizer;
use crate::error::{Error, Result};

/// Which tokens of a conversation or completion are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// All assistant turns, completions, all of plain text
    Assistant,
    /// The last assistant turn, completions, all of plain text
    Completion,
    /// All tokens
    All,
}

/// Turns records into documents.
pub struct Encoder<'a> {
    tokenizer: &'a ChatTokenizer,
    template: Option<ChatTemplate>,
    train_on: TrainOn,
    vocab_size: usize,
    /// Tokens that end a turn, and their texts.
    end_ids: Vec<u32>,
    end_texts: Vec<String>,
    /// What the template puts around turns, beside their ends.
    turn_marks: Vec<String>,
}

const TOOLS_UNKNOWN: &str =
    "the record has tools, of which this template may know nothing: see `--chat-template`";

const NO_SYSTEM: &str = "the template takes no message of the system: put its text before the first one of the \
                         user, or choose another template by `--chat-template`";

/// A document and what was noticed about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Ids and labels.
    pub document: Document,
    /// An answer ends without an end-of-sequence token, and none could be added.
    pub untrained_eos: bool,
    /// The document begins with two beginning-of-sequence tokens.
    pub double_bos: bool,
    /// Roles that templates seldom know, one for each message that has one.
    pub unknown_roles: Vec<String>,
    /// Messages to the assistant whose text the template leaves out.
    pub content_left_out: usize,
    /// Messages whose reasoning the template leaves out.
    pub reasoning_left_out: usize,
    /// Trained answers that are empty.
    pub empty_answers: usize,
    /// A prompt of plain text, beside a chat template that is not applied to it.
    pub bare_prompt: bool,
    /// Plain text that was rendered by a chat template: with the answers, all that was asked is trained.
    pub rendered_text: bool,
}

impl<'a> Encoder<'a> {
    /// An encoder for a model with `vocab_size` rows of embeddings.
    ///
    /// # Errors
    /// `Input` when the tokenizer has more ids than the model has rows, or the chat template does
    /// not compile.
    pub fn new(tokenizer: &'a ChatTokenizer, vocab_size: usize, train_on: TrainOn) -> Result<Self> {
        // Gemma 3 1B has a token for images that its embedding has no row for.
        if tokenizer.own_vocab_size() > vocab_size {
            return Err(Error::input(format_args!(
                "the tokenizer has {} ids, the model {vocab_size} rows of embeddings",
                tokenizer.own_vocab_size()
            ))
            .hint("the tokenizer belongs to another model"));
        }
        let template = tokenizer.compile_template_at(DATE_OF_DATA)?;
        let mut end_ids = tokenizer.eos_ids().to_vec();
        if let Some(template) = &template {
            let between = TurnEnds::of(template, &tokenizer.added_tokens()).between;
            end_ids.extend(between.and_then(|text| tokenizer.id(&text)));
        }
        let end_texts: Vec<String> = end_ids.iter().filter_map(|&id| tokenizer.token(id)).collect();
        let mut turn_marks = tokenizer.template_tokens();
        turn_marks.retain(|mark| !end_texts.contains(mark));
        Ok(Encoder { tokenizer, template, train_on, vocab_size, end_ids, end_texts, turn_marks })
    }

    /// Ids and labels of one record.
    ///
    /// # Errors
    /// Why the record cannot be used.
    pub fn encode(&self, record: &Record) -> std::result::Result<Encoded, Rejection> {
        let mut encoded = match record {
            Record::Text(text) => self.text(text)?,
            Record::Completion { prompt, completion } => self.completion(prompt, completion)?,
            Record::Instruction { text: Some((prompt, completion)), .. }
                if self.template.is_none() =>
            {
                self.completion(prompt, completion)?
            }
            Record::Instruction { chat, .. } | Record::Chat(chat) => self.chat(chat)?,
            Record::Tokens { input_ids, labels } => self.tokens(input_ids, labels.as_deref()),
        };
        let document = &encoded.document;
        if let Some(id) = document.input_ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            let what = format!("token id {id} is outside the vocabulary of {}", self.vocab_size);
            return Err(Rejection::new(what).hint("the ids were made with another tokenizer"));
        }
        if let Some(label) =
            document.labels.iter().find(|&&label| label >= 0 && label as usize >= self.vocab_size)
        {
            let what = format!("label {label} is outside the vocabulary of {}", self.vocab_size);
            return Err(Rejection::new(what).hint("labels are token ids, or −100 where masked"));
        }
        encoded.double_bos = self.tokenizer.bos().is_some_and(|bos| {
            document.input_ids.len() > 1 && document.input_ids[..2] == [bos.id, bos.id]
        });
        if let Record::Chat(chat) = record {
            encoded.unknown_roles = chat.unknown_roles();
        }
        Ok(encoded)
    }

    /// Whether a token ends a turn or a document.
    pub(super) fn ends_turn(&self, id: u32) -> bool {
        self.end_ids.contains(&id)
    }

    /// Appends the EOS unless the ids end in one. Returns whether they now do.
    fn close(&self, ids: &mut Vec<u32>) -> bool {
        if ids.last().is_some_and(|&id| self.tokenizer.eos_ids().contains(&id)) {
            return true;
        }
        ids.extend(self.tokenizer.eos().map(|eos| eos.id));
        self.tokenizer.eos().is_some()
    }

    fn text(&self, text: &str) -> std::result::Result<Encoded, Rejection> {
        if text.is_empty() {
            return Ok(Encoded::default());
        }
        let mut ids = self.tokenizer.encode_plain(text).map_err(rejection)?;
        let closed = self.close(&mut ids);
        let mut encoded = all_trained(ids, !closed);
        // A question and an answer; a document may begin with one.
        let marks = self.turn_marks.iter().flat_map(|mark| text.matches(&**mark));
        encoded.rendered_text = self.train_on != TrainOn::All && marks.take(2).count() == 2;
        Ok(encoded)
    }

    fn completion(
        &self,
        prompt: &str,
        completion: &str,
    ) -> std::result::Result<Encoded, Rejection> {
        if completion.is_empty() {
            return Ok(Encoded::default());
        }
        let plain = |text: &str| self.tokenizer.encode_plain(text).map_err(rejection);
        let prompt_ids = plain(prompt)?;
        let mut ids = plain(&format!("{prompt}{completion}"))?;
        // A token that spans the border belongs to the completion.
        let border = prompt_ids.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        let closed = self.close(&mut ids);
        let mut encoded = all_trained(ids, !closed);
        if self.train_on != TrainOn::All {
            encoded.document.labels[..border].fill(MASKED);
        }
        // One that was rendered before has ends of turns in it, or Mistral's and Llama 2's marks.
        let is_rendered =
            prompt.contains("[INST]") || prompt_ids.iter().any(|&id| self.ends_turn(id));
        encoded.bare_prompt = self.template.is_some() && !is_rendered;
        Ok(encoded)
    }

    fn chat(&self, chat: &Chat) -> std::result::Result<Encoded, Rejection> {
        let Some(templates) = &self.template else {
            return Err(Rejection::new("the tokenizer has no chat template")
                .hint("choose one, such as `--chat-template chatml` or `alpaca`"));
        };
        if chat.messages.is_empty() {
            return Ok(Encoded::default());
        }
        let template = templates.for_variables(&chat.variables);
        let chat = &*chat.for_template(template);
        let refused = |error| {
            let refused = rejection(error);
            let open = refused.hint.as_deref().is_none_or(|hint| hint == TEMPLATE_FAILS);
            let renders = |messages| template.render(messages, &chat.variables, false).is_ok();
            match chat.messages.split_first() {
                Some((first, rest)) if open && first["role"] == "system" && renders(rest) => {
                    refused.hint(NO_SYSTEM)
                }
                _ if open && chat.has_tools() => refused.hint(TOOLS_UNKNOWN),
                _ => refused,
            }
        };
        if self.train_on == TrainOn::All {
            let text = template.render(&chat.messages, &chat.variables, false).map_err(refused)?;
            let mut ids = self.tokenizer.encode(&text).map_err(rejection)?;
            let ends = ids.iter().any(|&id| self.ends_turn(id)) || self.close(&mut ids);
            template.check_tools(chat, &text)?;
            template.check_answers(chat, &text)?;
            return Ok(Encoded {
                content_left_out: template.content_left_out(chat, &text),
                reasoning_left_out: chat.reasoning_left_out(&text),
                ..all_trained(ids, !ends)
            });
        }
        let rendered = template.render_with_turns(chat, &self.end_texts).map_err(|error| {
            let text = template.render(&chat.messages, &chat.variables, false);
            let left_out = text.ok().and_then(|text| template.check_answers(chat, &text).err());
            left_out.unwrap_or_else(|| refused(error))
        })?;
        template.check_tools(chat, &rendered.text)?;
        template.check_answers(chat, &rendered.text)?;
        let (ids, offsets) =
            self.tokenizer.encode_with_offsets(&rendered.text).map_err(rejection)?;
        let turns = self.trained_turns(chat, &rendered)?;
        let ranges = turns.iter().map(|turn| self.turn(&ids, &offsets, &turn.range)).collect();
        let empty = |turn: &&&Turn| turn.message.is_some_and(|index| chat.is_empty_answer(index));
        let empty_answers = turns.iter().filter(empty).count();
        Ok(Encoded {
            content_left_out: template.content_left_out(chat, &rendered.text),
            reasoning_left_out: chat.reasoning_left_out(&rendered.text),
            empty_answers,
            ..self.masked_but(ids, ranges)
        })
    }

    /// The turns that the options and the record want trained.
    fn trained_turns<'r>(
        &self,
        chat: &Chat,
        rendered: &'r Rendered,
    ) -> std::result::Result<Vec<&'r Turn>, Rejection> {
        let turns = rendered.turns.iter();
        let first = match self.train_on {
            TrainOn::Completion => turns.len().saturating_sub(1),
            _ => 0,
        };
        if !chat.is_all_trained() && rendered.turns.iter().any(|turn| turn.message.is_none()) {
            return Err(Rejection::new(
                "the template's generation blocks are not the assistant's messages, so that it is \
                 unknown which of them the prompt or `weight` leaves out",
            ));
        }
        let trained = |turn: &&Turn| turn.message.is_none_or(|index| chat.is_trained(index));
        Ok(turns.skip(first).filter(trained).collect())
    }

    /// Trains `ranges` only; the last of them gets an EOS if it ends the document without one.
    fn masked_but(&self, mut ids: Vec<u32>, ranges: Vec<Range<usize>>) -> Encoded {
        let mut labels = vec![MASKED; ids.len()];
        let mut untrained_eos = false;
        for range in ranges {
            let ends = ids[range.clone()].last().is_some_and(|&id| self.ends_turn(id));
            for token in range.clone() {
                labels[token] = ids[token] as i32;
            }
            if !ends && range.end == ids.len() {
                untrained_eos |= !self.close(&mut ids);
                labels.extend(ids[labels.len()..].iter().map(|&id| id as i32));
                break;
            }
            untrained_eos |= !ends;
        }
        let document = Document { input_ids: ids, labels, line: 0 };
        Encoded { document, untrained_eos, ..Encoded::default() }
    }

    /// Tokens of an assistant turn, up to its last end-of-turn token; one that follows directly is
    /// taken in, and so is a token of text that reaches into the turn. A marker that does has only
    /// taken the spaces behind it.
    fn turn(&self, ids: &[u32], offsets: &[Range<usize>], range: &Range<usize>) -> Range<usize> {
        let mut begin = offsets.partition_point(|offset| offset.end <= range.start);
        let reaches = |offset: &Range<usize>| offset.start < range.start;
        if offsets.get(begin).is_some_and(reaches) && self.tokenizer.takes_spaces(ids[begin]) {
            begin += 1;
        }
        let end = offsets.partition_point(|offset| offset.start < range.end).max(begin);
        match ids[begin..end].iter().rposition(|&id| self.ends_turn(id)) {
            Some(last) => begin..begin + last + 1,
            None if ids.get(end).is_some_and(|&id| self.ends_turn(id)) => begin..end + 1,
            None => begin..end,
        }
    }

    fn tokens(&self, input_ids: &[u32], labels: Option<&[i32]>) -> Encoded {
        let mut encoded = all_trained(input_ids.to_vec(), false);
        if let Some(labels) = labels {
            encoded.document.labels = labels.iter().map(|&label| label.max(MASKED)).collect();
        }
        let last = encoded.document.labels.iter().rfind(|&&label| label >= 0);
        encoded.untrained_eos = last.is_some_and(|&label| !self.ends_turn(label as u32));
        encoded
    }
}

fn all_trained(input_ids: Vec<u32>, untrained_eos: bool) -> Encoded {
    let labels = input_ids.iter().map(|&id| id as i32).collect();
    let document = Document { input_ids, labels, line: 0 };
    Encoded { document, untrained_eos, ..Encoded::default() }
}

fn rejection(error: Error) -> Rejection {
    let message = error.message();
    Rejection { reason: message.what.clone(), hint: message.hint.clone() }
}
