//! Guesses what comes next, so that one step can compute several tokens of an answer: where the guesses come from, how far
//! they are believed, and how many of them are worth their rows.
//!
//! ```text
//! text     … the quick brown fox … then the quick brown ┊           newest
//!               └───── match ──────┘  └──── match ─────┘ ┊
//!                                  fox … then the  ──────┊──> drafts: what followed the match
//! verify   rows:   brown | fox | …   | then      one step, logits after each
//!          drawn:  fox     …     then  again     kept up to the first that is not the draft behind it
//! ```
//!
//! **The rule of acceptance** is the plainest one: each row's token is drawn from the target's own distribution with the
//! random number of its own position, as if nothing had been guessed, and the next row counts only if its draft is that
//! very token. So an answer is the same to the last token with guesses and without, greedy or seeded, whoever guesses
//! (drafter-invariance: Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative
//! Decoding", 2024). For a guess without a distribution of its own, which a lookup is, that accepts with the same chance
//! p(draft) as rejection sampling does (Leviathan et al., Chen et al., 2023).
//!
//! A **draft model** guesses one token after the other, each drawn with the random number of the place it is for, so that
//! where the two models agree on a distribution they draw the same token.
//!
//! **Trust** is measured by length of match. A guess is compared with what comes even when it was not worth a row, so it
//! costs nothing to see that it would pay again. A draft model is asked only where it pays, so trust in it comes back
//! slowly while it is not.
//!
//! Pure: knows nothing of batches, blocks or clocks.

/// Tokens that must be equal before a lookup guesses.
const SHORTEST: usize = 3;
/// A match longer than this is as good as one of this length.
const LONGEST: usize = 32;
/// Earlier places looked at for the longest match.
const PLACES: usize = 16;
/// Classes of match length: 3-4, 5-8, 9-16, 17-32, longer.
const CLASSES: usize = 5;
/// What a guess is trusted before anything was seen of this answer.
const LOOKUP_TRUST: [f32; CLASSES] = [0.35, 0.5, 0.7, 0.8, 0.9];
/// How much the newest outcome counts.
const LESSON: f32 = 0.1;
/// What a draft model is trusted before anything was seen, and how much of what is lacking to it each token brings back.
const MODEL_TRUST: f32 = 0.7;
const RECOVERY: f32 = 0.005;
/// No trust is complete: the deepest drafts stay bounded.
const MOST_TRUST: f32 = 0.98;

/// An index of a growing text that finds the longest earlier occurrence of its end: hash chains as in LZ77. Every token
/// costs a constant number of operations, and memory grows by doubling.
#[derive(Default)]
pub struct Lookup {
    text: Vec<u32>,
    /// By hash of [`SHORTEST`] tokens: the newest place behind such tokens; 0: none. A power of two of them.
    heads: Vec<u32>,
    /// By place: the one before it with the same hash.
    links: Vec<u32>,
    /// The place whose text is expected to come again.
    at: usize,
    /// Tokens before `at` that equal the newest ones; 0: nothing is expected.
    length: usize,
}

impl Lookup {
    /// An index of what was said so far. `expected` is text that the caller foresees: it is looked up like the rest, and
    /// the answer is expected to begin with it.
    pub fn new(expected: &[u32], said: &[u32]) -> Self {
        let mut lookup = Self::default();
        let room = expected.len() + said.len();
        lookup.text.reserve(room + room / 4 + 64);
        lookup.links.reserve(room + room / 4 + 64);
        for &token in expected.iter().chain(said) {
            lookup.append(token);
        }
        if expected.is_empty() {
            lookup.search();
        } else {
            (lookup.at, lookup.length) = (0, LONGEST);
        }
        lookup
    }

    /// The token that is expected after `ahead` others, if any is. A match that reaches the end goes on with its own
    /// guesses: the text is periodic there.
    pub fn guess(&self, ahead: usize) -> Option<u32> {
        let period = self.text.len() - self.at;
        (self.length > 0).then(|| self.text[self.at + ahead % period])
    }

    /// Tokens before the expected place that equal the newest ones.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One more token of the text.
    pub fn push(&mut self, token: u32) {
        if self.guess(0) == Some(token) {
            (self.at, self.length) = (self.at + 1, self.length + 1);
            self.append(token);
        } else {
            self.append(token);
            self.search();
        }
    }

    fn append(&mut self, token: u32) {
        // The place behind the newest tokens is entered once there is something at it, so a search never finds itself.
        self.enter(self.text.len());
        self.text.push(token);
        if self.text.len() > self.heads.len() {
            self.heads = vec![0; (2 * self.text.len()).next_power_of_two().max(64)];
            self.links.clear();
            (0..self.text.len()).for_each(|place| self.enter(place));
        }
    }

    fn enter(&mut self, place: usize) {
        let mut before = 0;
        if place >= SHORTEST && !self.heads.is_empty() {
            let head = self.hash(place);
            before = std::mem::replace(&mut self.heads[head], place as u32);
        }
        self.links.push(before);
    }

    fn hash(&self, place: usize) -> usize {
        let mix =
            |hash: u64, &token: &u32| (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        let hash = self.text[place - SHORTEST..place].iter().fold(0x5851_f42d_4c95_7f2d, mix);
        hash as usize & (self.heads.len() - 1)
    }

    /// Looks for the longest of the newest earlier places behind the text's last tokens.
    fn search(&mut self) {
        self.length = 0;
        let end = self.text.len();
        if end < SHORTEST {
            return;
        }
        let mut place = self.heads[self.hash(end)] as usize;
        for _ in 0..PLACES {
            if place == 0 || self.length == LONGEST {
                break;
            }
            let most = place.min(LONGEST);
            let equal = (1..=most).take_while(|&back| self.text[place - back] == self.text[end - back]).count();
            if equal >= SHORTEST && equal > self.length {
                (self.at, self.length) = (place, equal);
            }
            place = self.links[place] as usize;
        }
    }
}

/// Where a draft comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Source {
    /// Earlier text.
    #[default]
    Lookup,
    /// The draft model.
    Model,
}

fn class(length: usize) -> usize {
    (length.max(SHORTEST) - 1).ilog2().saturating_sub(1).min(CLASSES as u32 - 1) as usize
}

/// What one sequence expects of itself, and how often it was right.
pub struct Guesses {
    /// Most drafts in a step; 0: none, ever.
    most: usize,
    /// Made when the sequence first produces a token.
    lookup: Option<Lookup>,
    looks_up: bool,
    expected: Vec<u32>,
    lookup_trust: [f32; CLASSES],
    model_trust: f32,
}

impl Guesses {
    /// At most `most` drafts in a step. `looks_up` says whether earlier text is looked at, `expected` is text that the
    /// caller foresees.
    pub fn new(most: usize, looks_up: bool, expected: Vec<u32>) -> Self {
        Self { most, lookup: None, looks_up, expected, lookup_trust: LOOKUP_TRUST, model_trust: MODEL_TRUST }
    }

    /// Most drafts in a step.
    pub fn most(&self) -> usize {
        self.most
    }

    /// The tokens known so far; the index is made at the first call.
    pub fn prepare(&mut self, known: &[u32]) {
        if self.looks_up && self.most > 0 && self.lookup.is_none() {
            self.lookup = Some(Lookup::new(&std::mem::take(&mut self.expected), known));
        }
    }

    /// The chance that the draft after `ahead` others is right if they are; `None` where nothing is expected.
    pub fn chance(&self, source: Source, ahead: usize) -> Option<f32> {
        if source == Source::Model {
            return Some(self.model_trust);
        }
        let length = self.lookup.as_ref()?.length();
        (length > 0).then(|| self.lookup_trust[class(length + ahead)])
    }

    /// The lookup's draft after `ahead` others.
    pub fn guess(&self, ahead: usize) -> Option<u32> {
        self.lookup.as_ref()?.guess(ahead)
    }

    /// Of the draft model's last drafts so many came true.
    pub fn judge_model(&mut self, drafts: usize, accepted: usize) {
        for at in 0..drafts.min(accepted + 1) {
            learn(&mut self.model_trust, at < accepted);
        }
    }

    /// The next token is known: what a lookup expected is compared with it.
    pub fn push(&mut self, token: u32) {
        self.model_trust += RECOVERY * (MODEL_TRUST - self.model_trust).max(0.0);
        let Some(lookup) = &mut self.lookup else { return };
        if let Some(guess) = lookup.guess(0) {
            learn(&mut self.lookup_trust[class(lookup.length())], guess == token);
        }
        lookup.push(token);
    }
}

fn learn(trust: &mut f32, right: bool) {
    *trust = (*trust + LESSON * (f32::from(right) - *trust)).min(MOST_TRUST);
}

/// How many of the drawn tokens count: those up to the first that is not the draft behind it. `drawn[i]` was drawn after
/// the first `i` drafts. Always at least one.
pub fn agreed(drafts: &[u32], drawn: impl IntoIterator<Item = u32>) -> usize {
    1 + drafts.iter().zip(drawn).take_while(|&(&draft, drawn)| draft == drawn).count()
}

/// Whether one more row pays, while a step is put together.
#[derive(Clone, Copy)]
pub struct Worth {
    /// What a row costs, in the unit of the step.
    row: f32,
    /// What the step costs.
    cost: f32,
    /// Tokens it is expected to bring.
    tokens: f32,
}

impl Worth {
    /// A draft must promise this much more than the step gives without it: chances are estimates.
    const MARGIN: f32 = 1.1;

    /// A step that costs `step` without drafts and brings each of its `rows` a token further; another row costs `row`.
    pub fn of(step: f32, rows: usize, row: f32) -> Self {
        Self { row, cost: step, tokens: rows as f32 }
    }

    /// Adds a draft that is right with this chance if it raises tokens by time.
    pub fn add(&mut self, chance: f32) -> bool {
        let pays = self.pays(1, chance, 0.0);
        if pays {
            self.cost += self.row;
            self.tokens += chance;
        }
        pays
    }

    /// Whether `rows` more with `chance` right among them raise tokens by time, for which a draft model works for `pass`.
    pub fn pays(&self, rows: usize, chance: f32, pass: f32) -> bool {
        chance * self.cost > (pass + self.row * rows as f32) * self.tokens * Self::MARGIN
    }

    /// A draft model works for this long.
    pub fn spend(&mut self, pass: f32) {
        self.cost += pass;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `text`, a letter a token, with `foreseen` text; says what is expected next, and after how long a match.
    fn check(foreseen: &str, text: &str, expected: &str, length: usize) {
        let tokens = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        let (foreseen, tokens) = (tokens(foreseen), tokens(text));
        // However much is there at once, what is expected is the same.
        for cut in 1..=tokens.len() {
            let mut lookup = Lookup::new(&foreseen, &tokens[..cut]);
            tokens[cut..].iter().for_each(|&token| lookup.push(token));
            let guess: Vec<u8> = (0..8).map_while(|ahead| lookup.guess(ahead)).map(|token| token as u8).collect();
            let guess = String::from_utf8(guess).unwrap();
            assert_eq!((guess.as_str(), lookup.length()), (expected, length), "{text:?} cut at {cut}");
        }
    }

    #[test]
    fn what_followed_an_equal_end_is_expected_again() {
        check("", "the quick brown fox; the", " quick b", 3);
        check("", "the quick brown fox; a", "", 0);
        check("", "ab", "", 0);
        check("", "abcab", "", 0);
    }

    #[test]
    fn the_longest_match_wins_and_the_newest_among_equals() {
        check("", "xyzabc1__qabc2__zabc", "1__qabc2", 4);
        check("", "xabc1yabc2zabc", "2zabc2za", 3);
    }

    #[test]
    fn periodic_text_goes_on_with_its_own_guesses() {
        check("", "ababab", "abababab", 4);
        check("", "aaaa", "aaaaaaaa", 3);
    }

    #[test]
    fn foreseen_text_is_expected_from_the_start_and_found_again_later() {
        let mut lookup = Lookup::new(&[1, 2, 3, 4, 5, 6, 7], &[90]);
        let mut heard = Vec::new();
        for token in [1, 2, 9, 3, 4, 5, 6] {
            heard.push(lookup.guess(0));
            lookup.push(token);
        }
        assert_eq!(heard, [Some(1), Some(2), Some(3), None, None, None, Some(6)]);
    }

    #[test]
    fn an_index_agrees_with_a_search_of_the_whole_text() {
        let mut x = 1u64;
        let mut text = vec![0u32];
        let mut lookup = Lookup::new(&[], &text);
        for round in 0..3_000u64 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Now and then a stretch of earlier text comes again.
            let token = if round / 40 % 2 == 0 { (x >> 60) as u32 } else { text[round as usize / 2] };
            lookup.push(token);
            text.push(token);
            let ends =
                |place: usize| (1..=place).take_while(|back| text[place - back] == text[text.len() - back]).count();
            let longest = (SHORTEST..text.len()).map(ends).max().unwrap_or(0).min(LONGEST);
            match lookup.guess(0) {
                Some(guess) => {
                    assert!(ends(lookup.at) >= SHORTEST && guess == text[lookup.at], "round {round}");
                    assert!(lookup.length() <= ends(lookup.at), "round {round}");
                }
                // Only a few places of equal hash are looked at, all of which begin with a true match.
                None => assert!(longest < SHORTEST, "round {round}: a match of {longest} was not found"),
            }
        }
    }

    #[test]
    fn trust_follows_what_comes_true_by_length_of_match() {
        let chance = |guesses: &Guesses, ahead| guesses.chance(Source::Lookup, ahead);
        let mut guesses = Guesses::new(4, true, vec![]);
        assert_eq!(chance(&guesses, 0), None, "nothing was prepared");
        guesses.prepare(&[1, 2, 3, 4, 1, 2, 3]);
        assert_eq!(chance(&guesses, 0), Some(LOOKUP_TRUST[0]));
        assert!(chance(&guesses, 2) > chance(&guesses, 1), "a longer match is trusted more");
        guesses.push(4);
        assert!(guesses.lookup_trust[0] > LOOKUP_TRUST[0]);
        for token in [5, 1, 2, 3, 6, 1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3, 5, 1, 2, 3] {
            guesses.push(token);
        }
        assert!(chance(&guesses, 0).unwrap() < LOOKUP_TRUST[0], "short matches were wrong: {:?}", guesses.lookup_trust);
        assert_eq!(guesses.lookup_trust[2], LOOKUP_TRUST[2], "longer ones were not tried");
        let off = Guesses::new(0, true, vec![]);
        assert_eq!(chance(&off, 0), None);
    }

    #[test]
    fn a_draft_model_is_trusted_as_far_as_it_was_right_and_tried_again_in_time() {
        let mut guesses = Guesses::new(4, false, vec![]);
        let trust = |guesses: &Guesses| guesses.chance(Source::Model, 0).unwrap();
        (0..30).for_each(|_| guesses.judge_model(4, 4));
        assert!(trust(&guesses) > 0.95, "{}", trust(&guesses));
        guesses.judge_model(4, 1);
        assert!(trust(&guesses) < 0.9, "one was right, one was wrong, two were not looked at");
        (0..30).for_each(|_| guesses.judge_model(4, 0));
        assert!(trust(&guesses) < 0.05);
        (0..400).for_each(|_| guesses.push(1));
        assert!(trust(&guesses) > 0.5 && trust(&guesses) < MODEL_TRUST);
    }

    #[test]
    fn a_pass_of_the_draft_model_has_to_be_paid_by_all_who_ride_along() {
        let worth = Worth::of(1.2, 1, 0.1);
        assert!(worth.pays(1, 0.8, 0.1) && !worth.pays(1, 0.8, 1.0));
        let crowd = Worth::of(2.0, 8, 0.1);
        assert!(crowd.pays(8, 6.4, 0.3) && !crowd.pays(1, 0.8, 0.3));
    }

    #[test]
    fn drawn_tokens_count_up_to_the_first_that_is_not_the_draft_behind_it() {
        for (drafts, drawn, count) in [
            (&[][..], &[7][..], 1),
            (&[7], &[7, 8], 2),
            (&[6], &[7, 8], 1),
            (&[7, 8, 9], &[7, 8, 9, 1], 4),
            (&[7, 8, 9], &[7, 1, 9, 1], 2),
        ] {
            assert_eq!(agreed(drafts, drawn.iter().copied()), count, "{drafts:?} {drawn:?}");
        }
        assert_eq!(agreed(&[7, 8], [7].into_iter()), 2, "the row behind was broken");
    }

    #[test]
    fn a_draft_pays_by_its_chance_its_cost_and_the_company() {
        // One stream, a row a fifth of a step: likely drafts pay, and each makes the next one harder.
        let mut one = Worth::of(1.2, 1, 0.2);
        assert!(one.add(0.9) && one.add(0.8) && !one.add(0.1));
        // A row that costs as much as the step itself does not.
        assert!(!Worth::of(1.2, 1, 1.2).add(0.95));
        // A full batch is bound by rows: only near certainty pays.
        let mut full = Worth::of(13.8, 64, 0.2);
        assert!(!full.add(0.95));
        // Rows that are nearly free, as on a GPU: nearly anything does.
        assert!(Worth::of(1.05, 16, 0.003).add(0.2));
    }
}
