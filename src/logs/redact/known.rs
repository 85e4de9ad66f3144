//! How known secrets begin, and the names that unknown ones go by.

use super::marks::ones;

/// What a run behind a prefix is made of.
#[derive(Clone, Copy)]
pub(super) enum Run {
    /// Letters and digits.
    Plain,
    /// And `-` and `_`.
    Dashed,
    /// And `.` too.
    Dotted,
    Upper,
    Hex,
}

/// A prefix of keys: what follows it, and how long that is at least.
pub(super) type Prefix = (&'static str, Run, usize);

pub(super) const PREFIXES: &[Prefix] = &[
    ("sk-", Run::Dashed, 16),
    ("sk_live_", Run::Plain, 16),
    ("sk_test_", Run::Plain, 16),
    ("rk_live_", Run::Plain, 16),
    ("rk_test_", Run::Plain, 16),
    ("sk_", Run::Hex, 32),
    ("AIza", Run::Dashed, 30),
    ("AKIA", Run::Upper, 16),
    ("ASIA", Run::Upper, 16),
    ("ABIA", Run::Upper, 16),
    ("ACCA", Run::Upper, 16),
    ("ABSK", Run::Plain, 40),
    ("ghp_", Run::Plain, 30),
    ("gho_", Run::Plain, 30),
    ("ghu_", Run::Plain, 30),
    ("ghs_", Run::Plain, 30),
    ("ghr_", Run::Plain, 30),
    ("github_pat_", Run::Dashed, 22),
    ("glpat-", Run::Dashed, 16),
    ("xoxb-", Run::Dashed, 10),
    ("xoxp-", Run::Dashed, 10),
    ("xoxa-", Run::Dashed, 10),
    ("xoxr-", Run::Dashed, 10),
    ("xoxs-", Run::Dashed, 10),
    ("xoxe-", Run::Dashed, 10),
    ("xoxe.", Run::Dashed, 10),
    ("xapp-", Run::Dashed, 10),
    ("gsk_", Run::Plain, 20),
    ("hf_", Run::Plain, 30),
    ("r8_", Run::Plain, 30),
    ("pplx-", Run::Plain, 32),
    ("xai-", Run::Plain, 40),
    ("csk-", Run::Plain, 30),
    ("fw_", Run::Plain, 20),
    ("nvapi-", Run::Dashed, 30),
    ("tgp_v1_", Run::Dashed, 30),
    ("SG.", Run::Dotted, 40),
    ("npm_", Run::Plain, 30),
    ("pypi-", Run::Dashed, 50),
    ("dop_v1_", Run::Hex, 40),
    ("shpat_", Run::Hex, 24),
    ("ya29.", Run::Dashed, 20),
    ("GOCSPX-", Run::Dashed, 20),
    ("lsv2_pt_", Run::Dashed, 30),
    ("cfut_", Run::Dashed, 30),
    ("cfat_", Run::Dashed, 30),
    ("dapi", Run::Hex, 32),
    ("SK", Run::Hex, 32),
    ("AGE-SECRET-KEY-1", Run::Upper, 50),
    ("hvs.", Run::Dashed, 24),
    ("whsec_", Run::Plain, 24),
];

/// Words before a secret, in any case, as `name: value` or `name=value`, and how long the secret is at least.
pub(super) const NAMES: &[(&str, usize)] = &[
    ("api_key", 12),
    ("apikey", 12),
    ("api-key", 12),
    ("access_key", 12),
    ("accesskey", 12),
    ("access-key", 12),
    ("account_key", 12),
    ("accountkey", 12),
    ("private_key", 12),
    ("privatekey", 12),
    ("auth_key", 12),
    ("subscription-key", 12),
    ("secret_key", 8),
    ("secret", 8),
    ("token", 16),
    ("credential", 12),
    ("authorization", 8),
    ("passphrase", 6),
    ("password", 6),
    ("passwd", 6),
    ("pwd", 6),
];

/// Words that a secret follows, or begins with; `earer` and `asic` without their first letter, which is written large or small.
pub(super) const WORDS: [&str; 6] = [PEM, HOOK, "earer", "EARER", "asic", "ASIC"];
/// How a private key, a web hook and a JWT begin.
pub(super) const PEM: &str = "-----BEGIN ";
pub(super) const HOOK: &str = "hooks.slack.com/services/";
pub(super) const JWT: &[u8] = b"eyJ";

/// Of each place of a prefix, and each byte there: the prefixes that have it, a bit each.
const FITTING: [[u64; 256]; 3] = {
    let mut fitting = [[0; 256]; 3];
    let (mut number, mut place, mut byte) = (0, 0, 0);
    while number < PREFIXES.len() {
        let prefix = PREFIXES[number].0.as_bytes();
        while place < 3 {
            while byte < 256 {
                // What is shorter takes any byte.
                if place >= prefix.len() || prefix[place] as usize == byte {
                    fitting[place][byte] |= 1 << number;
                }
                byte += 1;
            }
            (place, byte) = (place + 1, 0);
        }
        (number, place) = (number + 1, 0);
    }
    fitting
};

/// The prefixes that a text may have which begins with these bytes.
pub(super) fn prefixes(begin: &[u8; 3]) -> impl Iterator<Item = &'static Prefix> {
    let [first, second, third] = begin.map(usize::from);
    ones(FITTING[0][first] & FITTING[1][second] & FITTING[2][third]).map(|number| &PREFIXES[number])
}

/// Whether one of [`NAMES`] ends with these letters.
#[inline]
pub(super) fn ends_name(end: &[u8; 3]) -> bool {
    // Only letters become letters so.
    matches!(
        &end.map(|byte| byte | 0x20),
        b"key" | b"ret" | b"ken" | b"ial" | b"ion" | b"ase" | b"ord" | b"swd" | b"pwd"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_and_name_is_known_by_its_three_letters() {
        for (prefix, _, least) in PREFIXES {
            let key = format!("{prefix}{}", "0".repeat(*least));
            let mut fitting = prefixes(key.as_bytes().first_chunk().unwrap());
            assert!(fitting.any(|(fitting, ..)| fitting == prefix), "{prefix}");
        }
        assert_eq!((prefixes(b"the").count(), prefixes(b"xox").count()), (0, 7));
        for (name, _) in NAMES {
            for name in [name.to_string(), name.to_uppercase()] {
                assert!(ends_name(name.as_bytes().last_chunk().unwrap()), "{name}");
            }
        }
        assert!(!ends_name(b"ent") && !ends_name(b"ole"));
    }
}
