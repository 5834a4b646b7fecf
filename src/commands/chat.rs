//! `nibble chat`: a conversation, with adapters that can be changed while it runs.
//!
//! Answers go to stdout, all else to stderr. A wrong command or a prompt that does not fit is told
//! and forgotten: the conversation goes on. Ctrl-C ends the answer that is being written; between
//! answers it ends the program.

use std::io::{BufRead, IsTerminal};
use std::path::Path;

use super::device;
use super::generate::note_finish;
use crate::cli::adapters::{NamedAdapter, check_names};
use crate::cli::generate::ChatArgs;
use crate::data::TemplateChoice;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::nearest::nearest;
use crate::printed;
use crate::sample::{Sampler, Session, Wish};
use crate::system::interrupt::Interrupt;

const HELP: &str = "\
/adapter           the adapters, and which one is in use
/adapter NAME|DIR  answer with another adapter from here on; NAME=DIR names it
/base              answer without an adapter
/reset             forget the conversation
/system TEXT       new system message; forgets the conversation
/exit              end; so does Ctrl-D, on Windows Ctrl-Z and Enter
Ctrl-C ends an answer";

const COMMANDS: [&str; 7] = ["/adapter", "/base", "/reset", "/system", "/exit", "/quit", "/help"];

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with flags, model or adapter.
pub fn run(args: &ChatArgs) -> Result<()> {
    check_names(&args.adapter)?;
    super::threads::set(args.generation.threads)?;
    super::packing::check(&args.base)?;
    match device::open(&args.generation.device)? {
        Some(gpu) => run_on(args, gpu),
        None => run_on(args, device::cpu(&args.generation.device)),
    }
}

fn run_on<K: Kernels>(args: &ChatArgs, kernels: K) -> Result<()> {
    let sampler = Sampler::new(args.generation.sampling())?;
    let adapters = args.adapter.clone();
    let format = args.base.block_format();
    let first = adapters.first().map(|adapter| adapter.folder.as_path());
    let context = args.generation.context_length;
    let kwargs = args.chat_template_kwargs.as_ref();
    let template = TemplateChoice::new(args.chat_template.as_ref(), kwargs);
    let model = &args.base.model;
    let session = Session::open(kernels, model, format.as_ref(), first, template, context)?;
    super::notes::packing(&args.base, session.kind());
    super::notes::long_rope(session.spec()?, context);
    super::notes::idle_flags(&args.generation);
    super::notes::escapes(&args.generation.stop_strings);
    let interrupt = Interrupt::on_ctrl_c()?;
    let current = (!adapters.is_empty()).then_some(0);
    let system = args.system.clone();
    let max_new_tokens = args.generation.max_new_tokens.get();
    let (turns, stop_strings) = (Vec::new(), args.generation.stop_strings.clone());
    let mut chat = Chat {
        session,
        sampler,
        adapters,
        current,
        system,
        turns,
        max_new_tokens,
        stop_strings,
        interrupt,
    };
    chat.reset();
    // Refused here, not after the first question.
    chat.session.speaker().render(&[("user", "")])?;
    eprintln!("{}; /help lists the commands", chat.who());
    chat.listen()
}

struct Chat<K: Kernels> {
    session: Session<K>,
    sampler: Sampler,
    adapters: Vec<NamedAdapter>,
    /// Index of the adapter in use.
    current: Option<usize>,
    system: Option<String>,
    /// Role and content.
    turns: Vec<(&'static str, String)>,
    max_new_tokens: usize,
    stop_strings: Vec<String>,
    interrupt: Interrupt,
}

impl<K: Kernels> Chat<K> {
    /// Answers line by line until the end of the input.
    fn listen(&mut self) -> Result<()> {
        let prompt = || {
            if std::io::stdin().is_terminal() {
                eprint!("> ");
            }
        };
        // While nothing is being written, Ctrl-C ends the program.
        self.interrupt.request();
        prompt();
        for line in std::io::stdin().lock().split(b'\n') {
            let line = line.map_err(|e| Error::io("read", "standard input".as_ref(), e))?;
            // A slip of the keyboard or of an encoding is one bad line, not the end of a conversation.
            let Ok(line) = std::str::from_utf8(&line) else {
                eprintln!("error: this line is not UTF-8, and was not read");
                prompt();
                continue;
            };
            match line.trim() {
                "" => {}
                text if matches!(text.split_whitespace().next(), Some("/exit" | "/quit")) => {
                    return Ok(());
                }
                command if command.starts_with('/') => self.command(command)?,
                text => self.answer(text)?,
            }
            prompt();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.turns = self.system.iter().map(|text| ("system", text.clone())).collect();
    }

    fn who(&self) -> String {
        let adapter = self.current.and_then(|index| self.adapters.get(index));
        adapter.map_or("base model".to_string(), |adapter| format!("adapter {}", adapter.name))
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command.split_once(' ').unwrap_or((command, ""));
        let result = match (name, rest.trim()) {
            ("/help", _) => Ok(HELP.to_string()),
            ("/reset", _) => {
                self.reset();
                Ok("new conversation".to_string())
            }
            ("/system", text) => {
                self.system = (!text.is_empty()).then(|| text.to_string());
                self.reset();
                Ok("new conversation".to_string())
            }
            ("/base", _) => self.equip(None),
            ("/adapter", "") => Ok(self.list()),
            ("/adapter", name) => self.take(name),
            (other, _) => Err(unknown(other)),
        };
        tell(result.map(|text| eprintln!("{text}")))
    }

    fn list(&self) -> String {
        let mark = |index| if self.current == index { "* " } else { "  " };
        let mut lines = vec![format!("{}(base model)", mark(None))];
        for (index, NamedAdapter { name, folder }) in self.adapters.iter().enumerate() {
            lines.push(format!("{}{name}  {}", mark(Some(index)), folder.display()));
        }
        lines.join("\n")
    }

    /// Index of the adapter of that name, or of the folder, which is then known by its name.
    fn find(&mut self, name: &str) -> Result<usize> {
        if let Some(index) = self.adapters.iter().position(|known| known.name == name) {
            return Ok(index);
        }
        match name.parse::<NamedAdapter>() {
            Ok(new) if new.folder.is_dir() => return self.add(new),
            Err(text) if Path::new(name).is_dir() => return Err(Error::usage(text)),
            _ => {}
        }
        let error = Error::usage(format_args!("no adapter or folder is called `{name}`"));
        match nearest(name, self.adapters.iter().map(|known| known.name.as_str())) {
            close if close.is_empty() => Err(error.hint("/adapter lists those that are known")),
            close => Err(error.hint(format_args!("did you mean {close}?"))),
        }
    }

    /// Index of an adapter that may be known already, but not under a name that another one has.
    fn add(&mut self, new: NamedAdapter) -> Result<usize> {
        let Some(index) = self.adapters.iter().position(|known| known.name == new.name) else {
            self.adapters.push(new);
            return Ok(self.adapters.len() - 1);
        };
        let known = &self.adapters[index];
        if known.folder == new.folder {
            return Ok(index);
        }
        let (name, folder) = (&known.name, known.folder.display());
        let what = format_args!("an adapter is called `{name}` already: {folder}");
        let hint = format_args!("give this one a name: `/adapter NAME={}`", new.folder.display());
        Err(Error::usage(what).hint(hint))
    }

    /// Speaks with the adapter of that name or folder, which stays known only if it could be loaded.
    fn take(&mut self, name: &str) -> Result<String> {
        let known = self.adapters.len();
        let equipped = self.find(name).and_then(|index| self.equip(Some(index)));
        if equipped.is_err() {
            self.adapters.truncate(known);
        }
        equipped
    }

    fn equip(&mut self, index: Option<usize>) -> Result<String> {
        let folder = index.map(|index| self.adapters[index].folder.clone());
        self.session.set_adapter(folder.as_deref())?;
        self.current = index;
        Ok(self.who())
    }

    /// Writes an answer; a question that fails leaves no trace in the conversation.
    fn answer(&mut self, text: &str) -> Result<()> {
        let turns = self.turns.len();
        self.turns.push(("user", text.to_string()));
        self.interrupt.clear();
        let answer = self.generate();
        self.interrupt.request();
        tell(match answer {
            Ok(answer) if !answer.is_empty() => {
                self.turns.push(("assistant", answer));
                Ok(())
            }
            other => {
                self.turns.truncate(turns);
                other.map(drop)
            }
        })
    }

    fn generate(&mut self) -> Result<String> {
        let messages: Vec<(&str, &str)> =
            self.turns.iter().map(|(role, content)| (*role, content.as_str())).collect();
        let prompt = self.session.speaker().render(&messages)?;
        let first = self.turns.len() == 1 + usize::from(self.system.is_some());
        let Chat { session, sampler, interrupt, max_new_tokens, stop_strings, .. } = self;
        let mut answer = String::new();
        let finish = session.answer(&prompt, sampler, (*max_new_tokens, stop_strings), |piece| {
            answer.push_str(piece);
            printed::at_once(piece)?;
            Ok(if interrupt.requested() { Wish::Stop } else { Wish::Continue })
        });
        let finish = finish.map_err(|error| if first { error } else { or_reset(error) })?;
        printed::at_once("\n")?;
        note_finish(finish, self.max_new_tokens);
        Ok(answer)
    }
}

/// A conversation that has outgrown the context fails at every further question.
fn or_reset(error: Error) -> Error {
    match error {
        Error::Usage(_) => {
            error.hint("`/reset` forgets the conversation; `--context-length` gives it more room")
        }
        other => other,
    }
}

/// Shows what the user can mend, such as an adapter folder that cannot be read; the rest ends the
/// program, as does an answer that cannot be written.
fn tell(result: Result<()>) -> Result<()> {
    match result {
        Err(error @ (Error::Usage(_) | Error::Input(_) | Error::Io(..))) if !printed::failed() => {
            eprintln!("error: {error}");
            Ok(())
        }
        result => result,
    }
}

fn unknown(command: &str) -> Error {
    let error = Error::usage(format_args!("unknown command `{command}`"));
    match nearest(command, COMMANDS.into_iter()) {
        close if close.is_empty() => error.hint("/help lists the commands"),
        close => error.hint(format_args!("did you mean {close}?")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_command_is_guessed() {
        assert!(unknown("/adaptr").to_string().contains("did you mean `/adapter`?"));
        assert!(unknown("/xyzzy").to_string().contains("/help"));
    }
}
