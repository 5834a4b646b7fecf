//! Names whose values are not ours.

use super::{Asks, OFF};

const ANSWERS: &str = "\"assistant\", the default, for true, \"all\" for false";
const INPUTS: &str = "\"all\" for true, \"assistant\", the default, for false";
const ATTENTION: &str = "\"flash\" or \"exact\"; \"auto\", the default, is what suits the model";
const CHECKPOINTING: &str =
    "\"checkpoint\" for true, \"keep\" for false; \"auto\", the default, is the fastest that fits";
const HELD_OUT: &str = "a fraction such as 0.05; a number of records is a file for `eval-data`";
const DATA_PATHS: &str =
    "the paths of files: names in a list of data sets, or on the Hub, are not known";

/// Their name, when it asks for something, our name, and our values for theirs.
pub(super) const VALUES: [(&str, Asks, &str, &str); 45] = [
    ("activation-offloading", OFF, "activations", "\"offload\" for true"),
    ("assistant-only-loss", Asks::Always, "train-on", ANSWERS),
    ("attention-implementation", Asks::Always, "attn-implementation", ATTENTION),
    ("bnb-4bit-quant-type", Asks::Always, "quantization", "\"nf4\" or \"fp4\""),
    ("chat-template-jinja", Asks::Always, "chat-template", "the path of a Jinja file"),
    ("completion-only-loss", Asks::Always, "train-on", ANSWERS),
    (
        "cosine-min-lr-ratio",
        Asks::Always,
        "min-lr-rate",
        "with `lr-scheduler-type` \"cosine_with_min_lr\"",
    ),
    ("dataset", Asks::Always, "data", DATA_PATHS),
    ("dataset-dir", Asks::Always, "data", "the path of each file, with its folder"),
    ("dataset-name", Asks::Always, "data", DATA_PATHS),
    (
        "datasets",
        Asks::Always,
        "data",
        "the paths of files; the format of each is detected, or is `format`",
    ),
    ("disable-gradient-checkpointing", OFF, "activations", "\"keep\" for true"),
    ("disable-shuffling", OFF, "shuffle", "false for true"),
    ("eager-attention", OFF, "attn-implementation", ATTENTION),
    ("eval-packing", Asks::Always, "packing", "it is for training and evaluation data"),
    ("eval-sample-packing", Asks::Always, "packing", "it is for training and evaluation data"),
    (
        "excess-length-strategy",
        Asks::Always,
        "truncation",
        "\"drop\", \"right\" for truncate, \"error\" for raise",
    ),
    ("flash-attention", OFF, "attn-implementation", ATTENTION),
    ("flash-attn", Asks::Unless(&["auto", "false"]), "attn-implementation", ATTENTION),
    ("grad-checkpoint", Asks::Always, "activations", CHECKPOINTING),
    ("gradient-checkpointing", Asks::Always, "activations", CHECKPOINTING),
    (
        "load-in-4bit",
        Asks::Always,
        "quantization",
        "\"nf4\", the default, for true, \"none\" for false",
    ),
    (
        "logging-strategy",
        Asks::Unless(&["steps"]),
        "logging-steps",
        "for \"steps\" it is enough, for \"epoch\" the steps of one, for \"no\" a large number",
    ),
    (
        "lora-target",
        Asks::Always,
        "target-modules",
        "\"all-linear\", the default, for all; or names, or a regular expression",
    ),
    (
        "mask-history",
        OFF,
        "train-on",
        "\"completion\" for true, \"assistant\", the default, for false",
    ),
    ("neat-packing", Asks::Always, "packing", "attention always stays within each document"),
    ("no-cuda", OFF, "device", "\"cpu\" for true"),
    (
        "packing-strategy",
        Asks::Always,
        "packing",
        "it is by best fit; `truncation` \"split\" cuts what is longer",
    ),
    ("padding-free", Asks::Always, "packing", "there is never any padding"),
    (
        "quantization-bit",
        Asks::EvenEmpty,
        "quantization",
        "\"nf4\", the default, for 4, \"none\" for none; 8 is not supported",
    ),
    (
        "quantization-method",
        Asks::EvenEmpty,
        "quantization",
        "\"nf4\" or \"fp4\" for bnb; a base that is 4-bit already is used as stored",
    ),
    ("quantization-type", Asks::Always, "quantization", "\"nf4\" or \"fp4\""),
    (
        "roles-to-train",
        Asks::Unless(&["assistant", "gpt"]),
        "train-on",
        "\"assistant\" for all its turns, \"completion\" for the last, \"all\"; other roles cannot be chosen",
    ),
    ("sdp-attention", OFF, "attn-implementation", ATTENTION),
    (
        "template",
        Asks::Always,
        "chat-template",
        "the model's by itself; or alpaca, chatml, gemma, llama-3, zephyr, or a Jinja file",
    ),
    ("test-size", Asks::Unless(&["0", "0.0"]), "validation-split", HELD_OUT),
    ("train-on-inputs", Asks::Always, "train-on", INPUTS),
    ("train-on-prompt", Asks::Always, "train-on", INPUTS),
    ("train-on-responses-only", Asks::Always, "train-on", ANSWERS),
    ("use-cpu", OFF, "device", "\"cpu\" for true"),
    ("use-flash-attention-2", OFF, "attn-implementation", ATTENTION),
    (
        "use-gradient-checkpointing",
        Asks::Always,
        "activations",
        "\"offload\" for \"unsloth\", \"checkpoint\" for true, \"keep\" for false; \"auto\", the default, is the fastest that fits",
    ),
    ("val-set-size", Asks::Unless(&["0", "0.0"]), "validation-split", HELD_OUT),
    ("val-size", Asks::Unless(&["0", "0.0"]), "validation-split", HELD_OUT),
    ("xformers-attention", OFF, "attn-implementation", ATTENTION),
];
