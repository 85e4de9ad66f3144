//! Prompts for a benchmark: English-like words, different in every request, so that no cache shortens the work unless
//! a shared prefix is asked for. The same seed gives the same prompts.

use serde_json::{Value, json};

use crate::base::{Error, Result};

/// What requests ask.
pub enum Prompts {
    /// Made up, to a length.
    Random {
        /// Makes runs repeatable.
        seed: u64,
        /// Words that begin every prompt.
        shared_words: usize,
        /// Words that are this prompt's own.
        own_words: usize,
    },
    /// Out of a file, in turn.
    File(Vec<Value>),
}

/// One request's input: text, or messages for chat.
impl Prompts {
    /// Lines of a file: plain text, or JSON objects with `prompt` or `messages`.
    pub fn read(path: &std::path::Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::bad_input(format!("--prompt-file {}: {error}", path.display())))?;
        let line = |line: &str| match serde_json::from_str::<Value>(line) {
            Ok(object) if object["messages"].is_array() => object["messages"].clone(),
            Ok(object) if object["prompt"].is_string() => object["prompt"].clone(),
            _ => json!(line),
        };
        let prompts: Vec<_> = text.lines().filter(|text| !text.trim().is_empty()).map(line).collect();
        if prompts.is_empty() {
            return Err(Error::bad_input(format!("--prompt-file {} holds no prompt", path.display())));
        }
        Ok(Self::File(prompts))
    }

    /// The input of request `number`: a string, or an array of messages.
    pub fn get(&self, number: u64) -> Value {
        match self {
            Self::File(prompts) => prompts[(number % prompts.len() as u64) as usize].clone(),
            Self::Random { seed, shared_words, own_words } => {
                let shared = words(&mut Rng::new(*seed), *shared_words);
                // Far from every other request's stream, whatever the seed.
                let own = words(&mut Rng::new(seed ^ (number + 1).wrapping_mul(0xd134_2543_de82_ef95)), *own_words);
                json!(format!("{shared}{own}").trim_end())
            }
        }
    }
}

/// `prompt` as the body fields of an endpoint.
pub fn as_input(prompt: Value, chat: bool) -> (&'static str, Value) {
    match (chat, prompt) {
        (true, Value::String(text)) => ("messages", json!([{ "role": "user", "content": text }])),
        (true, messages) => ("messages", messages),
        (false, Value::Array(messages)) => {
            let texts: Vec<_> = messages.iter().filter_map(|message| message["content"].as_str()).collect();
            ("prompt", json!(texts.join("\n")))
        }
        (false, text) => ("prompt", text),
    }
}

fn words(rng: &mut Rng, count: usize) -> String {
    let mut text = String::with_capacity(count * 6);
    for _ in 0..count {
        text.push_str(WORDS[rng.below(WORDS.len())]);
        text.push(' ');
    }
    text
}

/// SplitMix64: tiny, and good enough to pick words and waiting times.
pub struct Rng(u64);

impl Rng {
    /// A stream of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Time to the next arrival of a Poisson process with this many arrivals a second.
    pub fn until_next_s(&mut self, rate: f64) -> f64 {
        let uniform = ((self.next() >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
        -uniform.ln() / rate
    }
}

/// Common words, one token each in most vocabularies. Which ones does not matter, that they differ does.
const WORDS: [&str; 233] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "her",
    "all", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "more", "no", "if",
    "out", "so", "said", "what", "up", "its", "about", "into", "than", "them", "can", "only", "other", "new", "some",
    "could", "time", "these", "two", "may", "then", "do", "first", "any", "my", "now", "such", "like", "our", "over",
    "man", "me", "even", "most", "made", "after", "also", "did", "many", "before", "must", "through", "back", "years",
    "where", "much", "your", "way", "well", "down", "should", "because", "each", "just", "those", "people", "how",
    "too", "little", "state", "good", "very", "make", "world", "still", "own", "see", "men", "work", "long", "get",
    "here", "between", "both", "life", "being", "under", "never", "day", "same", "another", "know", "while", "last",
    "might", "us", "great", "old", "year", "off", "come", "since", "against", "go", "came", "right", "used", "take",
    "three", "house", "water", "city", "river", "light", "stone", "green", "paper", "music", "bread", "winter",
    "summer", "garden", "road", "bridge", "ship", "train", "story", "letter", "number", "table", "window", "door",
    "field", "forest", "mountain", "island", "market", "school", "doctor", "king", "queen", "army", "peace", "war",
    "law", "money", "price", "trade", "art", "science", "machine", "engine", "power", "energy", "metal", "glass",
    "wood", "fire", "air", "earth", "sun", "moon", "star", "sky", "rain", "snow", "wind", "sea", "fish", "bird",
    "horse", "dog", "cat", "tree", "flower", "fruit", "seed", "root", "leaf", "hand", "heart", "mind", "voice", "face",
    "eye", "arm", "foot", "blood", "bone", "skin", "child", "mother", "father", "friend", "name",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u64, shared_words: usize, own_words: usize) -> Prompts {
        Prompts::Random { seed, shared_words, own_words }
    }

    fn text(prompts: &Prompts, number: u64) -> String {
        prompts.get(number).as_str().expect("text").to_owned()
    }

    #[test]
    fn a_seed_gives_the_same_prompts_and_every_request_its_own() {
        let prompts = random(7, 0, 50);
        assert_eq!(text(&prompts, 3), text(&random(7, 0, 50), 3));
        let firsts: std::collections::HashSet<String> =
            (0..200).map(|number| text(&prompts, number).split(' ').take(4).collect::<Vec<_>>().join(" ")).collect();
        assert!(firsts.len() > 198, "prompts must part within the first block: {}", firsts.len());
        assert_ne!(text(&prompts, 0), text(&random(8, 0, 50), 0));
    }

    #[test]
    fn a_shared_prefix_is_shared_and_counts_towards_the_length() {
        let prompts = random(7, 30, 20);
        let (one, other) = (text(&prompts, 0), text(&prompts, 1));
        let common = one.split(' ').zip(other.split(' ')).take_while(|(a, b)| a == b).count();
        assert!((30..34).contains(&common), "{common}");
        assert_eq!(one.split(' ').count(), 50);
    }

    #[test]
    fn arrivals_come_at_the_rate_asked_for() {
        let mut rng = Rng::new(1);
        let mean = (0..20_000).map(|_| rng.until_next_s(4.0)).sum::<f64>() / 20_000.0;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
    }

    #[test]
    fn prompts_of_a_file_may_be_text_or_messages() {
        let mut file = tempfile::NamedTempFile::new().expect("file");
        std::io::Write::write_all(
            &mut file,
            b"plain\n\n{\"prompt\": \"p\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"m\"}]}\n",
        )
        .expect("written");
        let prompts = Prompts::read(file.path()).expect("prompts");
        let inputs: Vec<_> = (0..4).map(|number| as_input(prompts.get(number), true).1[0]["content"].clone()).collect();
        assert_eq!(inputs, ["plain", "p", "m", "plain"]);
        assert_eq!(as_input(prompts.get(2), false), ("prompt", json!("m")));
    }
}
