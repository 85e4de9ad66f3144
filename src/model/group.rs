//! One decoder on several ranks, which compute each step together: tensor parallelism.
//!
//! ```text
//! caller ── batch ──> rank 0  ─┐                   ┌─> logits
//!                 └─> rank 1  ─┤ all_reduce, twice ┤
//!                 └─> rank 2  ─┘ a layer; gather   └
//! ```
//!
//! Rank 0 is computed by whoever calls, each other rank by a thread of its own; each has a pool of its share of the device's
//! threads, its part of the weights ([`Division`]) and of every KV block. They meet in [`crate::kernel::Collective`]. All
//! ranks hold the same residual stream to the bit, so all of them take the same way through a step.
//!
//! A rank that panics or fails ends the group: the step is an error, and so is every later one. Dropping a group ends
//! its threads.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::base::{Error, Result};
use crate::kernel::{Collective, Pool};
use crate::model::decoder::Place;
use crate::model::lora::Adapter;
use crate::model::shard::Division;
use crate::model::spec::DecoderSpec;
use crate::model::weights::Weights;
use crate::model::{Batch, Decoder, DecoderOptions};

/// A decoder that is divided over ranks.
pub struct Group {
    /// A thread a rank, the caller's being the first.
    threads: Pool,
    leader: Decoder,
    /// Ranks from 1 on. Each is locked by its own thread in a step, and by the caller between steps.
    followers: Vec<Mutex<Decoder>>,
    /// Whether ranks can use their parts of adapters, which are whole.
    takes_adapters: bool,
    /// Why no step is possible any more.
    failed: Mutex<Option<Error>>,
    /// The rank that dies in the next step, if there is such a rank.
    #[cfg(test)]
    pub(crate) doomed: Arc<std::sync::atomic::AtomicUsize>,
}

impl Group {
    /// Packs each rank's part on the rank's own threads, so that its memory is near them, and all at the same time. The threads
    /// of `options.pool` are what the ranks divide among them, at least one for each; that pool itself is not used. So
    /// are its `kv_bytes`. `progress` hears how much is packed, 0 to 1.
    ///
    /// # Errors
    /// As [`Decoder::open`], and `Internal` when the system has no thread left.
    pub fn open(
        weights: &Weights,
        division: &Division,
        options: &DecoderOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        let ranks = division.ranks();
        let threads = Pool::named("rank", ranks);
        if threads.threads() != ranks {
            return Err(Error::internal(format!("the threads of {ranks} ranks could not be started")));
        }
        let own_threads = (options.pool.threads() / ranks).max(1);
        let places = Collective::of(ranks).into_iter().enumerate();
        let places: Vec<_> =
            places.map(|(rank, ranks)| Mutex::new(Some(Place { shard: division.shard(rank), ranks }))).collect();
        let opened: Vec<_> = (0..ranks).map(|_| Mutex::new(None)).collect();
        let open = |rank: usize| {
            let options = DecoderOptions {
                pool: Arc::new(Pool::named(&format!("rank{rank}-kernel"), own_threads)),
                kv_bytes: options.kv_bytes / ranks,
                ..options.clone()
            };
            // Ranks are as good as equally long at it.
            let progress = |done: f32| {
                if rank == 0 {
                    progress(done)
                }
            };
            let place = places[rank].lock().take();
            let attempt = || Decoder::open_place(weights, division.spec().clone(), place, &options, &progress);
            let outcome =
                catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|panic| Err(died(rank, panic.as_ref())));
            *opened[rank].lock() = Some(outcome.map_err(|error| error.context(format!("rank {rank} of {ranks}"))));
        };
        threads.run(open);
        let opened = opened.into_iter().filter_map(Mutex::into_inner);
        let mut decoders = opened.collect::<Result<Vec<Decoder>>>()?.into_iter();
        let Some(leader) = decoders.next() else { return Err(Error::internal("a group without ranks")) };
        let followers: Vec<_> = decoders.map(Mutex::new).collect();
        debug_assert!(followers.iter().all(|other| other.lock().blocks() == leader.blocks()));
        Ok(Self {
            threads,
            leader,
            followers,
            takes_adapters: division.takes_adapters(),
            failed: Mutex::new(None),
            #[cfg(test)]
            doomed: Arc::new(usize::MAX.into()),
        })
    }

    /// What it computes.
    pub fn spec(&self) -> &DecoderSpec {
        self.leader.spec()
    }

    /// How many compute it.
    pub fn ranks(&self) -> usize {
        1 + self.followers.len()
    }

    /// The threads of rank 0, idle between steps.
    pub fn pool(&self) -> &Arc<Pool> {
        self.leader.pool()
    }

    /// KV blocks of the pool; valid ids are `0..blocks`.
    pub fn blocks(&self) -> usize {
        self.leader.blocks()
    }

    /// Tokens in a KV block.
    pub fn block_tokens(&self) -> usize {
        self.leader.block_tokens()
    }

    /// Bytes of a block over all layers and ranks.
    pub fn block_bytes(&self) -> usize {
        self.ranks() * self.leader.block_bytes()
    }

    /// Bytes of packed weights over all ranks.
    pub fn weight_bytes(&self) -> usize {
        self.leader.weight_bytes() + self.followers.iter().map(|rank| rank.lock().weight_bytes()).sum::<usize>()
    }

    /// Whether it can compute with this adapter.
    pub fn takes(&self, adapter: &Adapter) -> bool {
        self.takes_adapters && adapter.fits(self.spec())
    }

    /// Makes a block hold what another holds.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn copy(&mut self, from: u32, to: u32) {
        self.each_rank(|_, rank| rank.copy(from, to));
    }

    /// Copies a block out of the pool, the parts of the ranks back to back.
    ///
    /// # Panics
    /// When there is no such block, or `out` has not its length.
    pub fn export(&mut self, block: u32, out: &mut [u8]) {
        assert_eq!(out.len(), self.block_bytes());
        let part = self.leader.block_bytes();
        self.each_rank(|rank, decoder| decoder.export(block, &mut out[rank * part..][..part]));
    }

    /// Copies a block into the pool, as it was exported.
    ///
    /// # Panics
    /// When there is no such block, or `from` has not its length.
    pub fn import(&mut self, block: u32, from: &[u8]) {
        assert_eq!(from.len(), self.block_bytes());
        let part = self.leader.block_bytes();
        self.each_rank(|rank, decoder| decoder.import(block, &from[rank * part..][..part]));
    }

    /// As [`Decoder::forward`]. The pool is rank 0's.
    ///
    /// # Errors
    /// As [`Decoder::forward`], and `Internal` when a rank died, in this step or before.
    pub fn forward(&mut self, batch: &Batch) -> Result<(&mut [f32], &Pool)> {
        self.forward_beside(batch, &mut || ())
    }

    /// As [`Decoder::forward_beside`]. The errand is done in the caller's part of the step, rank 0's.
    ///
    /// # Errors
    /// As [`Group::forward`], and then `errand` may not have been done.
    pub fn forward_beside(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<(&mut [f32], &Pool)> {
        self.leader.check(batch)?;
        if !(batch.adapters.is_empty() || self.takes_adapters) {
            return Err(Error::internal(
                "a batch that cannot be computed: adapters do not fit the ranks of this model",
            ));
        }
        if let Some(error) = &*self.failed.lock() {
            return Err(error.clone());
        }
        let Self { threads, leader, followers, failed, .. } = self;
        #[cfg(test)]
        let doomed = self.doomed.load(std::sync::atomic::Ordering::Relaxed);
        let compute = |rank: usize, decoder: &mut Decoder, errand: &mut dyn FnMut()| {
            let step = || {
                #[cfg(test)]
                assert_ne!(rank, doomed, "a rank that was asked to die");
                decoder.compute(batch, errand)
            };
            let outcome = catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| Err(died(rank, panic.as_ref())));
            if let Err(error) = outcome {
                // Noted before the others are told: theirs is that another rank failed.
                failed.lock().get_or_insert(error);
                decoder.abandon();
            }
        };
        let follow = |rank: usize| compute(rank, &mut followers[rank - 1].lock(), &mut || ());
        threads.lead(|| compute(0, leader, errand), follow);
        match &*failed.lock() {
            Some(error) => Err(error.clone()),
            None => Ok(leader.logits(batch)),
        }
    }

    fn each_rank(&mut self, mut work: impl FnMut(usize, &mut Decoder)) {
        work(0, &mut self.leader);
        self.followers.iter_mut().enumerate().for_each(|(i, rank)| work(1 + i, rank.get_mut()));
    }
}

fn died(rank: usize, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Error::internal(format!("rank {rank} of this model died: {}", text.unwrap_or("a panic without words")))
}

#[cfg(test)]
#[path = "group_test.rs"]
mod tests;
