//! Decides who has drafts: guesses of what comes next ([`speculate`](crate::engine::speculate)), verified in the same step.
//!
//! ```text
//! hope ──> board ──> one draft more for each that it pays for ──> (no hope left, no row left)
//!            ^                       |
//!            +─── the next one ──────+
//! ```
//!
//! Only rows that nobody needs go to drafts, and only free blocks: they never cost another sequence its row or its block.
//! A draft model computes what a sequence has that it does not ([`Mirror`](crate::engine::mirror::Mirror)) before it
//! guesses, and only for sequences that it guesses for.

use super::Scheduler;
use super::plan::{Hope, Plan};
use crate::engine::pace::Load;
use crate::engine::speculate::{Source, Worth};

/// Tokens of an answer over which it is to pay that the draft model computes what is before them.
const HORIZON: usize = 64;

impl Scheduler {
    /// Gives rows that are left to drafts, first to each sequence's first, then to each one's second, as long as they pay.
    pub(super) fn draft(&mut self, plan: &mut Plan) {
        let limits = self.limits.drafts;
        let rows: usize = plan.shares.iter().map(|share| share.rows).sum();
        let mut left = (self.limits.step_tokens - rows).min(limits.rows);
        if limits.most == 0 || left == 0 {
            return;
        }
        let (step, row) = self.pace.step(plan.load);
        let mut worth = Worth::of(step, rows, row);
        self.hope(&worth, plan);
        for ahead in 0..limits.most {
            self.board(ahead, &mut worth, plan);
            plan.hopes.retain_mut(|hope| {
                let sequence = &mut self.sequences[plan.parts[hope.part].sequence];
                // The last token that may be drawn needs no draft.
                let room = (sequence.most - sequence.tokens.len() - 1).min(sequence.guesses.most());
                if left == 0 || ahead >= room {
                    return false;
                }
                let Some(chance) = sequence.guesses.chance(hope.source, ahead) else { return false };
                let lacks = self.blocks.needed(sequence.tokens.len() + ahead + 1) > sequence.table.len();
                if lacks && self.blocks.free() == 0 || !worth.add(hope.chance * chance) {
                    return false;
                }
                let has = !lacks || self.blocks.take(1, &mut sequence.table);
                debug_assert!(has, "there was a free block");
                hope.chance *= chance;
                let share = &mut plan.shares[hope.part];
                share.drafts += 1;
                if hope.source == Source::Model {
                    share.source = hope.source;
                    share.catch_up = sequence.tokens.len() - sequence.mirrored;
                }
                plan.drafted += 1;
                left -= 1;
                true
            });
            if plan.hopes.is_empty() {
                break;
            }
        }
    }

    /// Who could have drafts, and whose they would be. A sequence that the draft model knows too little of yet may have it
    /// catch up without guessing.
    fn hope(&mut self, worth: &Worth, plan: &mut Plan) {
        let mut room = if self.mirror.is_some() && self.pace.is_known() { self.limits.prefill_chunk } else { 0 };
        for (at, part) in plan.parts.iter().enumerate() {
            let sequence = &mut self.sequences[part.sequence];
            if sequence.left() > 0 || sequence.guesses.most() == 0 {
                continue;
            }
            sequence.guesses.prepare(&sequence.tokens);
            let lookup = sequence.guesses.chance(Source::Lookup, 0);
            let trust = sequence.guesses.chance(Source::Model, 0).unwrap_or(0.0);
            if room > 0 && lookup.is_none_or(|lookup| lookup < trust) {
                let behind = sequence.tokens.len() - sequence.mirrored;
                let mut load = Load::default();
                load.reads(behind, sequence.mirrored);
                let ahead = (sequence.most - sequence.tokens.len()).clamp(1, HORIZON);
                if worth.pays(1, trust, self.draft_pace.seconds(load) as f32 / ahead as f32) {
                    if behind <= room {
                        room -= behind;
                        plan.hopes.push(Hope { part: at, source: Source::Model, chance: 1.0 });
                        continue;
                    }
                    plan.shares[at].catch_up = std::mem::take(&mut room);
                }
            }
            if lookup.is_some() {
                plan.hopes.push(Hope { part: at, source: Source::Lookup, chance: 1.0 });
            }
        }
    }

    /// Decides whether the draft model makes another pass, for the draft after `ahead` others of all who still hope for it.
    fn board(&mut self, ahead: usize, worth: &mut Worth, plan: &mut Plan) {
        let (mut load, mut chance) = (Load::default(), 0.0);
        for hope in plan.hopes.iter().filter(|hope| hope.source == Source::Model) {
            let sequence = &self.sequences[plan.parts[hope.part].sequence];
            load.decodes(1, sequence.tokens.len() + ahead);
            chance += hope.chance * sequence.guesses.chance(Source::Model, ahead).unwrap_or(0.0);
        }
        if load.decode == 0 {
            return;
        }
        let pass = self.draft_pace.seconds(load) as f32;
        if worth.pays(load.decode, chance, pass) {
            worth.spend(pass);
            return;
        }
        plan.hopes.retain_mut(|hope| {
            let guesses = &self.sequences[plan.parts[hope.part].sequence].guesses;
            let stays = hope.source == Source::Lookup || ahead == 0 && guesses.chance(Source::Lookup, 0).is_some();
            hope.source = Source::Lookup;
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::{check, limits, seq};
    use super::super::{DraftLimits, Limits};

    fn guessing(step_tokens: usize) -> Limits {
        let drafts = DraftLimits { most: 4, rows: 8, lookup: true, model: false };
        Limits { step_tokens, prefill_chunk: step_tokens, drafts, ..limits() }
    }

    #[test]
    fn rows_that_are_left_verify_drafts_and_an_answer_ends_where_it_would_without() {
        // The prompt expects a's, then the answer's 7s expect 7s; the last token needs no draft.
        check(8, guessing(64), [seq("a", 8, 14)], "a[0..8] | a | a | a | a+1 | a+1 | a+2 | a+2 a.");
    }

    #[test]
    fn drafts_take_no_row_from_a_prompt_or_another_sequence() {
        check(
            8,
            guessing(4),
            [seq("a", 3, 12), seq("b", 6, 2).at(5)],
            "a[0..3] | a | a | a | a+1 | a b[0..3] | a b[3..6] | a+1 b b. | a+1 a.",
        );
    }

    #[test]
    fn drafts_take_free_blocks_only_and_give_back_what_did_not_come_true() {
        // The fourth 7 expects another, but it would be the first of a block that b has.
        check(2, guessing(64), [seq("a", 12, 6), seq("b", 2, 2).at(3)], "a[0..12] | a | a | a b[0..2] | a b b. | a a.");
    }
}
