//! What came of a simulated day: counted while it runs, summed up at its end.
//!
//! Everything counted is an integer, so neither the order in which devices are looked at nor how many count at the same
//! time, each for itself, can change a digit.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::base::Neurons;
use crate::engine::scheduler::Plan;
use crate::simulate::cost::Work;

/// Parts of the run that are reported one by one.
pub const PARTS: usize = 24;
/// One, where shares are counted in integers.
const WHOLE: u64 = 1_000_000;

/// Durations, counted in microseconds.
pub struct Times(Histogram<u64>);

impl Times {
    fn new(digits: u8) -> Self {
        // Ten hours are longer than any patience; the bounds are constants, so this cannot fail.
        #[allow(clippy::expect_used)]
        Self(Histogram::new_with_bounds(1, 36_000_000_000, digits).expect("constant bounds"))
    }

    fn add(&mut self, ns: u64, count: u64) {
        self.0.saturating_record_n((ns / 1_000).max(1), count);
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// Milliseconds below which this share of them is.
    pub fn ms(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1_000.0
    }

    /// Their mean in milliseconds.
    pub fn mean_ms(&self) -> f64 {
        self.0.mean() / 1_000.0
    }

    fn absorb(&mut self, other: &Self) {
        // Counts of equal bounds, so this cannot fail.
        let _ = self.0.add(&other.0);
    }

    fn json(&self) -> Value {
        if self.0.is_empty() {
            return Value::Null;
        }
        json!({
            "mean": round(self.mean_ms()), "p50": self.ms(0.5), "p90": self.ms(0.9), "p99": self.ms(0.99),
            "max": self.0.max() as f64 / 1_000.0, "count": self.count(),
        })
    }
}

/// One account's part.
pub struct AccountTally {
    /// Its name.
    pub name: String,
    /// Requests sent.
    pub requests: u64,
    /// Answered to the end.
    pub done: u64,
    /// Tokens asked for, tokens of those out of the prefix cache, tokens got: of what was charged.
    pub prompt_tokens: u64,
    /// Of the prompt tokens, those found.
    pub cached_tokens: u64,
    /// Tokens its callers got.
    pub completion_tokens: u64,
    /// Tokens produced for it, a last one that nobody waited for included.
    pub produced: u64,
    /// What it was charged.
    pub neurons: Neurons,
    /// Time to first token.
    pub ttft: Times,
    /// Sum over answers of the time alone over the time taken, in millionths.
    speed: u64,
}

impl AccountTally {
    fn absorb(&mut self, other: &Self) {
        self.requests += other.requests;
        self.done += other.done;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.completion_tokens += other.completion_tokens;
        self.produced += other.produced;
        self.neurons = self.neurons + other.neurons;
        self.ttft.absorb(&other.ttft);
        self.speed += other.speed;
    }

    /// Mean pace of its answers, 1 where each had a device for itself.
    pub fn pace(&self) -> f64 {
        self.speed as f64 / WHOLE as f64 / self.done.max(1) as f64
    }
}

/// One of [`PARTS`] equal parts of the run.
pub struct Part {
    /// Requests sent in it.
    pub requests: u64,
    /// Tokens produced in it.
    pub tokens: u64,
    /// Device time of steps begun in it.
    pub busy_ns: u64,
    /// Most requests open at a time.
    pub open: u64,
    /// Time to first token of those that came in it.
    pub ttft: Times,
}

impl Part {
    fn absorb(&mut self, other: &Self) {
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.busy_ns += other.busy_ns;
        self.open = self.open.max(other.open);
        self.ttft.absorb(&other.ttft);
    }
}

/// Why a request got no whole answer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Lack {
    /// Too many were waiting: 429.
    Busy,
    /// Longer than the context.
    TooLong,
    /// No device was there.
    Unavailable,
    /// Its deadline passed.
    Late,
    /// Its device died after it had begun, or too often.
    Lost,
    /// Its caller went away.
    Left,
}

impl Lack {
    /// For people and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "refused_busy",
            Self::TooLong => "refused_too_long",
            Self::Unavailable => "failed_no_device",
            Self::Late => "failed_deadline",
            Self::Lost => "failed_device_lost",
            Self::Left => "caller_left",
        }
    }
}

/// Counters of a run.
pub struct Tally {
    part_ns: u64,
    /// Requests sent.
    pub requests: u64,
    /// Answered to the end.
    pub done: u64,
    /// Not answered to the end.
    pub lacking: BTreeMap<Lack, u64>,
    /// Handed to another device because theirs died.
    pub retried: u64,
    /// Steps computed.
    pub steps: u64,
    /// Rows computed.
    pub rows: u64,
    /// Of those, rows of prompts.
    pub prompt_rows: u64,
    /// Of those, rows that had been computed before their sequence lost its blocks.
    pub recomputed_rows: u64,
    /// Sequences that lost their blocks for want of blocks.
    pub preemptions: u64,
    /// Sequences that lost their place to an account that had less.
    pub made_way: u64,
    /// Sequences that waited for a prefix that another was computing.
    pub followed: u64,
    /// Prompt tokens of the requests that were begun.
    pub prompt_tokens: u64,
    /// Of those, found in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens drawn.
    pub drawn: u64,
    /// From the request to its first step.
    pub queued: Times,
    /// From the request to its first token.
    pub ttft: Times,
    /// From one token to the next.
    pub itl: Times,
    /// From the request to the end of its answer.
    pub total: Times,
    /// By account.
    pub accounts: Vec<AccountTally>,
    /// By time.
    pub parts: Vec<Part>,
    /// Faults that happened.
    pub deaths: u64,
    /// Times that a device became slow.
    pub slow_spells: u64,
}

impl Tally {
    /// Nothing yet, of a run of about `duration_ns`.
    pub fn new(accounts: Vec<String>, duration_ns: u64) -> Self {
        let account = |name| AccountTally {
            name,
            requests: 0,
            done: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
            produced: 0,
            neurons: Neurons::ZERO,
            ttft: Times::new(2),
            speed: 0,
        };
        let part = |_| Part { requests: 0, tokens: 0, busy_ns: 0, open: 0, ttft: Times::new(2) };
        Self {
            part_ns: duration_ns.div_ceil(PARTS as u64).max(1),
            requests: 0,
            done: 0,
            lacking: BTreeMap::new(),
            retried: 0,
            steps: 0,
            rows: 0,
            prompt_rows: 0,
            recomputed_rows: 0,
            preemptions: 0,
            made_way: 0,
            followed: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            drawn: 0,
            queued: Times::new(3),
            ttft: Times::new(3),
            itl: Times::new(3),
            total: Times::new(3),
            accounts: accounts.into_iter().map(account).collect(),
            parts: (0..PARTS).map(part).collect(),
            deaths: 0,
            slow_spells: 0,
        }
    }

    /// Nothing yet, of the same run.
    pub fn empty(&self) -> Self {
        let accounts = self.accounts.iter().map(|account| account.name.clone()).collect();
        Self { part_ns: self.part_ns, ..Self::new(accounts, 1) }
    }

    /// What runs on behind the end counts to the last part.
    fn place(&self, at_ns: u64) -> usize {
        ((at_ns / self.part_ns) as usize).min(PARTS - 1)
    }

    fn part(&mut self, at_ns: u64) -> &mut Part {
        let at = self.place(at_ns);
        &mut self.parts[at]
    }

    /// Adds what another has counted of the same run.
    pub fn absorb(&mut self, other: &Self) {
        // No `..`: a new counter is not to be forgotten here.
        let Self {
            part_ns: _,
            requests,
            done,
            lacking,
            retried,
            steps,
            rows,
            prompt_rows,
            recomputed_rows,
            preemptions,
            made_way,
            followed,
            prompt_tokens,
            cached_tokens,
            drawn,
            queued,
            ttft,
            itl,
            total,
            accounts,
            parts,
            deaths,
            slow_spells,
        } = other;
        for (sum, more) in [
            (&mut self.requests, requests),
            (&mut self.done, done),
            (&mut self.retried, retried),
            (&mut self.steps, steps),
            (&mut self.rows, rows),
            (&mut self.prompt_rows, prompt_rows),
            (&mut self.recomputed_rows, recomputed_rows),
            (&mut self.preemptions, preemptions),
            (&mut self.made_way, made_way),
            (&mut self.followed, followed),
            (&mut self.prompt_tokens, prompt_tokens),
            (&mut self.cached_tokens, cached_tokens),
            (&mut self.drawn, drawn),
            (&mut self.deaths, deaths),
            (&mut self.slow_spells, slow_spells),
        ] {
            *sum += more;
        }
        for (&lack, count) in lacking {
            *self.lacking.entry(lack).or_default() += count;
        }
        self.queued.absorb(queued);
        self.ttft.absorb(ttft);
        self.itl.absorb(itl);
        self.total.absorb(total);
        self.accounts.iter_mut().zip(accounts).for_each(|(own, other)| own.absorb(other));
        self.parts.iter_mut().zip(parts).for_each(|(own, other)| own.absorb(other));
    }

    /// A request is sent while `open` others have no end yet.
    pub fn sent(&mut self, at_ns: u64, account: u32, open: u64) {
        self.requests += 1;
        self.accounts[account as usize].requests += 1;
        let part = self.part(at_ns);
        part.requests += 1;
        part.open = part.open.max(open + 1);
    }

    /// A request has its first step.
    pub fn begins(&mut self, queued_ns: u64, prompt: u64, cached: u64) {
        self.queued.add(queued_ns, 1);
        self.prompt_tokens += prompt;
        self.cached_tokens += cached;
    }

    /// A step begins.
    pub fn step(&mut self, at_ns: u64, time_ns: u64, prompt_rows: usize, work: &Work) {
        self.steps += 1;
        self.rows += work.rows;
        self.prompt_rows += prompt_rows as u64;
        self.drawn += work.drawn;
        self.part(at_ns).busy_ns += time_ns;
    }

    /// As many steps as `times`, in each of which `drawn` sequences get their next token and nothing else happens.
    pub fn stretch(&mut self, begun_ns: u64, times: &[u64], drawn: u64) {
        let (steps, took_ns) = (times.len() as u64, times.iter().sum::<u64>());
        self.steps += steps;
        self.rows += steps * drawn;
        self.drawn += steps * drawn;
        if self.place(begun_ns) == self.place(begun_ns + took_ns) {
            let part = self.part(begun_ns);
            part.busy_ns += took_ns;
            part.tokens += steps * drawn;
        } else {
            let mut at_ns = begun_ns;
            for time_ns in times {
                self.part(at_ns).busy_ns += time_ns;
                at_ns += time_ns;
                self.part(at_ns).tokens += drawn;
            }
        }
        // Neighbours are alike to the microsecond more often than not.
        for alike in times.chunk_by(|one, other| one / 1_000 == other / 1_000) {
            self.itl.add(alike[0], alike.len() as u64 * drawn);
        }
    }

    /// Rows that had been computed before.
    pub fn recomputed(&mut self, rows: u64) {
        self.recomputed_rows += rows;
    }

    /// A step was decided.
    pub fn planned(&mut self, plan: &Plan) {
        self.preemptions += plan.preempted as u64;
        self.made_way += plan.made_way as u64;
        self.followed += plan.followed as u64;
    }

    /// An account got tokens.
    pub fn tokens(&mut self, account: u32, count: u64) {
        self.accounts[account as usize].produced += count;
    }

    /// The first token of a request.
    pub fn first_token(&mut self, at_ns: u64, account: u32, after_ns: u64) {
        self.ttft.add(after_ns, 1);
        self.accounts[account as usize].ttft.add(after_ns, 1);
        self.part(at_ns).tokens += 1;
        self.part(at_ns - after_ns).ttft.add(after_ns, 1);
    }

    /// `count` sequences got their next token `gap_ns` after the one before.
    pub fn next_tokens(&mut self, at_ns: u64, gap_ns: u64, count: u64) {
        self.itl.add(gap_ns, count);
        self.part(at_ns).tokens += count;
    }

    /// A request was answered to the end in `took_ns`; alone it had taken `alone_ns`.
    pub fn done(&mut self, account: u32, took_ns: u64, alone_ns: u64) {
        self.done += 1;
        self.total.add(took_ns, 1);
        let account = &mut self.accounts[account as usize];
        account.done += 1;
        account.speed += (u128::from(alone_ns) * u128::from(WHOLE) / u128::from(took_ns.max(1))) as u64;
    }

    /// A request was not.
    pub fn lacks(&mut self, lack: Lack) {
        *self.lacking.entry(lack).or_default() += 1;
    }

    /// Tokens produced, over all accounts.
    pub fn produced(&self) -> u64 {
        self.accounts.iter().map(|account| account.produced).sum()
    }
}

/// A run, summed up.
pub struct Report {
    /// Every setting by name.
    pub settings: Vec<(&'static str, Value)>,
    /// What was simulated, in a line.
    pub title: String,
    /// From the first moment to the last answer.
    pub wall_ns: u64,
    /// Share of the time each device computed.
    pub utilisation: Vec<f64>,
    /// Blocks of each device's pool.
    pub blocks: usize,
    /// Everything counted.
    pub tally: Tally,
}

impl Report {
    /// Seconds of one of the tally's parts.
    pub fn part_s(&self) -> f64 {
        self.tally.part_ns as f64 / 1e9
    }

    /// A count by the second.
    pub fn per_s(&self, count: u64) -> f64 {
        count as f64 * 1e9 / self.wall_ns.max(1) as f64
    }

    /// Mean share of time that devices computed.
    pub fn mean_utilisation(&self) -> f64 {
        self.utilisation.iter().sum::<f64>() / self.utilisation.len().max(1) as f64
    }

    /// Share of the prompt tokens that were found in the prefix cache.
    pub fn hit_rate(&self) -> f64 {
        self.tally.cached_tokens as f64 / self.tally.prompt_tokens.max(1) as f64
    }

    /// Rows of a step, averaged.
    pub fn rows_per_step(&self) -> f64 {
        self.tally.rows as f64 / self.tally.steps.max(1) as f64
    }

    /// Jain's index over the accounts' mean pace: 1 when all are served equally fast, 1/n when one has it all. The
    /// pace of an answer is the time it had taken alone over the time it took.
    pub fn fairness(&self) -> f64 {
        let paces: Vec<f64> =
            self.tally.accounts.iter().filter(|account| account.requests > 0).map(AccountTally::pace).collect();
        let (sum, squares) = (paces.iter().sum::<f64>(), paces.iter().map(|pace| pace * pace).sum::<f64>());
        if squares == 0.0 { 1.0 } else { sum * sum / (paces.len() as f64 * squares) }
    }

    /// All figures, times in milliseconds.
    pub fn json(&self) -> Value {
        let tally = &self.tally;
        let lacking: BTreeMap<_, _> = tally.lacking.iter().map(|(lack, count)| (lack.as_str(), count)).collect();
        let settings: serde_json::Map<_, _> =
            self.settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let produced = tally.produced();
        let accounts = tally.accounts.iter().filter(|account| account.requests > 0).map(|account| {
            json!({
                "account": account.name, "requests": account.requests, "done": account.done,
                "prompt_tokens": account.prompt_tokens, "cached_tokens": account.cached_tokens,
                "completion_tokens": account.completion_tokens,
                "share_of_tokens": round(account.produced as f64 / produced.max(1) as f64),
                "pace": round(account.pace()), "ttft_ms": account.ttft.json(),
                "neurons": account.neurons.as_f64(),
            })
        });
        let parts = (0..).zip(&tally.parts).map(|(at, part)| {
            let seconds = self.part_s();
            json!({
                "from_s": round(at as f64 * seconds), "requests": part.requests, "tokens": part.tokens,
                "utilisation": round(part.busy_ns as f64 / 1e9 / seconds / self.utilisation.len().max(1) as f64),
                "open_most": part.open, "ttft_ms": part.ttft.json(),
            })
        });
        json!({
            "title": self.title,
            "settings": settings,
            "wall_s": round(self.wall_ns as f64 / 1e9),
            "requests": tally.requests,
            "done": tally.done,
            "not_done": lacking,
            "retried": tally.retried,
            "deaths": tally.deaths,
            "slow_spells": tally.slow_spells,
            "requests_per_s": round(self.per_s(tally.done)),
            "output_tokens": produced,
            "output_tokens_per_s": round(self.per_s(produced)),
            "prompt_tokens": tally.prompt_tokens,
            "cached_tokens": tally.cached_tokens,
            "prefix_hit_rate": round(self.hit_rate()),
            "steps": tally.steps,
            "rows": tally.rows,
            "rows_per_step": round(self.rows_per_step()),
            "preemptions": tally.preemptions,
            "made_way": tally.made_way,
            "followed": tally.followed,
            "recomputed_rows": tally.recomputed_rows,
            "kv_blocks": self.blocks,
            "utilisation": round(self.mean_utilisation()),
            "utilisation_by_device": self.utilisation.iter().copied().map(round).collect::<Vec<_>>(),
            "queued_ms": tally.queued.json(),
            "ttft_ms": tally.ttft.json(),
            "inter_token_ms": tally.itl.json(),
            "end_to_end_ms": tally.total.json(),
            "fairness": round(self.fairness()),
            "neurons": tally.accounts.iter().map(|account| account.neurons).sum::<Neurons>().as_f64(),
            "accounts": accounts.collect::<Vec<_>>(),
            "parts": parts.collect::<Vec<_>>(),
        })
    }
}

fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(paces: &[u64]) -> Report {
        let mut tally = Tally::new(paces.iter().map(ToString::to_string).collect(), 1);
        for (account, &pace) in (0..).zip(paces) {
            tally.sent(0, account, 0);
            tally.done(account, 1_000, pace);
        }
        Report { settings: vec![], title: String::new(), wall_ns: 1, utilisation: vec![1.0], blocks: 1, tally }
    }

    #[test]
    fn fairness_is_one_among_equals_and_falls_with_favour() {
        assert!((report(&[500, 500, 500]).fairness() - 1.0).abs() < 1e-9);
        assert!((report(&[1_000, 0, 0, 0]).fairness() - 0.25).abs() < 1e-9);
        let some = report(&[1_000, 500]).fairness();
        assert!(some > 0.5 && some < 1.0, "{some}");
    }

    #[test]
    fn a_stretch_counts_as_its_steps_and_parts_of_a_run_add_up() {
        let new = || Tally::new(vec!["a".into()], 24_000);
        let times = [1_900, 1_100, 2_050, 700, 700];
        let (mut single, mut whole, mut parts) = (new(), new(), [new(), new()]);
        let mut at_ns = 21_900;
        for (step, &time_ns) in times.iter().enumerate() {
            for tally in [&mut single, &mut parts[step % 2]] {
                tally.step(at_ns, time_ns, 0, &Work::decode(3, 100));
                tally.next_tokens(at_ns + time_ns, time_ns, 3);
            }
            at_ns += time_ns;
        }
        whole.stretch(21_900, &times, 3);
        let [mut sum, other] = parts;
        sum.absorb(&other);
        let figures = |tally: Tally| Report { tally, ..report(&[]) }.json().to_string();
        let expected = figures(single);
        assert_eq!(figures(whole), expected);
        assert_eq!(figures(sum), expected);
    }

    #[test]
    fn what_runs_behind_the_end_counts_to_the_last_part() {
        let mut tally = Tally::new(vec!["a".into()], 24_000);
        for at in [0, 999, 1_000, 23_999, 24_000, 90_000] {
            tally.sent(at, 0, 0);
        }
        let requests: Vec<u64> = tally.parts.iter().map(|part| part.requests).collect();
        assert_eq!((requests[0], requests[1], requests[23]), (2, 1, 3));
    }
}
