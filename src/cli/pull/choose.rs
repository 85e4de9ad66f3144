//! Which files of a repository are worth their bytes. Pure: names in, names out.

use std::collections::BTreeMap;

use super::hub::{RemoteFile, Repo};
use crate::base::{Error, Result};

/// What to do about a repository.
#[derive(Debug, PartialEq)]
pub enum Choice {
    /// These files.
    Settled(Vec<RemoteFile>),
    /// One of these, each a whole model; `preferred` is an index.
    Quantisations {
        /// In the hub's order.
        offered: Vec<Offer>,
        /// What to take when nobody is asked.
        preferred: usize,
    },
}

/// One quantisation of a GGUF repository.
#[derive(Debug, PartialEq)]
pub struct Offer {
    /// `Q4_K_M`, or the file's name where it says none.
    pub name: String,
    /// More than one when the model is split.
    pub files: Vec<RemoteFile>,
}

/// What we would take, best first: small enough for most machines, close to the original.
const PREFERRED: [&str; 9] = ["Q4_K_M", "Q8_0", "Q5_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q6_K", "BF16", "F16"];

/// Small files beside safetensors that describe the model.
const COMPANIONS: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
];

/// Picks by pattern if there are any, else by what we know of models.
pub fn choose(repo: &Repo, files: &[RemoteFile], patterns: &[String]) -> Result<Choice> {
    if !patterns.is_empty() {
        return by_pattern(repo, files, patterns).map(Choice::Settled);
    }
    let safetensors = safetensors(files);
    if !safetensors.is_empty() {
        let companions = files.iter().filter(|file| COMPANIONS.contains(&file.path.as_str()));
        return Ok(Choice::Settled(companions.chain(safetensors).cloned().collect()));
    }
    let offered = quantisations(files);
    if !offered.is_empty() {
        let rank = |offer: &Offer| PREFERRED.iter().position(|name| *name == offer.name).unwrap_or(PREFERRED.len());
        let preferred = (0..offered.len()).min_by_key(|&index| rank(&offered[index])).unwrap_or(0);
        return Ok(Choice::Quantisations { offered, preferred });
    }
    Err(crate::cli::failed(format!(
        "{repo} has neither GGUF nor safetensors weights: `--list --file '*'` shows its files, --file picks some"
    )))
}

fn by_pattern(repo: &Repo, files: &[RemoteFile], patterns: &[String]) -> Result<Vec<RemoteFile>> {
    let fits = |pattern: &str, path: &str| {
        matches(pattern, path) || path.rsplit('/').next().is_some_and(|name| matches(pattern, name))
    };
    if let Some(lost) = patterns.iter().find(|pattern| !files.iter().any(|file| fits(pattern, &file.path))) {
        let some: Vec<_> = files.iter().take(12).map(|file| file.path.as_str()).collect();
        let more = if files.len() > some.len() { " …" } else { "" };
        return Err(Error::bad_input(format!(
            "no file of {repo} matches {lost:?}: there are {}{more}",
            some.join(", ")
        )));
    }
    Ok(files.iter().filter(|file| patterns.iter().any(|pattern| fits(pattern, &file.path))).cloned().collect())
}

/// Weights at the top of the repository. `consolidated.*` is the same model once more, for another program.
fn safetensors(files: &[RemoteFile]) -> Vec<&RemoteFile> {
    let top = |file: &&RemoteFile| file.path.ends_with(".safetensors") && !file.path.contains('/');
    let all: Vec<_> = files.iter().filter(top).collect();
    let named: Vec<_> = all.iter().copied().filter(|file| file.path.starts_with("model")).collect();
    if named.is_empty() { all } else { named }
}

/// GGUF files grouped into models: parts of a split belong together; projectors and importance matrices are no models.
fn quantisations(files: &[RemoteFile]) -> Vec<Offer> {
    let mut groups: BTreeMap<String, (usize, Vec<RemoteFile>)> = BTreeMap::new();
    for (order, file) in files.iter().enumerate() {
        let name = file.path.rsplit('/').next().unwrap_or(&file.path).to_ascii_lowercase();
        let Some(stem) = file.path.strip_suffix(".gguf") else { continue };
        if name.starts_with("mmproj") || name.contains("imatrix") {
            continue;
        }
        let group = groups.entry(whole_name(stem).to_owned()).or_insert((order, Vec::new()));
        group.1.push(file.clone());
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|(_, (order, _))| *order);
    groups.into_iter().map(|(stem, (_, files))| Offer { name: quantisation(&stem), files }).collect()
}

/// Without `-00001-of-00003`.
fn whole_name(stem: &str) -> &str {
    let Some((rest, total)) = stem.rsplit_once("-of-") else { return stem };
    let Some((rest, part)) = rest.rsplit_once('-') else { return stem };
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits(part) && digits(total) { rest } else { stem }
}

/// `Q4_K_M` out of `Some-Model-Q4_K_M` or `some.q4_k_m`: the last part that reads like a quantisation.
fn quantisation(stem: &str) -> String {
    let name = stem.rsplit('/').next().unwrap_or(stem);
    let is_one = |part: &&str| {
        let part = part.to_ascii_uppercase();
        let numbered = part.strip_prefix("IQ").or_else(|| part.strip_prefix('Q'));
        matches!(part.as_str(), "F16" | "F32" | "BF16")
            || numbered.is_some_and(|rest| {
                let mut parts = rest.split('_');
                parts.next().is_some_and(|bits| bits.len() == 1 && bits.bytes().all(|byte| byte.is_ascii_digit()))
                    && parts.next().is_some()
            })
    };
    let found = name.split(['-', '.']).rfind(is_one);
    found.map_or_else(|| name.to_owned(), str::to_ascii_uppercase)
}

/// Shell wildcards: `*` any run of characters, `?` one. Case counts.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    // The classic two-pointer walk: on a mismatch the last star swallows one more character.
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((at, swallowed)) = star else { return false };
                star = Some((at, swallowed + 1));
                p = at + 1;
                t = swallowed + 1;
            }
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &str) -> Vec<RemoteFile> {
        paths.split_whitespace().map(|path| RemoteFile { path: path.into(), size: Some(1), sha256: None }).collect()
    }

    fn check(paths: &str, patterns: &[&str], chosen: &str) {
        let repo = "o/m".parse().expect("a repository");
        let patterns: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        let picked = match choose(&repo, &files(paths), &patterns).expect(paths) {
            Choice::Settled(files) => files,
            Choice::Quantisations { mut offered, preferred } => offered.swap_remove(preferred).files,
        };
        let picked: Vec<_> = picked.into_iter().map(|file| file.path).collect();
        assert_eq!(picked.join(" "), chosen);
    }

    #[test]
    fn safetensors_come_with_what_describes_them_and_nothing_else() {
        check(
            "README.md config.json tokenizer.json model.safetensors pytorch_model.bin onnx/model.onnx original/x.safetensors",
            &[],
            "config.json tokenizer.json model.safetensors",
        );
        check(
            "config.json consolidated.safetensors model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
            &[],
            "config.json model.safetensors.index.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors",
        );
        check("adapter_config.json adapter.safetensors", &[], "adapter.safetensors");
    }

    #[test]
    fn of_many_quantisations_one_is_taken() {
        check("m-Q2_K.gguf m-Q8_0.gguf m-Q4_K_M.gguf m-f16.gguf", &[], "m-Q4_K_M.gguf");
        check("m.f16.gguf m.q8_0.gguf README.md", &[], "m.q8_0.gguf");
        check("m-IQ2_XS.gguf m-Q3_K_L.gguf", &[], "m-IQ2_XS.gguf");
        check("only.gguf mmproj-only-f16.gguf", &[], "only.gguf");
        check(
            "Q8_0/m-Q8_0.gguf Q4_K_M/m-Q4_K_M-00001-of-00002.gguf Q4_K_M/m-Q4_K_M-00002-of-00002.gguf",
            &[],
            "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf Q4_K_M/m-Q4_K_M-00002-of-00002.gguf",
        );
    }

    #[test]
    fn patterns_beat_what_we_think() {
        check("m-Q8_0.gguf m-Q4_K_M.gguf README.md", &["*Q8_0*", "README*"], "m-Q8_0.gguf README.md");
        check("a/b/c.json d.json", &["c.json"], "a/b/c.json");
        check("a/b/c.json d.json", &["a/*"], "a/b/c.json");
    }

    #[test]
    fn a_pattern_that_fits_nothing_says_what_there_is() {
        let repo = "o/m".parse().expect("a repository");
        let error = choose(&repo, &files("a.gguf b.gguf"), &["*Q9*".into()]).expect_err("fits nothing");
        assert!(error.message().contains("a.gguf, b.gguf"), "{error}");
        let error = choose(&repo, &files("pytorch_model.bin"), &[]).expect_err("no weights for us");
        assert!(error.message().contains("--file"), "{error}");
    }

    #[test]
    fn wildcards_match_as_in_a_shell() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("*Q4*", "m-Q4_K_M.gguf", true),
            ("*.gguf", "m.gguf.part", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac", false),
            ("**x", "x", true),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
        }
    }
}
