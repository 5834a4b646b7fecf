//! How a run ends: its last event, its best weights, the adapter's files, and what a run that was
//! stopped or went wrong says.

use std::path::Path;

use super::Trainer;
use crate::checkpoint::atomic::rename;
use crate::error::{Error, Message, Result};
use crate::ledger::resident;
use crate::train::checkpoints;
use crate::train::events::{EndEvent, EndReason};
use crate::train::optimizer_file;
use crate::train::trainee::Trainee;

impl<M: Trainee> Trainer<'_, M> {
    pub(super) fn end_event(&self, reason: EndReason) -> EndEvent {
        let state = &self.state;
        EndEvent {
            step: state.step,
            epoch: self.epoch(),
            reason,
            train_loss: state.loss_sum / state.step.max(1) as f64,
            train_runtime: state.elapsed_seconds,
            tokens_per_second: state.num_input_tokens_seen as f64
                / state.elapsed_seconds.max(f64::MIN_POSITIVE),
            best: state.best.map(|best| (best.eval_loss, best.step)),
            best_checkpoint: state.best.map(|best| checkpoints::name(best.step)),
            peak_rss_bytes: resident::peak_bytes(),
            memory: self.model.memory(),
        }
    }

    /// Takes the best weights back, if that is asked for and they are others; where they were damaged since, the
    /// last ones are the run's.
    pub(super) fn load_best(&mut self) -> Result<()> {
        let Some(best) = self.state.best else { return Ok(()) };
        if !self.context.recipe.evaluation.load_best_at_end || best.step == self.state.step {
            return Ok(());
        }
        let folder = self.context.out.join(checkpoints::name(best.step));
        if let Err(error) = checkpoints::verify(&folder) {
            let (what, folder) = (&error.message().what, folder.display());
            self.context.progress.note(&format!(
                "warning: {folder} had the best weights, but {what}; the adapter is that of the last step"
            ));
            return Ok(());
        }
        optimizer_file::read(self.model, &folder)
    }

    pub(super) fn interrupted(&self) -> Error {
        let (step, out) = (self.state.step, self.context.out.display());
        let what = match self.saved_step {
            Some(saved) => {
                format!("interrupted after step {step}; saved {}", checkpoints::name(saved))
            }
            None => "interrupted before the first step was done".to_string(),
        };
        let hint = format_args!("continue with `nibble train --out {out} --resume`");
        Error::Interrupted(Message::new(what)).hint(hint)
    }

    /// What is left of a run that cannot go on. Where a file is the reason its steps are saved; after numbers that
    /// went wrong it says which checkpoint came before: the same settings would go wrong again.
    pub(super) fn rescued(&mut self, error: Error) -> Error {
        match (&error, self.saved_step) {
            (Error::Io(..), _) => {
                // Where this fails, too, the error says which checkpoint is left.
                let _ = self.save_unless_done();
                error
            }
            (Error::Numeric(message), Some(saved)) => {
                let hint = message.hint.as_ref().map_or(String::new(), |hint| format!("{hint}; "));
                let checkpoint = self.context.out.join(checkpoints::name(saved));
                error.hint(format_args!(
                    "{hint}`--init-adapter {}` goes on from the last checkpoint with other settings, in \
                     another `--out`",
                    checkpoint.display()
                ))
            }
            _ => error,
        }
    }
}

/// Puts the adapter's files into `out`, each whole or not at all.
pub(super) fn publish<M: Trainee>(model: &M, out: &Path) -> Result<()> {
    let temporary = out.join(".adapter.partial");
    std::fs::create_dir_all(&temporary).map_err(|e| Error::io("create", &temporary, e))?;
    model.write_adapter(&temporary)?;
    let entries = std::fs::read_dir(&temporary).map_err(|e| Error::io("list", &temporary, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("list", &temporary, e))?;
        let destination = out.join(entry.file_name());
        rename(&entry.path(), &destination)?;
    }
    std::fs::remove_dir(&temporary).map_err(|e| Error::io("remove", &temporary, e))
}
