//! `nibble chat`: a conversation, with adapters that can be changed while it runs.

use std::io::BufRead;
use std::path::PathBuf;

use super::generate::print;
use crate::cli::generate::ChatArgs;
use crate::error::{Error, Result};
use crate::nearest::nearest;
use crate::sample::{Sampler, Session};

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with flags, model or adapter.
pub fn run(args: &ChatArgs) -> Result<()> {
    super::set_threads(args.generation.threads)?;
    let sampler = Sampler::new(args.generation.sampling())?;
    let adapters = args.adapter.iter().map(|text| named(text)).collect::<Result<Vec<_>>>()?;
    let format = args.base.block_format();
    let first = adapters.first().map(|(_, folder)| folder.as_path());
    let context = args.generation.context_length;
    let session = Session::open(&args.base.model, format.as_ref(), first, context)?;
    let mut chat = Chat { args, session, sampler, adapters, turns: Vec::new() };
    chat.reset();
    eprintln!("/adapter NAME  /base  /reset  /exit");
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("read", "standard input".as_ref(), e))?;
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            command if command.starts_with('/') => chat.command(command),
            text => chat.answer(text)?,
        }
    }
    Ok(())
}

struct Chat<'a> {
    args: &'a ChatArgs,
    session: Session,
    sampler: Sampler,
    adapters: Vec<(String, PathBuf)>,
    /// Role and content.
    turns: Vec<(&'static str, String)>,
}

impl Chat<'_> {
    fn reset(&mut self) {
        self.turns = self.args.system.iter().map(|text| ("system", text.clone())).collect();
    }

    /// A wrong command is told and forgotten: the conversation goes on.
    fn command(&mut self, command: &str) {
        let result = match command.split_once(' ').unwrap_or((command, "")) {
            ("/reset", _) => {
                self.reset();
                Ok("new conversation".to_string())
            }
            ("/base", _) => self.session.set_adapter(None).map(|()| "base model".to_string()),
            ("/adapter", name) => self.switch(name.trim()),
            (other, _) => Err(Error::usage(format_args!("unknown command {other}"))),
        };
        match result {
            Ok(text) => eprintln!("[{text}]"),
            Err(error) => eprintln!("error: {error}"),
        }
    }

    fn switch(&mut self, name: &str) -> Result<String> {
        let Some((_, folder)) = self.adapters.iter().find(|(known, _)| known == name) else {
            let known: Vec<&str> = self.adapters.iter().map(|(name, _)| name.as_str()).collect();
            let error = Error::usage(format_args!("no adapter is called `{name}`"));
            if known.is_empty() {
                return Err(error.hint("name adapters with `--adapter NAME=DIR`"));
            }
            return Err(error.hint(nearest(name, known.iter().copied())));
        };
        self.session.set_adapter(Some(folder))?;
        Ok(format!("adapter {name}"))
    }

    fn answer(&mut self, text: &str) -> Result<()> {
        self.turns.push(("user", text.to_string()));
        let messages: Vec<(&str, &str)> =
            self.turns.iter().map(|(role, content)| (*role, content.as_str())).collect();
        let prompt = self.session.render(&messages)?;
        let mut answer = String::new();
        let length = self.args.generation.max_new_tokens;
        self.session.generate(&prompt, &mut self.sampler, length, |piece| {
            answer.push_str(piece);
            print(piece)
        })?;
        self.turns.push(("assistant", answer));
        print("\n")
    }
}

/// `NAME=DIR`, or `DIR` whose last part is the name.
fn named(text: &str) -> Result<(String, PathBuf)> {
    if let Some((name, folder)) = text.split_once('=') {
        return Ok((name.to_string(), PathBuf::from(folder)));
    }
    let folder = PathBuf::from(text);
    let name = folder.file_name().and_then(|name| name.to_str()).map(str::to_string);
    let name =
        name.ok_or_else(|| Error::usage(format_args!("--adapter {text}: no folder name")))?;
    Ok((name, folder))
}
