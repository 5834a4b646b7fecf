//! Methods of Python's strings and lists, and Jinja2's filter `truncate`, that minijinja has not, or has by bytes:
//! positions in a text count its characters, as its slices do.
//!
//! Source: Python 3.11 `str`, `list`; Jinja2 3.1 `do_truncate`. Tuples are lists here.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

/// More than any prompt is padded to: a text of that many characters takes no memory worth mentioning.
const WIDEST: usize = 1_000_000;
/// Characters that `truncate` leaves rather than cutting a text, by default.
const LEEWAY: usize = 5;

/// What Python calls the method of a value; those that are not here are minijinja-contrib's.
pub(super) fn call(
    state: &State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = match (value.as_str(), value.kind()) {
        (Some(text), _) => of_text(text, method, args),
        (None, ValueKind::Seq) if method == "index" => of_list(value, args).map(Some),
        _ => Ok(None),
    };
    let contributed = minijinja_contrib::pycompat::unknown_method_callback;
    own?.map_or_else(|| contributed(state, value, method, args), Ok)
}

fn of_text(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "rsplit" => {
            let (separator, most, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.map_or_else(|| kwargs.get("sep"), |it| Ok(Some(it)))?;
            let most = most.map_or_else(|| kwargs.get("maxsplit"), |it| Ok(Some(it)))?;
            kwargs.assert_all_used()?;
            list(rsplit(text, separator, most.unwrap_or(-1))?)
        }
        "partition" => {
            let separator = separator(args)?;
            let parts = text.split_once(separator);
            list(parts.map_or([text, "", ""], |(a, b)| [a, separator, b]))
        }
        "rpartition" => {
            let separator = separator(args)?;
            let parts = text.rsplit_once(separator);
            list(parts.map_or(["", "", text], |(a, b)| [a, separator, b]))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "zfill" => {
            let (width,) = from_args(args)?;
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            let (zeros, sign) = (missing(text, width)?, &text[..text.len() - digits.len()]);
            Value::from(format!("{sign}{}{digits}", "0".repeat(zeros)))
        }
        "ljust" | "rjust" | "center" => Value::from(padded(text, method, args)?),
        "find" | "index" => position(text, method, args, |text, part| text.find(part))?,
        "rfind" | "rindex" => position(text, method, args, |text, part| text.rfind(part))?,
        _ => return Ok(None),
    }))
}

fn list<'t>(parts: impl IntoIterator<Item = &'t str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn invalid(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

fn separator(args: &[Value]) -> Result<&str, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() { Err(invalid("empty separator")) } else { Ok(separator) }
}

/// What Python calls white space.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// At most `most` splits from the right, any number where that is negative; without a separator at white space,
/// where no part is empty.
fn rsplit<'t>(text: &'t str, separator: Option<&str>, most: i64) -> Result<Vec<&'t str>, Error> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(invalid("empty separator")),
        Some(separator) => text.rsplitn(most.saturating_add(1), separator).collect(),
        None => words_from_right(text, most),
    };
    parts.reverse();
    Ok(parts)
}

fn words_from_right(text: &str, most: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while let Some((before, word)) = split_last(rest).filter(|_| words.len() < most) {
        words.push(word);
        rest = before.trim_end_matches(is_space);
    }
    words.extend(Some(rest).filter(|rest| !rest.is_empty()));
    words
}

/// What stands before the last white space and behind it.
fn split_last(text: &str) -> Option<(&str, &str)> {
    let last = text.rfind(is_space)?;
    let word = text[last..].trim_start_matches(is_space);
    Some((&text[..last], word))
}

/// Characters that `text` has less than `width`.
fn missing(text: &str, width: i64) -> Result<usize, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    if width > WIDEST {
        return Err(invalid("a text of more than 1,000,000 characters is not padded"));
    }
    Ok(width.saturating_sub(text.chars().count()))
}

fn padded(text: &str, method: &str, args: &[Value]) -> Result<String, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let mut fill = fill.unwrap_or(" ").chars();
    let (Some(fill), None) = (fill.next(), fill.next()) else {
        return Err(invalid("the fill character must be exactly one character long"));
    };
    let missing = missing(text, width)?;
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        // CPython's: an odd one goes left where the width is odd, too.
        _ => missing / 2 + usize::from(missing % 2 == 1 && width % 2 == 1),
    };
    let some = |count: usize| fill.to_string().repeat(count);
    Ok(format!("{}{text}{}", some(left), some(missing - left)))
}

/// A range as a slice has it: negative ends count from behind, none is beyond `length`.
fn range(length: usize, start: Option<i64>, end: Option<i64>) -> (usize, usize) {
    let place = |at: i64| {
        let from_behind = || length.saturating_sub(at.unsigned_abs() as usize);
        usize::try_from(at).unwrap_or_else(|_| from_behind())
    };
    (start.map_or(0, place), end.map_or(length, place).min(length))
}

/// Where a part stands in a text, or in a part of the text; -1, or an error for `index` and `rindex`, where it
/// does not.
fn position(
    text: &str,
    method: &str,
    args: &[Value],
    find: fn(&str, &str) -> Option<usize>,
) -> Result<Value, Error> {
    let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let places: Vec<usize> =
        text.char_indices().map(|(place, _)| place).chain([text.len()]).collect();
    let (start, end) = range(places.len() - 1, start, end);
    let within = (start <= end).then(|| &text[places[start]..places[end]]);
    let found =
        within.and_then(|within| Some(start + within[..find(within, part)?].chars().count()));
    match found {
        Some(at) => Ok(Value::from(at)),
        None if method.ends_with("index") => Err(invalid("substring not found")),
        None => Ok(Value::from(-1)),
    }
}

/// `list.index`.
fn of_list(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (item, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let items: Vec<Value> = list.try_iter()?.collect();
    let (start, end) = range(items.len(), start, end);
    let mut within = items.iter().enumerate().take(end).skip(start);
    let found = within.find(|(_, other)| *other == item);
    found.map(|(at, _)| Value::from(at)).ok_or_else(|| invalid("the item is not in the list"))
}

/// `truncate(length=255, killwords=False, end='...', leeway=5)`: a text that is longer by more than the leeway is
/// cut to `length` characters, `end` included, behind a whole word unless words may be killed.
pub(super) fn truncate(
    value: Value,
    Rest(args): Rest<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    if value.is_undefined() {
        return Ok(value);
    }
    let Some(text) = value.as_str() else {
        return Err(invalid("only a text can be truncated"));
    };
    let given = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        args.get(index).cloned().map_or_else(|| kwargs.get(name), |value| Ok(Some(value)))
    };
    let count = |value: Option<Value>, usual| value.map_or(Ok(usual), usize::try_from);
    let length = count(given(0, "length")?, 255)?;
    let kills = given(1, "killwords")?.is_some_and(|value| value.is_true());
    let end = given(2, "end")?;
    let end = end.as_ref().and_then(Value::as_str).unwrap_or("...");
    let leeway = count(given(3, "leeway")?.filter(|it| !it.is_none()), LEEWAY)?;
    kwargs.assert_all_used()?;
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(invalid("truncate: the length is less than that of the end"));
    };
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(value);
    }
    let cut: String = text.chars().take(kept).collect();
    let whole = cut.rsplit_once(' ').filter(|_| !kills).map_or(&*cut, |(words, _)| words);
    Ok(Value::from(format!("{whole}{end}")))
}

#[cfg(test)]
mod tests {
    use crate::data::jinja::environment;

    /// Expected texts: Jinja2 3.1 under Python 3.11, tuples as lists.
    #[test]
    fn methods_are_those_of_python() {
        for (source, expected) in CASES {
            let rendered = environment(0).render_str(&format!("{{{{ {source} }}}}"), ());
            assert_eq!(rendered.unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for (source, cause) in [
            ("'a'.rsplit('')", "empty separator"),
            ("'a'.partition('')", "empty separator"),
            ("'a'.rpartition('')", "empty separator"),
            ("'a'.rsplit(max=1)", "max"),
            ("'a'.center(3, 'xy')", "exactly one character"),
            ("'a'.ljust(3, '')", "exactly one character"),
            ("'a'.rjust(9999999999)", "1,000,000 characters"),
            ("'abc'.index('z')", "substring not found"),
            ("'abc'.rindex('a', 1)", "substring not found"),
            ("[1, 2].index(3)", "not in the list"),
            ("'a b c'|truncate(2)", "less than that of the end"),
            ("[1]|truncate", "only a text"),
            ("'a'|truncate(lenght=3)", "lenght"),
            ("'a'.nothing()", "nothing"),
        ] {
            let rendered = environment(0).render_str(&format!("{{{{ {source} }}}}"), ());
            let error = format!("{:#}", rendered.unwrap_err());
            assert!(error.contains(cause), "{source}: {error}");
        }
    }

    const CASES: [(&str, &str); 64] = [
        ("'a,b,c'.rsplit(',')", "['a', 'b', 'c']"),
        ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
        ("'a,b,c'.rsplit(',', maxsplit=1)", "['a,b', 'c']"),
        ("'a,b,c'.rsplit(sep=',', maxsplit=0)", "['a,b,c']"),
        ("'  a b  c '.rsplit()", "['a', 'b', 'c']"),
        ("'  a b  c '.rsplit(none, 1)", "['  a b', 'c']"),
        ("'  a b '.rsplit(none, 0)", "['  a b']"),
        ("'a b c '.rsplit(maxsplit=2)", "['a', 'b', 'c']"),
        ("'   '.rsplit()", "[]"),
        ("''.rsplit()", "[]"),
        ("''.rsplit('x')", "['']"),
        ("'aaa'.rsplit('aa', 1)", "['a', '']"),
        ("'x<|end|>y<|end|>'.rsplit('<|end|>', -1)", "['x', 'y', '']"),
        ("'é→b→c'.rsplit('→', 1)", "['é→b', 'c']"),
        ("'a=b=c'.partition('=')", "['a', '=', 'b=c']"),
        ("'abc'.partition('=')", "['abc', '', '']"),
        ("'a=b=c'.rpartition('=')", "['a=b', '=', 'c']"),
        ("'abc'.rpartition('=')", "['', '', 'abc']"),
        ("'TestHook'.removeprefix('Test')", "Hook"),
        ("'TestHook'.removeprefix('Hook')", "TestHook"),
        ("'MiscTests'.removesuffix('Tests')", "Misc"),
        ("'MiscTests'.removesuffix('')", "MiscTests"),
        ("'42'.zfill(5)", "00042"),
        ("'-42'.zfill(5)", "-0042"),
        ("'+é'.zfill(4)", "+00é"),
        ("'--1'.zfill(5)", "-00-1"),
        ("'abc'.zfill(2)", "abc"),
        ("''.zfill(2)", "00"),
        ("'ab'.center(5, '*')", "**ab*"),
        ("'ab'.center(6, '*')", "**ab**"),
        ("'abc'.center(6, '*')", "*abc**"),
        ("'abc'.center(8, 'é')", "ééabcééé"),
        ("'a'.center(-3)", "a"),
        ("'é'.ljust(3, '.')", "é.."),
        ("'é'.rjust(3, '.')", "..é"),
        ("'ab'.rjust(1)", "ab"),
        ("'[' ~ 'ab'.ljust(4) ~ ']'", "[ab  ]"),
        ("'naïve'.find('v')", "3"),
        ("'naïve'.index('v')", "3"),
        ("'naïve→naïve'.rfind('v')", "9"),
        ("'naïve→naïve'.rindex('ï', 0, 8)", "2"),
        ("'naïve'.find('v', -1)", "-1"),
        ("'naïve'.find('v', -2)", "3"),
        ("'naïve'.find('z')", "-1"),
        ("'abc'.find('', 3)", "3"),
        ("'abc'.find('', 4)", "-1"),
        ("'abc'.find('', 3, 1)", "-1"),
        ("'abc'.rfind('')", "3"),
        ("'naïve'[:'naïve'.find('v')]", "naï"),
        ("'abcabc'.find('c', 0, -1)", "2"),
        ("'abcabc'.find('c', -99, 99)", "2"),
        ("[3, 'a', 3].index('a')", "1"),
        ("[3, 'a', 3].index(3, 1)", "2"),
        ("[3, 'a', 3].index(3, -1, 9)", "2"),
        ("'foo bar baz qux'|truncate(9)", "foo..."),
        ("'foo bar baz qux'|truncate(9, true)", "foo ba..."),
        ("'foo bar baz qux'|truncate(11)", "foo bar baz qux"),
        ("'foo bar baz qux'|truncate(11, false, '...', 0)", "foo bar..."),
        ("'foo bar baz qux'|truncate(9, end='→', leeway=0)", "foo bar→"),
        ("'foobarbazqux'|truncate(length=9, leeway=0)", "foobar..."),
        ("'éééééééé'|truncate(5, killwords=true, leeway=0)", "éé..."),
        ("'short'|truncate", "short"),
        ("('word ' * 60)|truncate|length", "252"),
        ("none_such|truncate", ""),
    ];
}
