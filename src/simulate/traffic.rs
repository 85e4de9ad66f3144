//! Who asks what, and when.
//!
//! ```text
//! conversations   begin as a Poisson process whose rate follows the hour; the next question comes some time after the
//!                 last answer, behind everything said so far
//! flood           one account whose scripts send bursts of single requests
//! clients         instead: so many callers, each asks again as soon as it is answered
//! trace           instead: requests from a file
//! ```
//!
//! Text is not simulated, only sameness: a prompt is made of pieces, and the tokens of a piece follow from its name. So
//! equal beginnings have equal tokens, and the prefix cache finds what it would find.

use std::sync::Arc;

use crate::simulate::rng::{Rng, mix};

/// Seconds of a day.
const DAY_S: f64 = 86_400.0;
/// The busiest moment of a day, in seconds after midnight.
const PEAK_S: f64 = 14.5 * 3_600.0;
/// The flood account's bursts: how long one is, and how often one begins.
const BURST_S: f64 = 60.0;
const BURST_EVERY_S: f64 = 900.0;
/// What callers write as `max_tokens`, if it is enough.
const USUAL_MAX_TOKENS: [u32; 3] = [512, 1024, 4096];

/// Streams of the seed.
const ARRIVALS: u64 = 1;
const CONVERSATIONS: u64 = 2;
const FLOOD: u64 = 3;
const SYSTEMS: u64 = 4;

/// Part of a prompt: so many tokens of a named text, from its `start`th on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Which text.
    pub text: u64,
    /// Where in it.
    pub start: u32,
    /// How many tokens.
    pub tokens: u32,
}

impl Piece {
    /// The beginning of a text.
    pub fn new(text: u64, tokens: u32) -> Self {
        Self { text, start: 0, tokens }
    }

    /// Its token at a place.
    pub fn token(&self, at: usize) -> u32 {
        (mix(self.text) as u32).wrapping_add(self.start).wrapping_add(at as u32)
    }
}

/// The tokens of a prompt.
pub fn tokens(pieces: &[Piece]) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(length(pieces));
    for piece in pieces {
        let first = piece.token(0);
        tokens.extend((0..piece.tokens).map(|at| first.wrapping_add(at)));
    }
    tokens
}

/// How many they are.
pub fn length(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.tokens as usize).sum()
}

/// One request of a caller.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// When it is sent, in nanoseconds.
    pub at_ns: u64,
    /// Who asks, as an index of [`Source::accounts`].
    pub account: u32,
    /// Higher is served first.
    pub priority: i8,
    /// What is asked.
    pub prompt: Vec<Piece>,
    /// Where the tokens of the answer come from.
    pub answer: Piece,
    /// Tokens after which the model ends the answer.
    pub output: u32,
    /// Most tokens the caller allows; left out, the answer may be as long as the context lets it.
    pub max_tokens: Option<u32>,
    /// `x-session-affinity`, if it is sent.
    pub session: Option<u64>,
    /// The caller goes away this long after it has asked.
    pub leaves_ns: Option<u64>,
    /// Which conversation asks again when this is answered.
    pub conversation: Option<u32>,
}

/// Traffic that is made up. Lengths are in tokens.
#[derive(Clone, PartialEq, Debug)]
pub struct Shape {
    /// Requests a second over the whole fleet, averaged over a day. 0: none but those of `clients`.
    pub rate: f64,
    /// The busiest hour's rate over the average; 1 is the same all day, 2 sleeps at night.
    pub peak: f64,
    /// Callers that each ask again as soon as they are answered, single questions.
    pub clients: usize,
    /// Ordinary accounts; the first has most conversations.
    pub accounts: usize,
    /// Share of the requests that one more account sends, in bursts.
    pub flood: f64,
    /// Share of the conversations whose priority is one below the others'.
    pub background: f64,
    /// Share of the conversations that name their session.
    pub affinity: f64,
    /// System prompts in use, and how long half of them are at most.
    pub systems: usize,
    /// Median length of a system prompt.
    pub system_tokens: f64,
    /// Median length of a question.
    pub prompt_tokens: f64,
    /// Spread of a question's length: sigma of its logarithm.
    pub prompt_sigma: f64,
    /// Median length of an answer.
    pub output_tokens: f64,
    /// Spread of an answer's length.
    pub output_sigma: f64,
    /// Questions of a conversation, averaged.
    pub turns: f64,
    /// Seconds from an answer to the next question, averaged.
    pub think_s: f64,
    /// Share of the callers that go away before they are answered.
    pub leaves: f64,
    /// How long those wait, averaged.
    pub patience_s: f64,
}

/// A kind of use, by name.
pub struct Profile {
    /// What `--profile` says.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Its numbers. The rate is set by the device.
    pub shape: Shape,
    /// Tokens computed for a request here, over those for one of `chat`: divides the rate.
    pub weight: f64,
}

const CHAT: Shape = Shape {
    rate: 0.0,
    peak: 1.7,
    clients: 0,
    accounts: 20,
    flood: 0.1,
    background: 0.1,
    affinity: 0.7,
    systems: 40,
    system_tokens: 400.0,
    prompt_tokens: 80.0,
    prompt_sigma: 1.0,
    output_tokens: 180.0,
    output_sigma: 0.8,
    turns: 3.0,
    think_s: 30.0,
    leaves: 0.02,
    patience_s: 8.0,
};

/// Every profile.
pub static PROFILES: [Profile; 4] = [
    Profile { name: "chat", about: "people talk: short questions, several turns", shape: CHAT, weight: 1.0 },
    Profile {
        name: "rag",
        about: "documents in, short answers out, nothing shared but the instructions",
        shape: Shape {
            prompt_tokens: 3_000.0,
            prompt_sigma: 0.5,
            output_tokens: 150.0,
            output_sigma: 0.6,
            turns: 1.0,
            ..CHAT
        },
        weight: 2.0,
    },
    Profile {
        name: "agent",
        about: "programs in a loop: long instructions, many quick turns, tool results in, little out",
        shape: Shape {
            systems: 8,
            system_tokens: 3_000.0,
            prompt_tokens: 500.0,
            prompt_sigma: 1.0,
            output_tokens: 90.0,
            output_sigma: 0.7,
            turns: 12.0,
            think_s: 3.0,
            affinity: 1.0,
            peak: 1.3,
            ..CHAT
        },
        weight: 1.0,
    },
    Profile {
        name: "batch",
        about: "a queue of jobs: flat all day, single turns, long answers",
        shape: Shape {
            prompt_tokens: 600.0,
            prompt_sigma: 0.6,
            output_tokens: 400.0,
            output_sigma: 0.5,
            turns: 1.0,
            peak: 1.0,
            leaves: 0.0,
            affinity: 0.0,
            ..CHAT
        },
        weight: 2.0,
    },
];

/// The profile of this name.
pub fn profile(name: &str) -> Option<&'static Profile> {
    PROFILES.iter().find(|profile| profile.name == name)
}

/// Where requests come from. Those of [`Source::next_request`] are sent whatever becomes of others; a conversation's next
/// question follows its answer.
pub enum Source {
    /// Made up.
    Made(Box<Made>),
    /// From a file, in order of time.
    Trace {
        /// All of it.
        trace: Arc<Trace>,
        /// How many of its requests were sent.
        sent: usize,
    },
}

/// Recorded requests.
#[derive(Debug)]
pub struct Trace {
    /// Names of the accounts.
    pub accounts: Vec<String>,
    /// In order of time.
    pub requests: Vec<Request>,
}

impl Source {
    /// Names of the accounts, in order of their index.
    pub fn accounts(&self) -> Vec<String> {
        match self {
            Self::Made(made) => made.accounts(),
            Self::Trace { trace, .. } => trace.accounts.clone(),
        }
    }

    /// The next request, not before the last one.
    pub fn next_request(&mut self) -> Option<Request> {
        match self {
            Self::Made(made) => made.next(),
            Self::Trace { trace, sent } => {
                *sent += 1;
                trace.requests.get(*sent - 1).cloned()
            }
        }
    }

    /// What a conversation asks when an answer of `produced` tokens came at `now_ns`. `None` ends it.
    pub fn follow(&mut self, answered: Request, produced: u32, now_ns: u64) -> Option<Request> {
        match self {
            Self::Made(made) => made.follow(answered, produced, now_ns),
            Self::Trace { .. } => None,
        }
    }
}

/// Conversations, the flood and the clients.
pub struct Made {
    shape: Shape,
    seed: u64,
    end_ns: u64,
    context: u32,
    arrivals: Rng,
    flooding: Rng,
    /// When the next conversation begins, in seconds; likewise the flood's next request.
    next_s: f64,
    next_flood_s: f64,
    begun: u32,
    flooded: u32,
    /// Questions of each client so far.
    turns: Vec<u32>,
    systems: Vec<Piece>,
}

/// Flood requests are numbered from here, clients' from the second.
const FLOOD_NAMES: u64 = 1 << 40;
const CLIENT_NAMES: u64 = 1 << 41;
/// Clients' conversations are numbered from here.
const CLIENTS: u32 = 1 << 31;

impl Made {
    /// Traffic of `duration_s` seconds for a model with this context.
    pub fn new(shape: &Shape, seed: u64, duration_s: f64, context: u32) -> Self {
        let mut rng = Rng::stream(seed, SYSTEMS);
        let systems = (0..shape.systems.max(1) as u64)
            .map(|at| {
                let tokens = rng.lognormal(shape.system_tokens, 0.6).round().min(f64::from(context) / 4.0);
                Piece::new(mix(seed ^ mix(at + 1)), tokens as u32)
            })
            .collect();
        let mut made = Self {
            shape: shape.clone(),
            seed,
            end_ns: (duration_s * 1e9) as u64,
            context,
            arrivals: Rng::stream(seed, ARRIVALS),
            flooding: Rng::stream(seed, FLOOD),
            next_s: 0.0,
            next_flood_s: 0.0,
            begun: 0,
            flooded: 0,
            turns: Vec::new(),
            systems,
        };
        made.pass_to_next_beginning();
        made.pass_to_next_flood();
        made
    }

    fn accounts(&self) -> Vec<String> {
        let flood = (self.shape.flood > 0.0).then(|| "flood".to_owned());
        (1..=self.shape.accounts.max(1)).map(|at| format!("account-{at:02}")).chain(flood).collect()
    }

    /// Rate at a moment over the average.
    fn tide(&self, at_s: f64) -> f64 {
        1.0 + (self.shape.peak - 1.0) * (std::f64::consts::TAU * (at_s - PEAK_S) / DAY_S).cos()
    }

    fn pass_to_next_beginning(&mut self) {
        let rate = self.shape.rate * (1.0 - self.shape.flood) / self.shape.turns.max(1.0);
        if rate <= 0.0 {
            self.next_s = f64::INFINITY;
            return;
        }
        // Candidates come at the highest rate; each counts with the probability that its moment has.
        loop {
            self.next_s += self.arrivals.exponential(1.0 / (rate * self.shape.peak));
            if self.arrivals.unit() <= self.tide(self.next_s) / self.shape.peak {
                return;
            }
        }
    }

    fn pass_to_next_flood(&mut self) {
        let rate = self.shape.rate * self.shape.flood * BURST_EVERY_S / BURST_S;
        if rate <= 0.0 {
            self.next_flood_s = f64::INFINITY;
            return;
        }
        // The first burst is in the middle of the first period, so that a short run has one too.
        let offset = (BURST_EVERY_S - BURST_S) / 2.0;
        loop {
            self.next_flood_s += self.flooding.exponential(1.0 / rate);
            let place = self.next_flood_s.rem_euclid(BURST_EVERY_S) - offset;
            if (0.0..=BURST_S).contains(&place) {
                return;
            }
            // Waiting has no memory: what is left of it begins anew with the next burst.
            self.next_flood_s += if place < 0.0 { -place } else { BURST_EVERY_S - place };
        }
    }

    fn next(&mut self) -> Option<Request> {
        if self.turns.len() < self.shape.clients {
            let client = self.turns.len();
            self.turns.push(0);
            // A microsecond apart.
            return Some(self.question_of_client(client, 1 + 1_000 * client as u64));
        }
        let request = if self.next_s <= self.next_flood_s {
            let at_ns = to_ns(self.next_s)?;
            let request = self.beginning(at_ns);
            self.pass_to_next_beginning();
            request
        } else {
            let at_ns = to_ns(self.next_flood_s)?;
            let request = self.flood(at_ns);
            self.pass_to_next_flood();
            request
        };
        (request.at_ns < self.end_ns).then_some(request)
    }

    fn beginning(&mut self, at_ns: u64) -> Request {
        let number = self.begun;
        self.begun += 1;
        let mut rng = Rng::stream(self.seed ^ CONVERSATIONS, number.into());
        // Harmonic weights: the second account has half as many conversations as the first.
        let account = zipf(&mut rng, self.shape.accounts.max(1));
        let system = self.systems[(account as usize * 7 + rng.below(3)) % self.systems.len()];
        let priority = if rng.chance(self.shape.background) { -1 } else { 0 };
        let session = rng.chance(self.shape.affinity).then(|| mix(self.seed ^ u64::from(number)));
        self.question(&mut rng, at_ns, account, priority, vec![system], session, Some(number), u64::from(number) << 8)
    }

    fn flood(&mut self, at_ns: u64) -> Request {
        let name = FLOOD_NAMES + u64::from(self.flooded);
        self.flooded += 1;
        let mut rng = Rng::stream(self.seed ^ CONVERSATIONS, name);
        let (account, system) = (self.shape.accounts.max(1) as u32, self.systems[0]);
        self.question(&mut rng, at_ns, account, 0, vec![system], None, None, name << 8)
    }

    fn question_of_client(&mut self, client: usize, at_ns: u64) -> Request {
        let name = CLIENT_NAMES + ((client as u64) << 24) + u64::from(self.turns[client]);
        self.turns[client] += 1;
        let mut rng = Rng::stream(self.seed ^ CONVERSATIONS, name);
        let account = (client % self.shape.accounts.max(1)) as u32;
        let system = self.systems[account as usize % self.systems.len()];
        let system = (system.tokens > 0).then_some(system);
        let conversation = Some(CLIENTS + client as u32);
        self.question(&mut rng, at_ns, account, 0, system.into_iter().collect(), None, conversation, name << 8)
    }

    /// A question behind what was said before. `name` is this question's own.
    #[allow(clippy::too_many_arguments)]
    fn question(
        &self,
        rng: &mut Rng,
        at_ns: u64,
        account: u32,
        priority: i8,
        mut prompt: Vec<Piece>,
        session: Option<u64>,
        conversation: Option<u32>,
        name: u64,
    ) -> Request {
        let shape = &self.shape;
        let room = self.context.saturating_sub(length(&prompt) as u32 + 2).max(1);
        let long = |rng: &mut Rng, median: f64, sigma: f64| rng.lognormal(median, sigma).round().max(1.0) as u32;
        let asked = long(rng, shape.prompt_tokens, shape.prompt_sigma).min(room);
        prompt.push(Piece::new(mix(self.seed ^ mix(name)), asked));
        let room = (self.context.saturating_sub(length(&prompt) as u32)).max(1);
        let output = long(rng, shape.output_tokens, shape.output_sigma).min(room);
        let usual = USUAL_MAX_TOKENS[rng.below(USUAL_MAX_TOKENS.len())];
        let leaves_ns = rng.chance(shape.leaves).then(|| 1 + (rng.exponential(shape.patience_s) * 1e9) as u64);
        Request {
            at_ns,
            account,
            priority,
            prompt,
            answer: Piece::new(mix(self.seed ^ mix(name + 1)), output),
            output,
            max_tokens: Some(usual.max(output).min(room)),
            session,
            leaves_ns,
            conversation,
        }
    }

    fn follow(&mut self, answered: Request, produced: u32, now_ns: u64) -> Option<Request> {
        let conversation = answered.conversation?;
        // What a question is called is all that it is drawn from: who was answered first does not matter.
        let name = answered.answer.text ^ 0x5eed;
        if let Some(client) = conversation.checked_sub(CLIENTS) {
            let request = self.question_of_client(client as usize, now_ns + 1);
            return (request.at_ns < self.end_ns).then_some(request);
        }
        let mut rng = Rng::stream(self.seed ^ CONVERSATIONS, name);
        if rng.chance(1.0 / self.shape.turns.max(1.0)) {
            return None;
        }
        let at_ns = now_ns + 1 + (rng.exponential(self.shape.think_s) * 1e9) as u64;
        let mut prompt = answered.prompt;
        prompt.push(Piece { tokens: produced, ..answered.answer });
        // Nobody begins a question that cannot be answered.
        if at_ns >= self.end_ns || length(&prompt) as f64 + self.shape.prompt_tokens > f64::from(self.context) * 0.9 {
            return None;
        }
        let (account, priority, session) = (answered.account, answered.priority, answered.session);
        Some(self.question(&mut rng, at_ns, account, priority, prompt, session, Some(conversation), name))
    }
}

fn to_ns(seconds: f64) -> Option<u64> {
    seconds.is_finite().then_some((seconds * 1e9) as u64)
}

/// 0 to `count - 1`, each half as likely as its place from 1 says.
fn zipf(rng: &mut Rng, count: usize) -> u32 {
    let total: f64 = (1..=count).map(|at| 1.0 / at as f64).sum();
    let mut left = rng.unit() * total;
    for at in 1..count {
        left -= 1.0 / at as f64;
        if left <= 0.0 {
            return at as u32 - 1;
        }
    }
    count as u32 - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(shape: &Shape, seed: u64, duration_s: f64) -> Vec<Request> {
        let mut made = Made::new(shape, seed, duration_s, 8192);
        std::iter::from_fn(|| made.next()).collect()
    }

    #[test]
    fn traffic_comes_at_the_rate_asked_for_and_follows_the_hour() {
        let shape = Shape { rate: 2.0, turns: 1.0, flood: 0.0, ..CHAT };
        let requests = all(&shape, 1, DAY_S);
        let per_s = requests.len() as f64 / DAY_S;
        assert!((per_s - 2.0).abs() < 0.05, "{per_s}");
        let between = |from: f64, to: f64| {
            let inside = |request: &&Request| (from..to).contains(&(request.at_ns as f64 / 3.6e12));
            requests.iter().filter(inside).count() as f64
        };
        let (day, night) = (between(13.5, 15.5), between(1.5, 3.5));
        assert!((4.5..7.0).contains(&(day / night)), "{day} {night}");
        assert!(requests.is_sorted_by_key(|request| request.at_ns));
    }

    #[test]
    fn a_flood_has_its_share_and_comes_in_bursts() {
        let shape = Shape { rate: 2.0, turns: 1.0, flood: 0.3, peak: 1.0, ..CHAT };
        let requests = all(&shape, 1, DAY_S);
        let flood: Vec<_> = requests.iter().filter(|request| request.account == 20).collect();
        let share = flood.len() as f64 / requests.len() as f64;
        assert!((share - 0.3).abs() < 0.02, "{share}");
        let in_burst = |request: &&&Request| (420.0..480.0).contains(&((request.at_ns as f64 / 1e9) % BURST_EVERY_S));
        assert_eq!(flood.iter().filter(in_burst).count(), flood.len());
    }

    #[test]
    fn a_question_follows_its_answer_behind_everything_said() {
        let mut made = Made::new(&Shape { rate: 1e8, turns: 1e9, flood: 0.0, ..CHAT }, 3, DAY_S, 8192);
        let first = made.next().unwrap();
        let second = made.follow(first.clone(), 7, first.at_ns + 5_000_000_000).unwrap();
        let (before, after) = (tokens(&first.prompt), tokens(&second.prompt));
        assert_eq!(after[..before.len()], before);
        assert_eq!(after[before.len()..][..7], (0..7).map(|at| first.answer.token(at)).collect::<Vec<_>>());
        assert!(after.len() > before.len() + 7 && second.at_ns > first.at_ns + 5_000_000_000);
        assert_eq!((second.session, second.account), (first.session, first.account));
    }

    #[test]
    fn conversations_have_as_many_turns_as_asked_on_average() {
        let mut made = Made::new(&Shape { rate: 3.0, turns: 3.0, flood: 0.0, ..CHAT }, 3, 1e9, 1_000_000);
        let turns: usize = (0..2_000)
            .map(|_| {
                let first = made.next();
                std::iter::successors(first, |last| made.follow(last.clone(), 9, last.at_ns)).count()
            })
            .sum();
        assert!((turns as f64 / 2_000.0 - 3.0).abs() < 0.2, "{turns}");
    }

    #[test]
    fn a_seed_is_a_story_of_its_own() {
        let shape = Shape { rate: 2.0, ..CHAT };
        let story = |seed| all(&shape, seed, 600.0);
        assert_eq!(story(1), story(1));
        assert_ne!(story(1), story(2));
    }

    #[test]
    fn clients_ask_again_as_soon_as_they_are_answered() {
        let mut made = Made::new(&Shape { clients: 2, ..CHAT }, 3, DAY_S, 8192);
        let clients = [made.next().unwrap(), made.next().unwrap()];
        assert!(made.next().is_none());
        let again = made.follow(clients[1].clone(), 9, 1_000).unwrap();
        assert_eq!((again.at_ns, again.account), (1_001, clients[1].account));
        assert_ne!(tokens(&again.prompt), tokens(&clients[1].prompt));
    }
}
