//! Numbers that are somebody's: payment cards and phone numbers.
//!
//! A number is groups of digits with a blank, dash, dot or bracket between. Cards must begin as cards do and pass Luhn's test. Phone numbers must
//! look like one of the ways in which people write them, or stand behind a word that says so: bare digits are an id or a count far more often.

use std::ops::Range;

/// Groups of a number that are looked at.
const MOST: usize = 10;
/// Of two neighbouring blocks around the shortest number, one has as many.
const FEW: u32 = 4;
/// Digits of the shortest number.
const SHORTEST: usize = 7;
/// Digits of the shortest card.
const SHORTEST_CARD: usize = 14;

/// Words that a phone number follows.
const PHONES: [&str; 16] = [
    "phone",
    "telephone",
    "cellphone",
    "mobile",
    "mobil",
    "cell",
    "fax",
    "whatsapp",
    "call me",
    "text me",
    "sms",
    "handy",
    "telefon",
    "teléfono",
    "tel",
    "dial",
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    Card,
    Phone,
}

/// A search that goes on from block to block of a text.
#[derive(Default)]
pub(super) struct Numbers {
    /// What lies before has been looked at.
    at: usize,
    /// The digits of the block before.
    before: u64,
}

impl Numbers {
    /// Looks at the next block of a text, closely where digits are dense. `is_exact`: what stands before a number counts.
    #[inline]
    pub(super) fn search(
        &mut self,
        text: &[u8],
        begin: usize,
        digits: u64,
        is_exact: bool,
        hears: impl FnMut(Range<usize>, Found),
    ) {
        let before = std::mem::replace(&mut self.before, digits);
        if digits != 0 && digits.count_ones() >= FEW {
            self.look_around(text, begin, (before, digits), is_exact, hears);
        }
    }

    fn look_around(
        &mut self,
        text: &[u8],
        begin: usize,
        (before, digits): (u64, u64),
        is_exact: bool,
        mut hears: impl FnMut(Range<usize>, Found),
    ) {
        // A number may have begun in the block before: in its second half.
        let digits = u128::from(digits) << 32 | u128::from(before >> 32);
        self.at = self.at.max(begin.saturating_sub(32));
        while let Some(digit) = next(digits, self.at + 32 - begin).map(|bit| begin + bit - 32) {
            // Most digits stand alone: in ids, in names of models.
            let alone = text[digit..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            if alone < SHORTEST && gap(&text[digit + alone..]) == 0 {
                self.at = digit + alone;
                continue;
            }
            // It begins with a digit, or with a plus, a bracket or both before it.
            let mut first = digit;
            for sign in *b"(+" {
                first -= usize::from(first > self.at && text[first - 1] == sign);
            }
            self.at = look(text, first, is_exact, &mut hears);
        }
    }
}

/// The first bit that is set from here on.
fn next(bits: u128, from: usize) -> Option<usize> {
    let rest = bits.checked_shr(from as u32)?;
    (rest != 0).then(|| from + rest.trailing_zeros() as usize)
}

/// Whether a field of this name holds a phone number.
pub(super) fn names_phone(name: &str) -> bool {
    // Most do not end like one of these.
    if !matches!(
        name.as_bytes().last(),
        Some(b'e' | b'E' | b'l' | b'L' | b'x' | b'X' | b'p' | b'P' | b'n' | b'N' | b'r' | b'R')
    ) {
        return false;
    }
    let name = name.to_ascii_lowercase();
    ["phone", "mobile", "telephone", "tel", "fax", "whatsapp", "msisdn"].iter().any(|word| {
        name.strip_suffix("_number").or_else(|| name.strip_suffix("number")).unwrap_or(&name).ends_with(word)
            && !name.ends_with("hotel")
    })
}

/// Whether a text is nothing but a number that could be dialled.
pub(super) fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b' ' | b'+' | b'-' | b'.' | b'/' | b'(' | b')'))
        && (SHORTEST..=15).contains(&text.bytes().filter(u8::is_ascii_digit).count())
}

/// Whether a text is nothing but the number of a card.
pub(super) fn is_card(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_digit())
        && card(text.as_bytes(), std::slice::from_ref(&(0..text.len())))
}

/// Judges the number that begins here; returns where to look on.
fn look(text: &[u8], begin: usize, is_exact: bool, hears: &mut impl FnMut(Range<usize>, Found)) -> usize {
    let mut groups: [Range<usize>; MOST] = Default::default();
    let mut count = 0;
    let mut at = begin + usize::from(text[begin] == b'+');
    at += usize::from(text.get(at) == Some(&b'('));
    let mut end = at;
    while count < MOST {
        let digits = text[at..].iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len() - at);
        if digits == 0 {
            break;
        }
        groups[count] = at..at + digits;
        count += 1;
        end = at + digits;
        at = end + gap(&text[end..]);
        if at == end {
            break;
        }
    }
    if count == 0 {
        return begin + 1;
    }
    let groups = &groups[..count];
    if text[begin] == b'(' && text.get(groups[0].end) != Some(&b')') {
        // A number in brackets, not one that begins with its area in brackets.
        return groups[0].start;
    }
    let digits: usize = groups.iter().map(ExactSizeIterator::len).sum();
    if digits < SHORTEST || (is_exact && !is_free(text, begin)) {
        return end;
    }
    if matches!(text.get(end), Some(byte) if byte.is_ascii_alphabetic() || *byte == b'_' || *byte == b'%') && is_exact {
        return end;
    }
    for first in 0..if digits < SHORTEST_CARD { 0 } else { count } {
        // A fraction is no number of its own.
        if first > 0 && text[groups[first].start - 1] == b'.' {
            continue;
        }
        if let Some(last) = (first..count).rev().find(|last| card(text, &groups[first..=*last])) {
            hears(groups[first].start..groups[last].end, Found::Card);
            return groups[last].end;
        }
    }
    if let Some(found) = phone(text, begin, groups, is_exact) {
        hears(begin..found, Found::Phone);
        return found;
    }
    end
}

/// Bytes between two groups: one or two signs.
fn gap(text: &[u8]) -> usize {
    if !matches!(text.first(), Some(b' ' | b'-' | b'.' | b'/' | b'(' | b')' | 0xc2 | 0xe2)) {
        return 0;
    }
    let sign = |at: usize| match text.get(at..).unwrap_or_default() {
        [b' ' | b'-' | b'.' | b'/' | b'(' | b')', ..] => 1,
        // A blank that does not break, a dash that does not, and a longer one.
        [0xc2, 0xa0, ..] => 2,
        [0xe2, 0x80, 0x91 | 0x93, ..] => 3,
        _ => 0,
    };
    let mut length = 0;
    for _ in 0..3 {
        length += sign(length);
    }
    match text.get(length) {
        Some(byte) if byte.is_ascii_digit() => length,
        _ => 0,
    }
}

/// Whether what stands before lets a number begin.
fn is_free(text: &[u8], begin: usize) -> bool {
    let Some(before) = begin.checked_sub(1).map(|at| text[at]) else { return true };
    !(before.is_ascii_alphanumeric() || matches!(before, b'_' | b'.' | b'-' | b'/' | b'$' | b'#' | b'+' | b'%' | b'@'))
}

fn card(text: &[u8], groups: &[Range<usize>]) -> bool {
    let digits = || groups.iter().flat_map(|group| &text[group.clone()]).map(|byte| u32::from(byte - b'0'));
    let length: usize = groups.iter().map(ExactSizeIterator::len).sum();
    if !(SHORTEST_CARD..=19).contains(&length) {
        return false;
    }
    let is_grouped = groups.windows(2).all(|pair| {
        let sign = &text[pair[0].end..pair[1].start];
        matches!(sign, b" " | b"-" | [0xc2, 0xa0] | [0xe2, 0x80, 0x91]) && pair[0].len() >= 3
    });
    let start = digits().take(6).fold(0, |start, digit| start * 10 + digit);
    let (two, three, four) = (start / 10_000, start / 1000, start / 100);
    let is_known = match length {
        14 => two == 36 || two == 38 || (300..=305).contains(&three),
        15 => two == 34 || two == 37,
        16 | 19 if two / 10 == 4 => true,
        16 => {
            (51..=55).contains(&two)
                || (2221..=2720).contains(&four)
                || four == 6011
                || two == 65
                || two == 62
                || two == 35
                || (644..=649).contains(&three)
        }
        17..=19 => two == 62 || four == 6011,
        _ => false,
    };
    is_grouped && is_known && luhn(digits(), length)
}

fn luhn(digits: impl Iterator<Item = u32>, length: usize) -> bool {
    let sum: u32 = digits
        .enumerate()
        .map(|(at, digit)| match (length - at) % 2 {
            1 => digit,
            _ if digit > 4 => digit * 2 - 9,
            _ => digit * 2,
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Where a phone number that begins here ends.
fn phone(text: &[u8], begin: usize, groups: &[Range<usize>], is_exact: bool) -> Option<usize> {
    let digits = |groups: &[Range<usize>]| groups.iter().map(ExactSizeIterator::len).sum::<usize>();
    let sign = |at: usize| groups.get(at + 1).map_or(&b""[..], |next| &text[groups[at].end..next.start]);
    let starts = |at: usize| groups.get(at).map_or(0, |group| text[group.start]);
    let lengths = |wanted: &[usize]| {
        groups.len() >= wanted.len() && groups.iter().zip(wanted).all(|(group, wanted)| group.len() == *wanted)
    };
    // What follows a number after a blank is another one.
    let ends = |count: usize| matches!(sign(count - 1), b"" | b" ").then(|| groups[count - 1].end);
    let has_zeros =
        groups.iter().any(|group| group.len() >= 3 && text[group.clone()].iter().all(|digit| *digit == b'0'));
    if text[begin] == b'+' {
        // As many groups as make a number.
        let count = (1..=groups.len()).rev().find(|count| digits(&groups[..*count]) <= 15)?;
        let total = digits(&groups[..count]);
        let is_fraction = count == 2 && sign(0) == b".";
        let is_long = total >= if count == 1 { 9 } else { 8 };
        return (is_long && starts(0) != b'0' && !is_fraction && !has_zeros).then(|| groups[count - 1].end);
    }
    let is_area = |at: usize| matches!(starts(at), b'2'..=b'9');
    if text[begin] == b'(' {
        let is_domestic = starts(0) == b'0' && (9..=12).contains(&digits(groups)) && (3..=5).contains(&groups[0].len());
        return match sign(0).first() {
            Some(b')') if lengths(&[3, 3, 4]) && is_area(0) && is_area(1) => ends(3),
            Some(b')') if is_domestic => Some(groups[groups.len() - 1].end),
            _ => None,
        };
    }
    // North America: 415-555-2671, 1 415.555.2671, 1 (415) 555-2671.
    let country = usize::from(groups[0].len() == 1 && starts(0) == b'1');
    let rest = &groups[country..];
    let is_american = rest.len() >= 3 && rest[0].len() == 3 && rest[1].len() == 3 && rest[2].len() == 4;
    if is_american && is_area(country) && is_area(country + 1) && matches!(sign(country + 1), b"-" | b"." | [0xe2, ..])
    {
        return ends(country + 3);
    }
    // France: 06 12 34 56 78.
    if lengths(&[2; 5])
        && starts(0) == b'0'
        && text[groups[0].start + 1] != b'0'
        && (1..4).all(|at| sign(at) == sign(0))
    {
        return ends(5).filter(|_| !has_zeros && sign(0) != b"/");
    }
    // Elsewhere: 0171 1234567, 020 7946 0958, 0049 30 123456.
    let all = digits(groups);
    if starts(0) == b'0' && groups.len() >= 2 && !has_zeros {
        let second = text[groups[0].start..groups[0].end].get(1).copied().unwrap_or_default();
        let signs = (0..groups.len() - 1).all(|at| matches!(sign(at), b" " | b"-" | b"/" | [0xc2, 0xa0]));
        let is_domestic =
            (3..=5).contains(&groups[0].len()) && second != b'0' && (10..=12).contains(&all) && groups.len() <= 4;
        let is_foreign = (4..=5).contains(&groups[0].len()) && second == b'0' && (10..=16).contains(&all);
        if signs && (is_foreign || (is_domestic && groups[1..].iter().all(|group| group.len() >= 3))) {
            return Some(groups[groups.len() - 1].end);
        }
    }
    let count = (1..=groups.len()).rev().find(|count| digits(&groups[..*count]) <= 15)?;
    let is_told = digits(&groups[..count]) >= 7
        && !has_zeros
        && !ends_in_zeros(&text[..groups[count - 1].end])
        && is_told(&text[..begin], is_exact);
    is_told.then(|| groups[count - 1].end)
}

fn ends_in_zeros(text: &[u8]) -> bool {
    text.ends_with(b"000")
}

/// Whether a word before says that a phone number follows. As a body is written, the word may be part of a field's name.
fn is_told(before: &[u8], is_exact: bool) -> bool {
    let near = &before[before.len().saturating_sub(28)..];
    if !may_tell(near) {
        return false;
    }
    let near = String::from_utf8_lossy(near).to_lowercase();
    PHONES.iter().any(|word| {
        let Some(at) = near.rfind(word) else { return false };
        let (front, rest) = (&near[..at], &near[at + word.len()..]);
        let is_word = !front.ends_with(char::is_alphanumeric)
            && !rest.starts_with(|next: char| next.is_alphabetic() && next != 's' && next != 'e');
        (is_word || !is_exact) && rest.len() <= 14 && !rest.contains(|sign: char| sign.is_ascii_digit() || sign == '\n')
    })
}

/// Whether a text ends with one of these words, and something that is no number: quick where it has none of them.
fn may_tell(near: &[u8]) -> bool {
    let ends = |text: &[u8], word: &str| {
        text.len() >= word.len() && text[text.len() - word.len()..].eq_ignore_ascii_case(word.as_bytes())
    };
    let mut texts = (1..=near.len()).rev().map(|end| &near[..end]);
    let mut texts = texts.by_ref().take_while(|text| !matches!(text.last(), Some(b'0'..=b'9' | b'\n')));
    texts.any(|text| match text.last().map(u8::to_ascii_lowercase) {
        Some(b'e') => ["phone", "mobile", "call me", "text me"].iter().any(|word| ends(text, word)),
        Some(b'l') => ["tel", "cell", "mobil", "dial"].iter().any(|word| ends(text, word)),
        Some(b'n') => ends(text, "telefon"),
        Some(b'o') => ends(text, "fono"),
        Some(b'p') => ends(text, "whatsapp"),
        Some(b's') => ends(text, "sms"),
        Some(b'x') => ends(text, "fax"),
        Some(b'y') => ends(text, "handy"),
        _ => false,
    })
}
