//! GBNF, llama.cpp's notation, written as Lark.
//!
//! ```text
//! root ::= "x" [0-9]+ | ws root      ──>      start: r0
//! ws   ::= [ \t]*                             r0: "x" /[0-9]/+ | r1 r0
//!                                             r1: /[ \t]/*
//! ```
//!
//! A literal becomes one piece a character. What is longer than a character would be read greedily, and a class beside it
//! would lose the texts that only begin like it.

use std::collections::HashMap;
use std::fmt::Write;

use crate::base::{Error, Result};

/// Deepest nesting of brackets.
const MAX_DEPTH: usize = 200;

/// Translates a whole grammar.
///
/// # Errors
/// `BadInput` with the line that makes no sense.
pub(super) fn to_lark(text: &str) -> Result<String> {
    let mut reader = Reader { text, at: 0, rules: HashMap::new(), names: Vec::new(), used: Vec::new() };
    let mut lark = String::new();
    reader.skip(true);
    while reader.at < text.len() {
        let name = reader.name().ok_or_else(|| reader.wrong("a rule's name must stand here"))?;
        let rule = reader.rule(name);
        reader.skip(false);
        if !reader.eat("::=") {
            return Err(reader.wrong("`::=` must follow the name of a rule"));
        }
        if std::mem::replace(&mut reader.used[rule].1, true) {
            return Err(reader.wrong(&format!("the rule `{name}` stands here twice")));
        }
        reader.skip(true);
        let _ = write!(lark, "r{rule}: ");
        reader.alternates(&mut lark, 0)?;
        lark.push('\n');
        if reader.at < text.len() && !reader.eat("\n") {
            return Err(reader.wrong("a rule must end with its line"));
        }
        reader.skip(true);
    }
    if let Some(at) = reader.used.iter().position(|(_, defined)| !defined) {
        let (line, name) = (reader.used[at].0, reader.names[at]);
        return Err(Error::bad_input(format!("The grammar cannot be used: line {line}: there is no rule `{name}`.")));
    }
    match reader.rules.get("root") {
        Some(root) => Ok(format!("start: r{root}\n{lark}")),
        None => Err(Error::bad_input("The grammar cannot be used: there is no rule `root`.")),
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// Rules by name, in order of appearance.
    rules: HashMap<&'a str, usize>,
    names: Vec<&'a str>,
    /// The line of a rule's first mention, and whether it is defined.
    used: Vec<(usize, bool)>,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn line(&self) -> usize {
        self.text[..self.at].matches('\n').count() + 1
    }

    fn wrong(&self, words: &str) -> Error {
        Error::bad_input(format!("The grammar cannot be used: line {}: {words}.", self.line()))
    }

    fn eat(&mut self, word: &str) -> bool {
        let found = self.rest().starts_with(word);
        self.at += if found { word.len() } else { 0 };
        found
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    /// White space and comments; line breaks only where they do not end a rule.
    fn skip(&mut self, lines: bool) {
        loop {
            let rest = self.rest();
            let blank = rest.trim_start_matches(|c: char| matches!(c, ' ' | '\t' | '\r') || lines && c == '\n');
            self.at += rest.len() - blank.len();
            if !blank.starts_with('#') {
                return;
            }
            self.at += blank.find('\n').unwrap_or(blank.len());
        }
    }

    fn name(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))).unwrap_or(rest.len());
        self.at += end;
        (end > 0).then(|| &rest[..end])
    }

    fn rule(&mut self, name: &'a str) -> usize {
        let line = self.line();
        *self.rules.entry(name).or_insert_with(|| {
            self.names.push(name);
            self.used.push((line, false));
            self.names.len() - 1
        })
    }

    fn alternates(&mut self, out: &mut String, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(self.wrong("brackets are nested too deeply"));
        }
        loop {
            self.sequence(out, depth)?;
            if !self.eat("|") {
                return Ok(());
            }
            out.push_str(" | ");
            self.skip(true);
        }
    }

    fn sequence(&mut self, out: &mut String, depth: usize) -> Result<()> {
        let start = out.len();
        while let Some(first) = self.rest().chars().next() {
            let item = out.len();
            match first {
                '"' => self.literal(out)?,
                '[' => self.class(out)?,
                '.' => {
                    self.at += 1;
                    out.push_str(r"/(?s:.)/");
                }
                '(' => {
                    self.at += 1;
                    self.skip(true);
                    out.push('(');
                    self.alternates(out, depth + 1)?;
                    if !self.eat(")") {
                        return Err(self.wrong("a `(` is not closed"));
                    }
                    out.push(')');
                }
                _ => match self.name() {
                    Some(name) => {
                        let rule = self.rule(name);
                        let _ = write!(out, "r{rule}");
                    }
                    None => break,
                },
            }
            self.skip(depth > 0);
            self.repeats(out, item)?;
            self.skip(depth > 0);
            out.push(' ');
        }
        if out.len() == start {
            out.push_str("\"\"");
        }
        Ok(())
    }

    /// What follows an item that began at `item`: `*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}`.
    fn repeats(&mut self, out: &mut String, item: usize) -> Result<()> {
        let rest = self.rest();
        let mark = match rest.as_bytes().first() {
            Some(b'*' | b'+' | b'?') => &rest[..1],
            Some(b'{') => {
                let end = rest.find('}').ok_or_else(|| self.wrong("a `{` is not closed"))?;
                let counts = rest[1..end].split(',').map(str::trim);
                if counts.clone().count() > 2
                    || !counts.clone().all(|n| n.len() < 9 && n.bytes().all(|b| b.is_ascii_digit()))
                {
                    return Err(self.wrong("`{` must be followed by one or two numbers"));
                }
                &rest[..=end]
            }
            _ => return Ok(()),
        };
        self.at += mark.len();
        out.insert(item, '(');
        let _ = write!(out, "){mark}");
        Ok(())
    }

    fn literal(&mut self, out: &mut String) -> Result<()> {
        self.at += 1;
        let start = out.len();
        out.push('(');
        loop {
            let c = match self.next() {
                None | Some('\n') => return Err(self.wrong("a `\"` is not closed")),
                Some('"') => break,
                Some('\\') => self.escape()?,
                Some(c) => c,
            };
            let _ = write!(out, "/{}/ ", spelt(c));
        }
        if out.len() == start + 1 {
            out.truncate(start);
            out.push_str("\"\"");
        } else {
            out.push(')');
        }
        Ok(())
    }

    fn class(&mut self, out: &mut String) -> Result<()> {
        self.at += 1;
        out.push_str("/[");
        if self.eat("^") {
            out.push('^');
        }
        let mut empty = true;
        loop {
            let c = match self.next() {
                None | Some('\n') => return Err(self.wrong("a `[` is not closed")),
                Some(']') if empty => return Err(self.wrong("a class needs a character")),
                Some(']') => break,
                Some('\\') => self.escape()?,
                Some('-') if !empty && !self.rest().starts_with(']') => {
                    out.push('-');
                    continue;
                }
                Some(c) => c,
            };
            out.push_str(&spelt(c));
            empty = false;
        }
        out.push_str("]/");
        Ok(())
    }

    fn escape(&mut self) -> Result<char> {
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^')) => return Ok(c),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            _ => return Err(self.wrong("`\\` must be followed by one of n r t \\ \" [ ] x u U")),
        };
        let code = self.rest().get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32);
        let code = code.ok_or_else(|| self.wrong("an escape has no character"))?;
        self.at += digits;
        Ok(code)
    }
}

/// A character as a regular expression has it, inside a class and outside.
fn spelt(c: char) -> String {
    if c.is_ascii_alphanumeric() { c.to_string() } else { format!("\\x{{{:X}}}", u32::from(c)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_literals_and_classes_have_their_like_in_lark() {
        let check = |gbnf: &str, lark: &str| assert_eq!(to_lark(gbnf).unwrap(), lark, "{gbnf}");
        check("root ::= \"a-\" [0-9_]+", "start: r0\nr0: (/a/ /\\x{2D}/ ) (/[0-9\\x{5F}]/)+ \n");
        check(
            "root ::= # the answer\n  item{1,3} |\n  (\"\" |\n [^\\]\\x41])\nitem ::= root? .",
            "start: r0\nr0: (r1){1,3}  | (\"\"  | /[^\\x{5D}A]/ ) \nr1: (r0)? /(?s:.)/ \n",
        );
        check("root ::= a-b\na-b ::= |\"x\"", "start: r0\nr0: r1 \nr1: \"\" | (/x/ ) \n");
    }

    #[test]
    fn what_makes_no_sense_is_said_with_its_line() {
        for (gbnf, words) in [
            ("start ::= \"a\"", "no rule `root`"),
            ("root ::= \"a\"\nroot ::= \"b\"", "line 2: the rule `root` stands here twice"),
            ("root ::= \"a", "line 1: a `\"` is not closed"),
            ("root ::= other", "line 1: there is no rule `other`"),
            ("root ::= [a", "`[` is not closed"),
            ("root = \"a\"", "`::=` must follow"),
            ("root ::= \"a\"{1,2,3}", "one or two numbers"),
            ("root ::= ) \"a\"", "must end with its line"),
        ] {
            let error = to_lark(gbnf).unwrap_err();
            assert!(error.message().contains(words), "{gbnf}: {error}");
        }
        assert!(to_lark(&format!("root ::= {}", "(".repeat(100_000))).is_err());
    }
}
