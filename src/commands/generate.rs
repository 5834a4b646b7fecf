//! `nibble generate`: an answer, or one for each of several adapters.

use std::io::{IsTerminal, Read};

use super::device;
use crate::cli::adapters::{NamedAdapter, check_names};
use crate::cli::generate::GenerateArgs;
use crate::data::TemplateChoice;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::printed;
use crate::sample::{Finish, Prompt, Sampler, Session, Wish};

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with flags, model, adapter or prompt.
pub fn run(args: &GenerateArgs) -> Result<()> {
    check_names(&args.adapter)?;
    super::threads::set(args.generation.threads)?;
    super::packing::check(&args.base)?;
    match device::open(&args.generation.device)? {
        Some(gpu) => run_on(args, gpu),
        None => run_on(args, device::cpu(&args.generation.device)),
    }
}

fn run_on<K: Kernels>(args: &GenerateArgs, kernels: K) -> Result<()> {
    Sampler::new(args.generation.sampling())?;
    let prompt = prompt(args)?;
    let format = args.base.block_format();
    let context = args.generation.context_length;
    let first = args.adapter.first().map(|adapter| adapter.folder.as_path());
    let kwargs = args.chat_template_kwargs.as_ref();
    let template = TemplateChoice::new(args.chat_template.as_ref(), kwargs);
    let model = &args.base.model;
    let mut session = Session::open(kernels, model, format.as_ref(), first, template, context)?;
    super::notes::packing(&args.base, session.kind());
    super::notes::long_rope(session.spec()?, context);
    super::notes::idle_flags(&args.generation);
    super::notes::escapes(&args.generation.stop_strings);
    if args.adapter.len() < 2 {
        return answer(args, &mut session, &prompt);
    }
    for (index, NamedAdapter { name, folder }) in args.adapter.iter().enumerate() {
        if index > 0 {
            session.set_adapter(Some(folder))?;
        }
        printed::at_once(&format!("{name}: "))?;
        answer(args, &mut session, &prompt)?;
    }
    Ok(())
}

fn prompt(args: &GenerateArgs) -> Result<String> {
    let prompt = args.prompt.clone().map_or_else(read_prompt, Ok)?;
    if prompt.is_empty() {
        return Err(Error::usage("the prompt is empty")
            .hint("give `--prompt TEXT`, or the prompt on standard input"));
    }
    Ok(prompt)
}

/// The prompt as the model sees it.
fn render<K: Kernels>(args: &GenerateArgs, session: &Session<K>, prompt: &str) -> Result<Prompt> {
    if args.raw {
        return Ok(Prompt::Text(prompt.to_string()));
    }
    let system = args.system.as_deref().map(|system| ("system", system));
    let messages: Vec<_> = system.into_iter().chain([("user", prompt)]).collect();
    session.speaker().render(&messages)
}

fn answer<K: Kernels>(args: &GenerateArgs, session: &mut Session<K>, prompt: &str) -> Result<()> {
    let prompt = render(args, session, prompt)?;
    let mut sampler = Sampler::new(args.generation.sampling())?;
    let max_new_tokens = args.generation.max_new_tokens.get();
    let ends = (max_new_tokens, &args.generation.stop_strings[..]);
    let finish = session.answer(&prompt, &mut sampler, ends, |piece| {
        printed::at_once(piece)?;
        Ok(Wish::Continue)
    })?;
    printed::at_once("\n")?;
    note_finish(finish, max_new_tokens);
    Ok(())
}

/// Tells that the answer was cut.
pub(super) fn note_finish(finish: Finish, max_new_tokens: usize) {
    match finish {
        Finish::EndOfSequence | Finish::StopString => {}
        Finish::Length => {
            eprintln!("[cut: --max-new-tokens {max_new_tokens} or --context-length is reached]");
        }
        Finish::Stopped => eprintln!("[stopped]"),
    }
}

fn read_prompt() -> Result<String> {
    if std::io::stdin().is_terminal() {
        eprintln!("type the prompt; Ctrl-D ends it");
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|e| Error::io("read", "standard input".as_ref(), e))?;
    Ok(text.trim_end_matches('\n').to_string())
}
