//! One decoder on several ranks, which compute each step together: tensor parallelism.
//!
//! ```text
//! caller ── batch ──> rank 0  ─┐                   ┌─> logits
//!                 └─> rank 1  ─┤ all_reduce, twice ┤
//!                 └─> rank 2  ─┘ a layer; gather   └
//! ```
//!
//! Rank 0 is computed by whoever calls, each other rank by a thread of its own. On the CPU each has a pool of its share of the
//! device's threads, and all hold the same residual stream to the bit: they meet in [`crate::kernel::Collective`]. On GPUs each
//! launches on a card of its own, and the cards meet. Either way a rank has its part of the weights ([`Division`]) and of every KV
//! block, and all of them take the same way through a step.
//!
//! A rank that panics or fails ends the group: the step is an error, and so is every later one. Dropping a group ends
//! its threads.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::base::{Error, Result};
use crate::kernel::gpu::{Card, Parts};
use crate::kernel::{Collective, Pool};
use crate::model::decoder::Place;
use crate::model::gpu::Seat;
use crate::model::lora::Adapter;
use crate::model::shard::Division;
use crate::model::spec::DecoderSpec;
use crate::model::weights::Weights;
use crate::model::{Batch, Decoder, DecoderOptions, GpuDecoder, GpuLogits, GpuOptions, KvSize, Launched, Source};

/// A decoder that holds and computes one rank's part.
pub trait Rank: Send {
    /// What all ranks compute together.
    fn spec(&self) -> &DecoderSpec;

    /// KV blocks of its pool.
    fn blocks(&self) -> usize;

    /// Tokens in a KV block.
    fn block_tokens(&self) -> usize;

    /// Bytes of its part of a block over all layers.
    fn block_bytes(&self) -> usize;

    /// Makes a block hold what another holds.
    fn copy(&mut self, from: u32, to: u32);

    /// Copies its part of a block out of the pool.
    fn export(&mut self, block: u32, out: &mut [u8]);

    /// Copies its part of a block into the pool.
    fn import(&mut self, block: u32, from: &[u8]);

    /// Whether a batch can be computed.
    ///
    /// # Errors
    /// `Internal`: why not.
    fn check(&self, batch: &Batch) -> Result<()>;

    /// Computes its part of a batch that was checked, together with all other ranks, and `errand` beside it.
    ///
    /// # Errors
    /// The device's, and `Internal` when another rank failed.
    fn compute(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<()>;

    /// Tells all other ranks that this one cannot go on.
    fn abandon(&self);
}

macro_rules! rank {
    ($decoder:ty) => {
        impl Rank for $decoder {
            fn spec(&self) -> &DecoderSpec {
                Self::spec(self)
            }
            fn blocks(&self) -> usize {
                Self::blocks(self)
            }
            fn block_tokens(&self) -> usize {
                Self::block_tokens(self)
            }
            fn block_bytes(&self) -> usize {
                Self::block_bytes(self)
            }
            fn copy(&mut self, from: u32, to: u32) {
                Self::copy(self, from, to);
            }
            fn export(&mut self, block: u32, out: &mut [u8]) {
                Self::export(self, block, out);
            }
            fn import(&mut self, block: u32, from: &[u8]) {
                Self::import(self, block, from);
            }
            fn check(&self, batch: &Batch) -> Result<()> {
                Self::check(self, batch)
            }
            fn compute(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<()> {
                Self::compute(self, batch, errand)
            }
            fn abandon(&self) {
                Self::abandon(self);
            }
        }
    };
}
rank!(Decoder);
rank!(GpuDecoder);

/// A decoder that is divided over ranks, on the CPU or on GPUs.
pub struct Group<R: Rank = Decoder> {
    /// A thread a rank, the caller's being the first.
    threads: Pool,
    leader: R,
    /// Ranks from 1 on. Each is locked by its own thread in a step, and by the caller between steps.
    followers: Vec<Mutex<R>>,
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
        let own_threads = (options.pool.threads() / ranks).max(1);
        let handles = Collective::of(ranks).into_iter().map(|handle| Mutex::new(Some(handle))).collect::<Vec<_>>();
        let group = Self::of(ranks, division.takes_adapters(), progress, |rank, progress| {
            let options = DecoderOptions {
                pool: Arc::new(Pool::named(&format!("rank{rank}-kernel"), own_threads)),
                kv_bytes: options.kv_bytes / ranks,
                ..options.clone()
            };
            let ranks = handles[rank].lock().take();
            let place = ranks.map(|ranks| Place { shard: division.shard(rank), ranks });
            Decoder::open_place(weights, division.spec().clone(), place, &options, progress)
        })?;
        debug_assert!(group.followers.iter().all(|other| other.lock().blocks() == group.leader.blocks()));
        Ok(group)
    }

    /// The threads of rank 0, idle between steps.
    pub fn pool(&self) -> &Arc<Pool> {
        self.leader.pool()
    }

    /// Bytes of packed weights over all ranks.
    pub fn weight_bytes(&self) -> usize {
        self.leader.weight_bytes() + self.followers.iter().map(|rank| rank.lock().weight_bytes()).sum::<usize>()
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
        self.compute(batch, errand)?;
        Ok(self.leader.logits(batch))
    }
}

impl Group<GpuDecoder> {
    /// Sends each rank's part to its card, all at the same time: cards that were opened as ranks
    /// ([`open_ranks`](crate::kernel::gpu::open_ranks)). Threads of `options.pool` work for rank 0, as many others as they are by
    /// the number of ranks for each other. The KV pool of every rank has as many blocks as the smallest has room for.
    /// `progress` hears how much is sent, 0 to 1.
    ///
    /// # Errors
    /// As [`GpuDecoder::open`], and `Internal` when the system has no thread left or the cards do not reach each other.
    pub fn open_on_gpus(
        cards: Vec<Box<dyn Card>>,
        source: Source<'_>,
        division: &Division,
        options: &GpuOptions,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Self> {
        let ranks = division.ranks();
        if cards.len() != ranks {
            return Err(Error::internal(format!("{} cards for {ranks} ranks", cards.len())));
        }
        let own_threads = (options.pool.threads() / ranks).max(1);
        let cards: Vec<_> = cards.into_iter().map(|card| Mutex::new(Some(card))).collect();
        let mut group = Self::of(ranks, false, progress, |rank, progress| {
            let mut options = options.clone();
            if rank > 0 {
                options.pool = Arc::new(Pool::named(&format!("rank{rank}-host"), own_threads));
                // A draft model lies beside rank 0.
                if let KvSize::Share { beside, each, .. } = &mut options.kv_size {
                    (*beside, *each) = (0, 0);
                }
            }
            let Some(card) = cards[rank].lock().take() else { return Err(Error::internal("a rank without a card")) };
            let (spec, seat) = (division.spec().clone(), Seat::of(division, rank));
            GpuDecoder::open_seat(card, source, spec, Some(seat), &options, progress)
        })?;
        // What cards need to reach each other is taken when they do so first.
        group.together(GpuDecoder::greet, |rank| rank.greet())?;
        let mut fit = Vec::new();
        group.each_rank(|_, rank| fit.push(rank.fit()));
        let blocks = fit.into_iter().collect::<Result<Vec<_>>>()?.into_iter().min().unwrap_or(0);
        let mut taken = Ok(());
        group.each_rank(|_, rank| {
            if taken.is_ok() {
                taken = rank.take_pool(blocks);
            }
        });
        taken.map(|()| group)
    }

    /// As [`GpuDecoder::forward`], and returns when all cards are done. Logits are rank 0's.
    ///
    /// # Errors
    /// As [`GpuDecoder::forward`], and `Internal` when a rank died, in this step or before.
    pub fn forward(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<GpuLogits<'_>> {
        self.compute(batch, errand)?;
        Ok(self.leader.logits(batch))
    }

    /// How the last step was launched.
    pub fn launched(&self) -> Launched {
        self.leader.launched()
    }

    /// As [`GpuDecoder::parts`] of rank 0, whose waiting for others is in them.
    ///
    /// # Errors
    /// The cards'.
    pub fn parts(&mut self) -> Result<Option<Parts>> {
        // All are asked, so that all of them time the same steps.
        let mut parts = Vec::new();
        self.each_rank(|_, rank| parts.push(rank.parts()));
        parts.into_iter().collect::<Result<Vec<_>>>().map(|parts| parts[0])
    }
}

impl<R: Rank> Group<R> {
    /// Has `open` open each rank on its own thread, all at the same time.
    fn of(
        ranks: usize,
        takes_adapters: bool,
        progress: &(dyn Fn(f32) + Sync),
        open: impl Fn(usize, &(dyn Fn(f32) + Sync)) -> Result<R> + Sync,
    ) -> Result<Self> {
        let threads = Pool::named("rank", ranks);
        if threads.threads() != ranks {
            return Err(Error::internal(format!("the threads of {ranks} ranks could not be started")));
        }
        let opened: Vec<_> = (0..ranks).map(|_| Mutex::new(None)).collect();
        threads.run(|rank| {
            // Ranks are as good as equally long at it.
            let progress = |done: f32| {
                if rank == 0 {
                    progress(done)
                }
            };
            let attempt = || open(rank, &progress);
            let outcome =
                catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|panic| Err(died(rank, panic.as_ref())));
            *opened[rank].lock() = Some(outcome.map_err(|error| error.context(format!("rank {rank} of {ranks}"))));
        });
        let opened = opened.into_iter().filter_map(Mutex::into_inner);
        let mut decoders = opened.collect::<Result<Vec<R>>>()?.into_iter();
        let Some(leader) = decoders.next() else { return Err(Error::internal("a group without ranks")) };
        Ok(Self {
            threads,
            leader,
            followers: decoders.map(Mutex::new).collect(),
            takes_adapters,
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

    /// One step of all ranks.
    fn compute(&mut self, batch: &Batch, errand: &mut dyn FnMut()) -> Result<()> {
        self.leader.check(batch)?;
        if !(batch.adapters.is_empty() || self.takes_adapters) {
            return Err(Error::internal(
                "a batch that cannot be computed: adapters do not fit the ranks of this model",
            ));
        }
        self.together(|leader| leader.compute(batch, errand), |rank| rank.compute(batch, &mut || ()))
    }

    /// All ranks at the same time, the leader by the caller. The first that fails or panics is the error of all, and of everything
    /// later.
    fn together(
        &mut self,
        lead: impl FnOnce(&mut R) -> Result<()>,
        follow: impl Fn(&mut R) -> Result<()> + Sync,
    ) -> Result<()> {
        if let Some(error) = &*self.failed.lock() {
            return Err(error.clone());
        }
        let Self { threads, leader, followers, failed, .. } = self;
        #[cfg(test)]
        let doomed = self.doomed.load(std::sync::atomic::Ordering::Relaxed);
        let attempt = |rank: usize, decoder: &mut R, work: &mut dyn FnMut(&mut R) -> Result<()>| {
            let attempt = || {
                #[cfg(test)]
                assert_ne!(rank, doomed, "a rank that was asked to die");
                work(decoder)
            };
            let outcome =
                catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|panic| Err(died(rank, panic.as_ref())));
            if let Err(error) = outcome {
                // Noted before the others are told: theirs is that another rank failed.
                failed.lock().get_or_insert(error);
                decoder.abandon();
            }
        };
        let mut lead = Some(lead);
        let mut once = |leader: &mut R| lead.take().map_or(Ok(()), |lead| lead(leader));
        threads.lead(
            || attempt(0, leader, &mut once),
            |rank| attempt(rank, &mut followers[rank - 1].lock(), &mut |decoder| follow(decoder)),
        );
        match &*failed.lock() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    fn each_rank(&mut self, mut work: impl FnMut(usize, &mut R)) {
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
