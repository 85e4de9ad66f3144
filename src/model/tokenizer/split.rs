//! Cuts text into the pieces inside which byte-level BPE merges: words, numbers, punctuation, white space. Every family
//! of models has its own rule; GGUF files name it in `tokenizer.ggml.pre`.
//!
//!     "It's  12 km"  --gpt-2-->   It | 's | ␣ | ␣12 | ␣km
//!                    --smollm-->  It | 's | ␣␣ | 1 | 2 | ␣km
//!
//! The rules are published as regular expressions with the look-ahead `\s+(?!\S)|\s+`: white space leaves its last
//! character to the word behind it. That is done by hand here ([`Stage::leaves_space`]), so that the rest needs no
//! backtracking and its time grows with the text alone, whatever the text is.

use regex::Regex;

use crate::base::{Error, Result};

/// The cutting rule of a tokenizer: stages, each cutting the pieces of the one before.
#[derive(Debug)]
pub(super) struct Splitter {
    stages: Vec<Stage>,
}

#[derive(Debug)]
struct Stage {
    pattern: Regex,
    /// White space in front of something else leaves its last character to it.
    leaves_space: bool,
    /// The pattern takes white space up to a line break as a whole; only what follows the break leaves a character.
    keeps_lines: bool,
}

const CONTRACTIONS: &str = "'s|'t|'re|'ve|'m|'ll|'d";
const GPT2_REST: &str = r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const TIGHT: &str = r"\s*[\r\n]+|\s+";
/// A letter-like run that begins in upper and one that ends in lower case, as newer tokenizers cut CamelCase.
const UPPER: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
const LOWER: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";

impl Splitter {
    /// The rule of that name, and whether its tokenizers take a piece that is a token as that token without merging.
    ///
    /// # Errors
    /// `Unsupported` for names that are not known.
    pub(super) fn named(name: &str) -> Result<(Self, bool)> {
        let gpt2 = || stage(&format!("{CONTRACTIONS}{GPT2_REST}"), true, false);
        let llama3 = |digits: &str| {
            let pattern = format!(
                r"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TIGHT}"
            );
            stage(&pattern, true, true)
        };
        let camel = |tail: &str, digits: &str| {
            let pattern = format!(
                r"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{tail}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{tail}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TIGHT}"
            );
            stage(&pattern, true, true)
        };
        let plain = |pattern: &str| stage(pattern, false, false);
        let (stages, whole) = match name {
            "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" => (vec![gpt2()?], false),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
                (vec![plain(r"\p{N}")?, gpt2()?], false)
            }
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2" => {
                (vec![llama3(r"\p{N}{1,3}")?], true)
            }
            "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => (vec![llama3(r"\p{N}{1,3}")?], false),
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan" | "megrez" => (vec![llama3(r"\p{N}")?], false),
            "tekken" => (vec![camel("", r"\p{N}")?], true),
            "gpt-4o" | "llama4" => (vec![camel(&format!("(?i:{CONTRACTIONS})?"), r"\p{N}{1,3}")?], false),
            "deepseek-v3" => {
                let words = format!(
                    r"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{TIGHT}"
                );
                (vec![plain(r"\p{N}{1,3}")?, plain("[一-龥぀-ゟ゠-ヿ]+")?, stage(&words, true, true)?], false)
            }
            "falcon" => (vec![plain(r"[\p{P}$+<=>^~|`]+")?, gpt2()?, plain("[0-9][0-9][0-9]")?], false),
            // Files without a name, and those made before names were given.
            "" | "default" => {
                let stages = [plain(r"[\p{P}$+<=>^~|]+")?, gpt2()?, plain(r"\p{N}+")?, plain("[0-9][0-9][0-9]")?];
                (Vec::from(stages), false)
            }
            _ => {
                return Err(Error::unsupported(format!(
                    "the pre-tokenizer {name:?} is not supported yet; load the model from safetensors with its tokenizer.json"
                )));
            }
        };
        Ok((Self { stages }, whole))
    }

    /// Calls `each` with every piece, in order; together they are the text.
    pub(super) fn pieces<'t>(&self, text: &'t str, each: &mut dyn FnMut(&'t str)) {
        split(&self.stages, text, each);
    }
}

fn stage(pattern: &str, leaves_space: bool, keeps_lines: bool) -> Result<Stage> {
    let pattern = Regex::new(pattern).map_err(|error| Error::internal("a pattern is wrong").with_source(error))?;
    Ok(Stage { pattern, leaves_space, keeps_lines })
}

fn split<'t>(stages: &[Stage], text: &'t str, each: &mut dyn FnMut(&'t str)) {
    let Some((stage, later)) = stages.split_first() else { return each(text) };
    let mut at = 0;
    while let Some(found) = stage.pattern.find_at(text, at) {
        if found.start() > at {
            split(later, &text[at..found.start()], each);
        }
        let end = stage.end(text, found);
        split(later, &text[found.start()..end], each);
        at = end;
    }
    if at < text.len() {
        split(later, &text[at..], each);
    }
}

impl Stage {
    /// Where the piece really ends: see [`Stage::leaves_space`].
    fn end(&self, text: &str, found: regex::Match<'_>) -> usize {
        let end = found.end();
        if !self.leaves_space || end == text.len() || text[end..].starts_with(char::is_whitespace) {
            return end;
        }
        let Some(last) = found.as_str().chars().next_back().filter(|last| last.is_whitespace()) else { return end };
        let line = self.keeps_lines && matches!(last, '\r' | '\n');
        let start_of_last = end - last.len_utf8();
        if line || start_of_last == found.start() || !found.as_str().trim_start().is_empty() {
            return end;
        }
        start_of_last
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 9] =
        ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3", "falcon", "default"];

    fn pieces<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        cut(&Splitter::named(name).unwrap().0, text)
    }

    fn cut<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::new();
        splitter.pieces(text, &mut |piece| pieces.push(piece));
        pieces
    }

    #[test]
    fn each_family_cuts_in_its_own_way() {
        let check = |name: &str, text: &str, expected: &[&str]| assert_eq!(pieces(name, text), expected, "{name}");
        check("gpt-2", "It's  12 km\n\n x", &["It", "'s", " ", " 12", " km", "\n\n", " x"]);
        check("smollm", "It's  12 km", &["It", "'s", "  ", "1", "2", " km"]);
        check("llama-bpe", "IT'S 12345 a.b\n\n  c", &["IT", "'S", " ", "123", "45", " a", ".b", "\n\n", " ", " c"]);
        check("qwen2", "12 ok!\n\n", &["1", "2", " ok", "!\n\n"]);
        check("tekken", "HelloWorld a/b", &["Hello", "World", " a", "/b"]);
        check("gpt-4o", "HelloWorld's 1234", &["Hello", "World's", " ", "123", "4"]);
        check("deepseek-v3", "12345中文ok .x!y", &["123", "45", "中文", "ok", " .", "x", "!y"]);
        check("default", "a, 1234", &["a", ",", " ", "123", "4"]);
        check("gpt-2", "a   ", &["a", "   "]);
        check("gpt-2", "a \t\n b", &["a", " \t\n", " b"]);
        check("llama-bpe", "a \t\n b", &["a", " \t\n", " b"]);
        check("llama-bpe", "a\t\tb", &["a", "\t", "\tb"]);
        check("gpt-2", "", &[]);
    }

    #[test]
    fn an_unknown_rule_is_named() {
        let error = Splitter::named("klingon").unwrap_err();
        assert!(error.message().contains("\"klingon\" is not supported yet"), "{error}");
    }

    #[test]
    fn a_megabyte_of_space_takes_no_time() {
        for name in NAMES {
            let text = " ".repeat(1 << 20) + "x" + &"\n ".repeat(1 << 19) + "x";
            let started = std::time::Instant::now();
            assert_eq!(pieces(name, &text).concat().len(), text.len());
            assert!(started.elapsed().as_secs() < 5, "{name}: {:?}", started.elapsed());
        }
    }

    proptest! {
        #[test]
        fn pieces_are_never_empty_and_make_up_the_text(text in "(?s).{0,60}", spaced in "[a-z \t\r\n0-9'!]{0,40}") {
            static ALL: LazyLock<Vec<Splitter>> =
                LazyLock::new(|| NAMES.iter().map(|name| Splitter::named(name).unwrap().0).collect());
            for splitter in ALL.iter() {
                for text in [&text, &spaced] {
                    let pieces = cut(splitter, text);
                    prop_assert!(pieces.iter().all(|piece| !piece.is_empty()));
                    prop_assert_eq!(&pieces.concat(), text);
                }
            }
        }
    }
}
