//! `trainer_state.json` as transformers' `Trainer` writes it: sorted keys, indent 2.
//!
//! Fields stand in the order in which they are written. Events become text one after the other: a long run
//! has many, and no copy of all of them is made.
//!
//! Source: transformers `trainer_callback.py`, `TrainerState`.

use serde::{Serialize, Serializer};

use crate::train::events::{EndEvent, EvalEvent, Event, StartEvent, StepEvent};

#[derive(Serialize)]
struct TrainerState<'a> {
    best_global_step: Option<u64>,
    best_metric: Option<f64>,
    best_model_checkpoint: Option<String>,
    epoch: f64,
    eval_steps: Option<u64>,
    global_step: u64,
    is_hyper_param_search: bool,
    is_local_process_zero: bool,
    is_world_process_zero: bool,
    #[serde(serialize_with = "entries")]
    log_history: &'a [Event],
    logging_steps: u64,
    max_steps: u64,
    num_input_tokens_seen: u64,
    num_train_epochs: u64,
    save_steps: Option<u64>,
    stateful_callbacks: Callbacks,
    total_flos: f64,
    train_batch_size: usize,
    trial_name: Option<String>,
    trial_params: Option<String>,
}

/// Callbacks with a state, of which there are none.
#[derive(Serialize)]
struct Callbacks {}

/// A line of `log_history`; TRL's names for what transformers does not log.
#[derive(Serialize)]
#[serde(untagged)]
enum Entry {
    Step {
        epoch: f64,
        grad_norm: f64,
        learning_rate: f64,
        loss: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        mean_token_accuracy: Option<f64>,
        num_tokens: u64,
        step: u64,
    },
    Eval {
        epoch: f64,
        eval_loss: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        eval_mean_token_accuracy: Option<f64>,
        eval_runtime: f64,
        eval_samples_per_second: f64,
        eval_steps_per_second: f64,
        step: u64,
    },
    End {
        epoch: f64,
        step: u64,
        total_flos: f64,
        train_loss: f64,
        train_runtime: f64,
    },
}

/// The file's text after `events`.
pub fn render(start: &StartEvent, events: &[Event]) -> String {
    let best = events.iter().rev().find_map(|event| match event {
        Event::Eval(eval) if eval.is_best => Some((eval.eval_loss, eval.step)),
        _ => None,
    });
    let tokens = events.iter().rev().find_map(|event| match event {
        Event::Step(step) => Some((step.num_input_tokens_seen, step.epoch)),
        _ => None,
    });
    let (num_input_tokens_seen, epoch) = tokens.unwrap_or((0, 0.0));
    let state = TrainerState {
        best_global_step: best.map(|(_, step)| step),
        best_metric: best.map(|(loss, _)| loss),
        best_model_checkpoint: best.map(|(_, step)| format!("checkpoint-{step}")),
        epoch,
        eval_steps: start.eval_steps,
        global_step: events.iter().map(Event::step).max().unwrap_or(0),
        is_hyper_param_search: false,
        is_local_process_zero: true,
        is_world_process_zero: true,
        log_history: events,
        logging_steps: start.logging_steps,
        max_steps: start.max_steps,
        num_input_tokens_seen,
        num_train_epochs: start.num_train_epochs.ceil() as u64,
        save_steps: start.save_steps,
        stateful_callbacks: Callbacks {},
        total_flos: 0.0,
        train_batch_size: start.train_batch_size,
        trial_name: None,
        trial_params: None,
    };
    serde_json::to_string_pretty(&state).expect("events serialize") + "\n"
}

fn entries<S: Serializer>(events: &&[Event], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(events.iter().filter_map(entry))
}

fn entry(event: &Event) -> Option<Entry> {
    match *event {
        Event::Step(StepEvent {
            epoch,
            grad_norm,
            learning_rate,
            loss,
            mean_token_accuracy,
            num_input_tokens_seen: num_tokens,
            step,
            ..
        }) => Some(Entry::Step {
            epoch,
            grad_norm,
            learning_rate,
            loss,
            mean_token_accuracy,
            num_tokens,
            step,
        }),
        Event::Eval(EvalEvent {
            epoch,
            eval_loss,
            eval_mean_token_accuracy,
            eval_runtime,
            num_documents,
            num_batches,
            step,
            ..
        }) => {
            let per_second = |count: u64| count as f64 / eval_runtime.max(1e-9);
            Some(Entry::Eval {
                epoch,
                eval_loss,
                eval_mean_token_accuracy,
                eval_runtime,
                eval_samples_per_second: per_second(num_documents),
                eval_steps_per_second: per_second(num_batches),
                step,
            })
        }
        Event::End(EndEvent { epoch, step, train_loss, train_runtime, .. }) => {
            Some(Entry::End { epoch, step, total_flos: 0.0, train_loss, train_runtime })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the file reads, whichever way it was made.
    #[test]
    fn keys_are_sorted_in_two_columns_of_indent() {
        let step = StepEvent { step: 5, loss: 0.5, epoch: 0.25, ..StepEvent::default() };
        let eval = EvalEvent {
            step: 5,
            eval_loss: 0.75,
            eval_runtime: 2.0,
            num_documents: 8,
            is_best: true,
            ..EvalEvent::default()
        };
        let start = StartEvent { max_steps: 10, num_train_epochs: 1.5, ..StartEvent::default() };
        let text = render(&start, &[Event::Step(step), Event::Eval(eval)]);
        assert!(text.starts_with(
            "{\n  \"best_global_step\": 5,\n  \"best_metric\": 0.75,\n  \
             \"best_model_checkpoint\": \"checkpoint-5\",\n"
        ));
        assert!(
            text.contains("\"eval_samples_per_second\": 4.0,\n      \"eval_steps_per_second\"")
        );
        assert!(text.ends_with("  \"trial_params\": null\n}\n"), "{text}");
        // In the order of the file.
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let history = value["log_history"].as_array().unwrap();
        assert_eq!(history.len(), 2);
        for object in history.iter().chain([&value]) {
            assert!(object.as_object().unwrap().keys().is_sorted(), "{object}");
        }
    }
}
