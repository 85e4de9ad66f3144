//! Many steps at once, where each is like the one before: nobody comes, nobody leaves, every sequence decodes.
//!
//! ```text
//! plan computed push   plan computed push   plan computed push      three steps of every sequence
//! '-------------------- coast(3) --------------------------'        leave the same books as this
//! ```
//!
//! A simulated day is made of such stretches. Their blocks are taken, named and offered in the order in which single
//! steps would do it, so that not even the free list can tell the difference.

use std::time::Duration;

use super::{GROWTH_DECAY, GROWTH_LEAST, Scheduler};
use crate::engine::pace::Load;
use crate::engine::sequence::RequestKey;

impl Scheduler {
    /// From now on blocks of new requests have names that are found quickly and could be forged. For simulations.
    pub fn name_quickly(&mut self) {
        self.names_quickly = true;
    }

    /// How many of the next `most` steps would each place one token of every running sequence and do nothing else:
    /// no prompt, no admission, no preemption, no sequence that becomes full. For simulations.
    pub fn steady(&self, most: usize) -> usize {
        // Blocks that are to be kept outside have to be copied step by step.
        // So have guesses, which see every token.
        let guesses = self.limits.drafts.most > 0;
        let foresees = self.limits.foresight > 0;
        if self.waiting() > 0 || self.running.is_empty() || self.spilled.is_some() || guesses || foresees {
            return 0;
        }
        let mut steps = most;
        for &key in &self.running {
            let sequence = &self.sequences[key];
            if sequence.left() != 1 || sequence.produced() == 0 {
                return 0;
            }
            steps = steps.min(sequence.most - sequence.tokens.len() - 1);
        }
        while steps > 0 && self.blocks_for(steps) > self.blocks.free() {
            steps /= 2;
        }
        steps
    }

    /// Blocks that `steps` steps of all running sequences take.
    fn blocks_for(&self, steps: usize) -> usize {
        let missing = |sequence: &super::Sequence| {
            self.blocks.needed(sequence.tokens.len() + steps - 1).saturating_sub(sequence.table.len())
        };
        self.running.iter().map(|&key| missing(&self.sequences[key])).sum()
    }

    /// Computes `steps` steps, at most as many as [`Scheduler::steady`] said; `token` is what a request draws as the
    /// token of its answer at this place, `took` how long each of the steps takes.
    pub fn coast(&mut self, steps: usize, token: impl Fn(RequestKey, usize) -> u32, took: impl Fn(usize) -> Duration) {
        debug_assert!(steps <= self.steady(steps), "not every step is like the one before");
        if steps == 0 {
            return;
        }
        let block_tokens = self.blocks.block_tokens();
        // Where in its last block each sequence is when a step is planned.
        let mut filled = Vec::with_capacity(self.running.len());
        let mut load = Load::default();
        for &key in &self.running {
            let sequence = &mut self.sequences[key];
            filled.push(sequence.tokens.len() % block_tokens);
            load.decodes(1, sequence.computed);
            let (request, produced) = (sequence.request, sequence.produced());
            sequence.tokens.extend((produced..produced + steps).map(|at| token(request, at)));
            self.queue.charge_singly(sequence.ticket.account, steps);
        }
        self.step += steps as u64;
        for step in 0..steps {
            self.pace.learn(load, took(step));
            load.decode_context += load.decode;
            if self.growth > GROWTH_LEAST {
                self.growth = (self.growth - GROWTH_DECAY).max(GROWTH_LEAST);
            }
        }
        let mut step = 0;
        while step < steps {
            for (&key, &filled) in self.running.iter().zip(&filled) {
                if filled == 1 % block_tokens {
                    let sequence = &mut self.sequences[key];
                    let known = sequence.tokens.len() - steps + step;
                    let missing = self.blocks.needed(known).saturating_sub(sequence.table.len());
                    let taken = self.blocks.take(missing, &mut sequence.table);
                    debug_assert!(taken, "free blocks were counted");
                }
            }
            // To the next step in which one of them begins or fills a block.
            let mut passed = steps - step;
            for (&key, &filled) in self.running.iter().zip(&filled) {
                if filled == 0 {
                    let sequence = &mut self.sequences[key];
                    sequence.computed = sequence.tokens.len() - steps + step;
                    sequence.publish(&mut self.blocks);
                }
                passed = passed.min(if filled == 0 { 1 } else { block_tokens - filled });
            }
            filled.iter_mut().for_each(|filled| *filled = (*filled + passed) % block_tokens);
            step += passed;
        }
        for &key in &self.running {
            let sequence = &mut self.sequences[key];
            sequence.computed = sequence.tokens.len() - 1;
            sequence.fed = self.step;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::{Ask, Limits, Plan, Pushed};
    use super::*;
    use crate::base::AccountId;

    /// Two schedulers with the same requests: one computes each step, the other coasts wherever it may.
    fn check(seed: u64) -> usize {
        let mut state = seed;
        let mut draw = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let limits = Limits {
            context: 200,
            step_tokens: 1 + draw(64),
            prefill_chunk: 1 + draw(64),
            max_running: 1 + draw(8),
            max_queue: 100,
            prefix_cache: draw(4) > 0,
            prefill_stretch: [0.0, 1.5][draw(2)],
            spill_slots: 0,
            foresight: 0,
            drafts: Default::default(),
        };
        let (blocks, block_tokens) = (20 + draw(60), [1, 2, 4, 16][draw(4)]);
        let [mut single, mut coasting] = [(); 2].map(|()| Scheduler::new(limits.clone(), blocks, block_tokens));
        let (mut plan, mut now, mut coasted) = (Plan::default(), Instant::now(), 0);
        let token = |request: RequestKey, at: usize| request * 1000 + at as u32 % 7;
        let took = |step: usize| Duration::from_micros(1_000 + step as u64 % 13 * 50);
        for _ in 0..60 {
            for _ in 0..draw(3) {
                let account = AccountId::new(format!("account-{}", draw(3)));
                let (family, long, max_tokens) = (draw(3) as u32, 1 + draw(40), 1 + draw(60) as u32);
                for scheduler in [&mut single, &mut coasting] {
                    let prompt = (0..long as u32).map(|at| family * 100 + at).collect();
                    let (weight, priority, salt) = (1 + long as u32 % 3, 0, 0);
                    let ask = Ask {
                        account: &account,
                        weight,
                        prompt,
                        choices: 1,
                        max_tokens,
                        priority,
                        salt,
                        adapter: None,
                        scored: false,
                        drafts: None,
                        expected: vec![],
                    };
                    let _ = scheduler.submit(ask, now);
                }
            }
            let mut steps = 1 + draw(30);
            while steps > 0 {
                let steady = coasting.steady(steps);
                assert_eq!(steady, single.steady(steps));
                let together = steady.max(1);
                if steady == 0 {
                    step(&mut coasting, &mut plan, now, token, took(0));
                }
                for at in 0..together {
                    step(&mut single, &mut plan, now, token, took(at));
                    now += Duration::from_millis(10);
                }
                coasting.coast(steady, token, took);
                coasted += steady;
                steps -= together;
                same(&single, &coasting);
            }
        }
        coasted
    }

    fn step(
        scheduler: &mut Scheduler,
        plan: &mut Plan,
        now: Instant,
        token: impl Fn(RequestKey, usize) -> u32,
        took: Duration,
    ) {
        scheduler.plan(now, plan);
        scheduler.computed(plan, now);
        for part in plan.sampled.iter().map(|row| row.part) {
            let at = scheduler.sequence(part.sequence).unwrap().produced();
            if scheduler.push(part.sequence, token(part.request, at)) == Pushed::Full {
                scheduler.finish(part.sequence);
            }
        }
        scheduler.took(plan, took);
    }

    #[track_caller]
    fn same(single: &Scheduler, coasting: &Scheduler) {
        coasting.check().unwrap();
        assert_eq!(coasting.running, single.running);
        assert_eq!((coasting.growth.to_bits(), coasting.step), (single.growth.to_bits(), single.step));
        let load = Load { decode: 3, decode_context: 50, prompt: 5, prompt_context: 100 };
        assert_eq!(coasting.pace.seconds(load).to_bits(), single.pace.seconds(load).to_bits());
        assert_eq!(coasting.blocks.free_list(), single.blocks.free_list());
        for (key, sequence) in single.sequences.iter() {
            let other = &coasting.sequences[key];
            assert_eq!(
                (&other.tokens, other.computed, &other.table, other.published, other.fed),
                (&sequence.tokens, sequence.computed, &sequence.table, sequence.published, sequence.fed)
            );
            let served = |scheduler: &Scheduler| scheduler.queue.served(sequence.ticket.account);
            assert_eq!(served(coasting), served(single));
        }
    }

    #[test]
    fn a_stretch_leaves_the_same_books_as_its_steps() {
        let coasted: usize = (0..300).map(check).sum();
        assert!(coasted > 10_000, "{coasted} steps were coasted");
    }
}
