//! Strings that end an answer, found in text that comes in pieces.

/// Hands text out up to the first of some strings. What may still become one is held back.
pub struct StopStrings<'a> {
    strings: &'a [String],
    held: String,
}

impl<'a> StopStrings<'a> {
    /// Before the first piece; none of `strings` is empty.
    pub fn new(strings: &'a [String]) -> Self {
        StopStrings { strings, held: String::new() }
    }

    /// Takes a piece; the text that it completes, and whether one of the strings follows.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.found();
        let rest = self.held.split_off(found.unwrap_or_else(|| self.begun()));
        let text = std::mem::replace(&mut self.held, rest);
        if found.is_some() {
            self.held.clear();
        }
        (text, found.is_some())
    }

    /// What was held back at the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the string begins that ends first.
    fn found(&self) -> Option<usize> {
        let places = self.strings.iter().filter_map(|string| {
            let begin = self.held.find(string.as_str())?;
            Some((begin + string.len(), begin))
        });
        places.min().map(|(_, begin)| begin)
    }

    /// Where in the text one of the strings may have begun.
    fn begun(&self) -> usize {
        let begins = |at: usize| {
            let rest = &self.held[at..];
            self.strings.iter().any(|string| string.starts_with(rest))
        };
        let mut places = self.held.char_indices().map(|(at, _)| at);
        places.find(|&at| begins(at)).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_may_become_one_is_held_back() {
        let stops = strings(&["\n\nUser:", "é!"]);
        let mut stream = StopStrings::new(&stops);
        for (piece, text) in
            [("a\n", "a"), ("b\n", "\nb"), ("\nUs", ""), ("\n\nU", "\n\nUs"), ("n é", "\n\nUn ")]
        {
            assert_eq!(stream.push(piece), (text.to_string(), false), "{piece:?}");
        }
        assert_eq!(stream.push("!é"), (String::new(), true));
        assert_eq!(stream.finish(), "");
        let mut unfinished = StopStrings::new(&stops);
        assert_eq!(unfinished.push("c\n\nUser"), ("c".to_string(), false));
        assert_eq!(unfinished.finish(), "\n\nUser");
    }

    /// However the text is cut into pieces, it ends before the string that ends first.
    #[test]
    fn the_cut_of_pieces_does_not_matter() {
        let text = "aabaabaaab aabé→x";
        for (stops, expected) in [
            (&["aaab"][..], "aabaab"),
            (&["abaaa", "aab "], "aaba"),
            (&["baaab", "aaa"], "aabaab"),
            (&["→"], "aabaabaaab aabé"),
            (&["aabc"], text),
            (&[], text),
        ] {
            let stops = strings(stops);
            for size in 1..=text.chars().count() {
                let mut stream = StopStrings::new(&stops);
                let mut got = String::new();
                let characters: Vec<char> = text.chars().collect();
                for piece in characters.chunks(size) {
                    let (text, stopped) = stream.push(&piece.iter().collect::<String>());
                    got.push_str(&text);
                    if stopped {
                        break;
                    }
                }
                got.push_str(&stream.finish());
                assert_eq!(got, expected, "{stops:?} in pieces of {size}");
            }
        }
    }
}
