//! Requests from their first step to their last, told as a line: what the tests of this folder compare.

use std::time::{Duration, Instant};

use super::{Ask, DraftLimits, Limits, Plan, Pushed, Scheduler};
use crate::base::AccountId;
use crate::engine::sequence::{RequestKey, SequenceKey};
use crate::engine::speculate::agreed;

/// A request: name, prompt, tokens to produce; `at` is the step it arrives before. Prompts hold the name's letter
/// unless `shared`, so equal names share prefixes.
#[derive(Clone)]
pub(super) struct Seq {
    name: &'static str,
    prompt: usize,
    most: u32,
    choices: u32,
    priority: i8,
    at: usize,
    leaves: Option<usize>,
}

pub(super) fn seq(name: &'static str, prompt: usize, most: u32) -> Seq {
    Seq { name, prompt, most, choices: 1, priority: 0, at: 0, leaves: None }
}

impl Seq {
    pub(super) fn choices(self, choices: u32) -> Self {
        Self { choices, ..self }
    }
    pub(super) fn priority(self, priority: i8) -> Self {
        Self { priority, ..self }
    }
    pub(super) fn at(self, at: usize) -> Self {
        Self { at, ..self }
    }
    pub(super) fn leaves(self, step: usize) -> Self {
        Self { leaves: Some(step), ..self }
    }
}

pub(super) fn limits() -> Limits {
    Limits {
        context: 1000,
        step_tokens: 64,
        prefill_chunk: 64,
        max_running: 8,
        max_queue: 8,
        prefix_cache: true,
        prefill_stretch: 0.0,
        spill_slots: 0,
        foresight: 0,
        drafts: DraftLimits::default(),
    }
}

/// Runs requests to their end over `blocks` blocks of 16 and compares the steps, whether each is planned at once or prepared
/// while the one before is computed. In a step: `-b` lost its blocks,
/// `a[0..32]` several rows, `a` one row, `a*` one after a copied block, `a+3` one with three drafts; `a.` is complete.
/// Choices are named `a0 a1`.
pub(super) fn check<const N: usize>(blocks: usize, limits: Limits, requests: [Seq; N], expected: &str) {
    check_both(blocks, limits, requests, expected, expected);
}

/// The same where it makes a difference.
pub(super) fn check_both<const N: usize>(
    blocks: usize,
    limits: Limits,
    requests: [Seq; N],
    at_once: &str,
    prepared: &str,
) {
    assert_eq!(run(blocks, limits.clone(), &requests, false), at_once, "planned at once");
    assert_eq!(run(blocks, limits, &requests, true), prepared, "prepared");
}

fn run<const N: usize>(blocks: usize, limits: Limits, requests: &[Seq; N], prepares: bool) -> String {
    let mut scheduler = Scheduler::new(limits, blocks, 16);
    let (mut now, mut plan, mut next) = (Instant::now(), Plan::default(), Plan::default());
    let mut keys: Vec<Option<RequestKey>> = vec![None; N];
    let mut trace: Vec<String> = Vec::new();
    for step in 0.. {
        for (key, request) in keys.iter_mut().zip(requests) {
            if request.at == step {
                let account = AccountId::new(&request.name[..1]);
                let prompt = vec![u32::from(request.name.as_bytes()[0]); request.prompt];
                let (choices, max_tokens, priority) = (request.choices, request.most, request.priority);
                let ask = Ask {
                    account: &account,
                    weight: 1,
                    prompt,
                    choices,
                    max_tokens,
                    priority,
                    salt: 0,
                    adapter: None,
                    scored: false,
                    drafts: None,
                    expected: vec![],
                };
                match scheduler.submit(ask, now) {
                    Ok(new) => *key = Some(new),
                    Err(error) => trace.push(format!("{} {:?}", request.name, error.kind())),
                }
            }
            if request.leaves == Some(step) {
                scheduler.cancel(key.take().unwrap());
            }
        }
        if scheduler.is_idle() && requests.iter().all(|request| request.at <= step) {
            break;
        }
        let name = |key: SequenceKey, scheduler: &Scheduler, keys: &[Option<RequestKey>]| {
            let sequence = scheduler.sequence(key).unwrap();
            let at = keys.iter().position(|&key| key == Some(sequence.request)).unwrap();
            match requests[at].choices {
                1 => requests[at].name.to_owned(),
                _ => format!("{}{}", requests[at].name, sequence.choice),
            }
        };
        let before = scheduler.running.clone();
        std::mem::swap(&mut plan, &mut next);
        scheduler.plan(now, &mut plan);
        if plan.drafted == 0 {
            scheduler.check().unwrap();
        }
        assert!(plan.batch.rows() <= scheduler.limits.step_tokens);
        let mut line: Vec<String> = before
            .iter()
            .filter(|&&key| !scheduler.running.contains(&key))
            .map(|&key| format!("-{}", name(key, &scheduler, &keys)))
            .collect();
        assert_eq!(line.len(), plan.preempted + plan.made_way);
        for ((part, span), share) in plan.parts.iter().zip(&plan.batch.spans).zip(&plan.shares) {
            let (from, to) = (span.start, span.start + share.rows as u32);
            let rows = if share.rows > 1 { format!("[{from}..{to}]") } else { "".into() };
            let drafts = if share.drafts > 0 { format!("+{}", share.drafts) } else { "".into() };
            let copied = plan.copies.iter().any(|(_, to)| plan.batch.table(span).contains(to));
            let copied = if copied { "*" } else { "" };
            line.push(name(part.sequence, &scheduler, &keys) + &rows + copied + &drafts);
        }
        match prepares {
            true => scheduler.prepare(&plan, now, &mut next),
            false => scheduler.computed(&plan, now),
        }
        // Every token is a 7.
        let firsts = (0..plan.sampled.len()).filter(|&row| plan.sampled[row].ahead == 0);
        let ended = firsts.filter_map(|row| {
            let (part, count) = (plan.sampled[row].part, agreed(plan.drafts(row), std::iter::repeat(7)));
            (0..count).any(|_| scheduler.push(part.sequence, 7) == Pushed::Full).then_some(part)
        });
        let ended: Vec<_> = ended.collect();
        scheduler.settle(&plan);
        for part in ended {
            line.push(name(part.sequence, &scheduler, &keys) + ".");
            let complete = scheduler.finish(part.sequence);
            keys.iter_mut().filter(|key| complete && **key == Some(part.request)).for_each(|key| *key = None);
        }
        scheduler.check().unwrap();
        trace.push(line.join(" "));
        now += Duration::from_millis(10);
        assert!(step < 200, "no end: {trace:?}");
    }
    assert_eq!(scheduler.blocks.used(), 0);
    trace.join(" | ")
}
