//! What every command does with its arguments.

mod training;

use training::{Workplace, error_of, fail};

fn refused(place: &Workplace, arguments: &str) -> String {
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let (code, text) = fail(place.nibble(&arguments));
    assert_eq!(code, 2, "{arguments:?}: {text}");
    error_of(&text).to_string()
}

#[test]
fn negative_numbers_reach_the_flag_that_refuses_them() {
    let place = Workplace::new();
    let whole = "expected a whole number, 0 or more";
    for (command, flag, value, expected) in [
        ("train", "--learning-rate", "-1e-4", "expected a number above 0"),
        ("train", "--memory-budget", "-1GiB", "`-1GiB` is not a size, expected a number with a"),
        ("train", "--seed", "-1", whole),
        ("train", "--layers-to-transform", "-1", whole),
        ("train", "--warmup_steps", "-1", whole),
        ("train", "--lora-alpha", "-16", "expected a number above 0"),
        ("generate", "--top-k", "-1", whole),
        ("generate", "--seed", "-1", whole),
        ("memory", "--measure", "-1", "expected a whole number, 1 or more"),
        ("memory", "--measure", "0", "expected a whole number, 1 or more"),
        ("data", "--show", "-1", whole),
        ("quantize", "--block-size", "-64", "expected a power of two"),
    ] {
        let error = refused(&place, &format!("{command} {flag} {value}"));
        let flag = flag.replace('_', "-");
        assert!(
            error.starts_with(&format!("error: invalid value '{value}' for '{flag}")),
            "{error}"
        );
        assert!(error.contains(&format!(": {expected}")), "{error}");
    }
}
