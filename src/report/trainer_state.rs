//! `trainer_state.json` as transformers' `Trainer` writes it: sorted keys, indent 2.
//!
//! Source: transformers `trainer_callback.py`, `TrainerState`.

use serde_json::{Map, Value, json};

use crate::train::events::{Event, StartEvent};

/// The file's text after `events`.
pub fn render(start: &StartEvent, events: &[Event]) -> String {
    let last_step = events.iter().map(Event::step).max().unwrap_or(0);
    let best = events.iter().rev().find_map(|event| match event {
        Event::Eval(eval) if eval.is_best => Some((eval.eval_loss, eval.step)),
        _ => None,
    });
    let tokens = events.iter().rev().find_map(|event| match event {
        Event::Step(step) => Some((step.num_input_tokens_seen, step.epoch)),
        _ => None,
    });
    let (tokens, epoch) = tokens.unwrap_or((0, 0.0));
    let state = json!({
        "best_global_step": best.map(|(_, step)| step),
        "best_metric": best.map(|(loss, _)| loss),
        "best_model_checkpoint": best.map(|(_, step)| format!("checkpoint-{step}")),
        "epoch": epoch,
        "eval_steps": start.eval_steps,
        "global_step": last_step,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": events.iter().filter_map(entry).collect::<Vec<_>>(),
        "logging_steps": start.logging_steps,
        "max_steps": start.max_steps,
        "num_input_tokens_seen": tokens,
        "num_train_epochs": start.num_train_epochs.ceil() as u64,
        "save_steps": start.save_steps,
        "stateful_callbacks": {},
        "total_flos": 0.0,
        "train_batch_size": start.train_batch_size,
        "trial_name": null,
        "trial_params": null,
    });
    format!("{:#}\n", sorted(state))
}

/// A line of `log_history`; TRL's names for what transformers does not log.
fn entry(event: &Event) -> Option<Value> {
    match event {
        Event::Step(step) => Some(json!({
            "epoch": step.epoch,
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
            "loss": step.loss,
            "num_tokens": step.num_input_tokens_seen,
            "step": step.step,
        })),
        Event::Eval(eval) => {
            let per_second = |count: u64| count as f64 / eval.eval_runtime.max(1e-9);
            Some(json!({
                "epoch": eval.epoch,
                "eval_loss": eval.eval_loss,
                "eval_runtime": eval.eval_runtime,
                "eval_samples_per_second": per_second(eval.num_documents),
                "eval_steps_per_second": per_second(eval.num_batches),
                "step": eval.step,
            }))
        }
        Event::End(end) => Some(json!({
            "epoch": end.epoch,
            "step": end.step,
            "total_flos": 0.0,
            "train_loss": end.train_loss,
            "train_runtime": end.train_runtime,
        })),
        _ => None,
    }
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<(String, Value)> = fields.into_iter().collect();
            fields.sort_by(|a, b| a.0.cmp(&b.0));
            let fields = fields.into_iter().map(|(key, value)| (key, sorted(value)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}
