//! Requests out of a file: JSON lines or CSV with a heading. `docs/SIMULATE.md` describes the columns.
//!
//! ```text
//! time_s,account,session,prompt_tokens,output_tokens         ours
//! TIMESTAMP,ContextTokens,GeneratedTokens                    Azure's published traces
//! {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, …]}     Mooncake's
//! ```

use std::collections::HashMap;

use serde_json::Value;

use crate::base::{Error, Result};
use crate::simulate::rng::mix;
use crate::simulate::traffic::{Piece, Request, Trace};

/// Tokens behind one of Mooncake's block hashes.
const HASHED_TOKENS: u32 = 512;

/// Reads a whole trace. Times count from its first request; `speed` 2 replays it in half the time.
///
/// # Errors
/// `BadInput` that names the line and what is wrong with it.
pub fn read(text: &str, speed: f64) -> Result<Trace> {
    let mut trace = Reader::default();
    let mut heading: Option<Vec<String>> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let row = if line.starts_with('{') {
            serde_json::from_str(line).map_err(|error| format!("is not JSON: {error}"))
        } else if let Some(names) = &heading {
            Ok(names.iter().cloned().zip(cells(line).map(cell)).collect())
        } else {
            heading = Some(cells(line).map(str::to_owned).collect());
            continue;
        };
        row.and_then(|row| trace.add(&row)).map_err(|error| Error::bad_input(format!("line {number} {error}")))?;
    }
    trace.finish(speed)
}

/// A line's cells. Quotes are taken off; a cell with a comma in it is not supported.
fn cells(line: &str) -> impl Iterator<Item = &str> {
    line.split(',').map(|cell| cell.trim().trim_matches('"'))
}

fn cell(text: &str) -> Value {
    match (text.is_empty(), text.parse::<f64>()) {
        (true, _) => Value::Null,
        (_, Ok(number)) => number.into(),
        (_, Err(_)) => text.into(),
    }
}

type Row = serde_json::Map<String, Value>;

#[derive(Default)]
struct Reader {
    accounts: Vec<String>,
    by_name: HashMap<String, u32>,
    requests: Vec<(f64, Request)>,
}

impl Reader {
    fn add(&mut self, row: &Row) -> Result<(), String> {
        let at_s = time(row)?;
        let prompt = needed(row, &["prompt_tokens", "input_length", "ContextTokens"])?;
        let output = needed(row, &["output_tokens", "output_length", "GeneratedTokens"])?;
        let account = match row.get("account").filter(|account| !account.is_null()) {
            Some(name) => name.as_str().map_or_else(|| name.to_string(), str::to_owned),
            None => "trace".into(),
        };
        let next = self.accounts.len() as u32;
        let account = *self.by_name.entry(account).or_insert_with_key(|name| {
            self.accounts.push(name.clone());
            next
        });
        let number = self.requests.len() as u64;
        let session = row.get("session").filter(|session| !session.is_null()).map(|session| name(session, 1));
        // What nobody shares is a text of its own.
        let own = session.unwrap_or_else(|| mix(mix(number) ^ 2));
        let mut pieces = Vec::new();
        let mut left = prompt;
        if let Some(ids) = row.get("hash_ids").and_then(Value::as_array) {
            for id in ids {
                let tokens = left.min(HASHED_TOKENS);
                left -= tokens;
                pieces.extend((tokens > 0).then(|| Piece::new(name(id, 3), tokens)));
            }
        } else if let Some(prefix) = row.get("prefix").filter(|prefix| !prefix.is_null()) {
            let tokens = needed(row, &["prefix_tokens"])?.min(left);
            left -= tokens;
            pieces.push(Piece::new(name(prefix, 4), tokens));
        }
        if left > 0 {
            pieces.push(Piece::new(own, left));
        }
        let priority = number_of(row, &["priority"])?.unwrap_or(0.0);
        let leaves_s = number_of(row, &["leaves_s"])?;
        let max_tokens = number_of(row, &["max_tokens"])?.map(|most| most as u32);
        let request = Request {
            at_ns: 0,
            account,
            priority: priority.clamp(-100.0, 100.0) as i8,
            prompt: pieces,
            // The session's text goes on with the answer, so that its next prompt finds both.
            answer: Piece { text: own, start: left, tokens: output },
            output,
            max_tokens,
            session,
            leaves_ns: leaves_s.map(|seconds| 1 + (seconds.max(0.0) * 1e9) as u64),
            conversation: None,
        };
        self.requests.push((at_s, request));
        Ok(())
    }

    fn finish(mut self, speed: f64) -> Result<Trace> {
        self.requests.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        let Some(&(first, _)) = self.requests.first() else {
            return Err(Error::bad_input(
                "holds no request: a heading and rows with time_s, prompt_tokens and output_tokens are needed",
            ));
        };
        let requests = self
            .requests
            .into_iter()
            .map(|(at_s, request)| Request { at_ns: 1 + ((at_s - first) / speed * 1e9) as u64, ..request });
        Ok(Trace { requests: requests.collect(), accounts: self.accounts })
    }
}

/// A name of a kind as a number.
fn name(value: &Value, kind: u64) -> u64 {
    let digest = blake3::hash(value.to_string().as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest.as_bytes()[..8]);
    mix(u64::from_le_bytes(bytes) ^ kind)
}

fn number_of(row: &Row, names: &[&str]) -> Result<Option<f64>, String> {
    let Some((name, value)) = names.iter().find_map(|&name| Some((name, row.get(name)?))) else { return Ok(None) };
    match value {
        Value::Null => Ok(None),
        value => match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(format!("has {name} = {value}: a number is needed")),
        },
    }
}

fn needed(row: &Row, names: &[&str]) -> Result<u32, String> {
    match number_of(row, names)? {
        Some(number) if (1.0..=1e9).contains(&number) => Ok(number as u32),
        Some(number) => Err(format!("has {} = {number}: at least 1 is needed", names[0])),
        None => Err(format!("has no {}", names.join(" or "))),
    }
}

/// Seconds, whatever they count from.
fn time(row: &Row) -> Result<f64, String> {
    if let Some(seconds) = number_of(row, &["time_s"])? {
        return Ok(seconds);
    }
    let Some(value) = row.get("timestamp").or_else(|| row.get("TIMESTAMP")) else {
        return Err("has no time_s, timestamp (milliseconds) or TIMESTAMP (a date)".into());
    };
    if let Some(millis) = value.as_f64() {
        return Ok(millis / 1e3);
    }
    let text = value.as_str().unwrap_or_default();
    let date: jiff::civil::DateTime = text
        .trim_end_matches('Z')
        .parse()
        .map_err(|_| format!("has the time {text:?}: seconds, or a date like 2023-11-16 18:15:46.68 is needed"))?;
    let since = date.duration_since(jiff::civil::date(2000, 1, 1).at(0, 0, 0, 0));
    Ok(since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::traffic::{length, tokens};

    fn requests(text: &str) -> Vec<Request> {
        read(text, 1.0).unwrap().requests
    }

    /// When and how long: seconds, prompt, output.
    fn check(text: &str, expected: &[(f64, usize, u32)]) {
        let seen: Vec<_> = requests(text)
            .iter()
            .map(|request| ((request.at_ns as f64 / 1e6).round() / 1e3, length(&request.prompt), request.output))
            .collect();
        assert_eq!(seen, expected, "{text}");
    }

    #[test]
    fn our_own_the_azure_and_the_mooncake_formats_are_read() {
        check("time_s,prompt_tokens,output_tokens\n5,100,7\n4.5,20,1\n", &[(0.0, 20, 1), (0.5, 100, 7)]);
        check(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
            &[(0.0, 374, 44), (4.315, 396, 109)],
        );
        check(
            r#"{"timestamp": 27482, "input_length": 700, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 1200, "output_length": 26, "hash_ids": [46, 48, 49]}"#,
            &[(0.0, 700, 52), (3.053, 1200, 26)],
        );
    }

    #[test]
    fn prompts_share_what_their_columns_say() {
        let common = |text: &str| {
            let requests = requests(text);
            let (one, other) = (tokens(&requests[0].prompt), tokens(&requests[1].prompt));
            one.iter().zip(&other).take_while(|(a, b)| a == b).count()
        };
        let line = |prefix, own| format!("{{\"time_s\": 1, \"prompt_tokens\": {own}, \"output_tokens\": 5{prefix}}}\n");
        assert_eq!(common(&(line("", 100) + &line("", 100))), 0);
        let prefix = ", \"prefix\": \"a\", \"prefix_tokens\": 60";
        assert_eq!(common(&(line(prefix, 100) + &line(prefix, 90))), 60);
        let hashes = ", \"hash_ids\": [1, 2]";
        assert_eq!(common(&(line(hashes, 1000) + &line(", \"hash_ids\": [1, 3]", 900))), 512);
        let session = ", \"session\": 4";
        let (first, second) = (line(session, 100), line(session, 150));
        assert_eq!(common(&(first.clone() + &second)), 100);
        let story = requests(&(first + &second));
        let answer: Vec<u32> = (0..5).map(|at| story[0].answer.token(at)).collect();
        assert_eq!(tokens(&story[1].prompt)[100..105], answer, "the answer is part of the next prompt");
    }

    #[test]
    fn a_wrong_line_is_named() {
        for (text, words) in [
            ("", "holds no request"),
            ("time_s,prompt_tokens,output_tokens\n1,2\n", "line 2 has no output_tokens"),
            ("time_s,prompt_tokens,output_tokens\n\n1,x,3\n", "line 3 has prompt_tokens"),
            ("time_s,prompt_tokens,output_tokens\n1,0,3\n", "at least 1"),
            ("{\"prompt_tokens\": 1, \"output_tokens\": 1}", "line 1 has no time_s"),
            ("{\"prompt_tokens\": ", "line 1 is not JSON"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1", "yesterday"),
        ] {
            let error = read(text, 1.0).expect_err(text);
            assert!(error.message().contains(words), "{error}");
        }
    }
}
