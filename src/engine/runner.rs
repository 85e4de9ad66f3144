//! Who executes a planned step: a model on a CPU or a GPU, a model divided over ranks of either, and the simulated device of tests
//! and `simulate`.

use std::sync::Arc;

use crate::base::Result;
use crate::kernel::Pool;
use crate::kernel::gpu::Parts;
use crate::model::lora::Adapter;
use crate::model::{Batch, Decoder, GpuDecoder, GpuLogits, Group, Launched};

/// Computes packed steps over its own paged KV pool.
pub trait Runner: Send {
    /// KV blocks of the pool; valid block ids are `0..blocks`.
    fn blocks(&self) -> usize;

    /// Tokens in a block.
    fn block_tokens(&self) -> usize;

    /// Whether it can compute with this adapter.
    fn takes(&self, _: &Adapter) -> bool {
        false
    }

    /// A request with this adapter, which it takes, is about to come.
    ///
    /// # Errors
    /// [`Kind::Busy`](crate::base::Kind::Busy) when there is no room for it now.
    fn adopt(&mut self, _: &Arc<Adapter>) -> Result<()> {
        Ok(())
    }

    /// Writes K and V of all rows into their blocks, and computes logits of `batch.sample_rows`. Calls `meanwhile` once, on
    /// this thread, when the device has begun: whatever the caller can do before it knows the logits.
    ///
    /// # Errors
    /// Any error means that the device cannot be trusted any more: the engine fails its sequences and stops. `meanwhile`
    /// may not have been called then.
    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>>;

    /// How the last step was launched; `None`: it is not the device of this runner that launches.
    fn launched(&self) -> Option<Launched> {
        None
    }

    /// Whether it may begin the next step by itself, where tables have a place for it.
    fn goes_ahead(&self) -> bool {
        false
    }

    /// Seconds of a GPU's last step in products, attention and everything else, if they were measured.
    ///
    /// # Errors
    /// As [`Runner::forward`].
    fn parts(&mut self) -> Result<Option<Parts>> {
        Ok(None)
    }

    /// Makes a block hold what another holds.
    fn copy(&mut self, from: u32, to: u32);

    /// Bytes that a block's content takes outside the pool; 0: it cannot leave.
    fn block_bytes(&self) -> usize {
        0
    }

    /// Copies a block's content out: `out` has [`Runner::block_bytes`].
    fn export(&mut self, _block: u32, _out: &mut [u8]) {}

    /// Makes a block hold what another held when it was exported.
    fn import(&mut self, _block: u32, _from: &[u8]) {}
}

/// Logits of the sampled rows of a step, where they are. The sampler changes them.
pub enum Logits<'a> {
    /// In our memory, `[rows, vocab]` f32 row-major.
    Host {
        /// `rows * vocab` values.
        data: &'a mut [f32],
        /// Length of a row.
        vocab: usize,
        /// Worker threads that are idle now.
        pool: &'a Pool,
    },
    /// On a GPU.
    Gpu(GpuLogits<'a>),
}

impl Logits<'_> {
    /// How many rows there are.
    pub fn rows(&self) -> usize {
        match self {
            Self::Host { data, vocab, .. } => data.len() / (*vocab).max(1),
            Self::Gpu(logits) => logits.rows(),
        }
    }
}

impl Runner for Decoder {
    fn blocks(&self) -> usize {
        Decoder::blocks(self)
    }

    fn block_tokens(&self) -> usize {
        Decoder::block_tokens(self)
    }

    fn takes(&self, adapter: &Adapter) -> bool {
        adapter.fits(self.spec())
    }

    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        let vocab = self.spec().vocab;
        let (data, pool) = self.forward_beside(batch, meanwhile)?;
        Ok(Logits::Host { data, vocab, pool })
    }

    fn copy(&mut self, from: u32, to: u32) {
        Decoder::copy(self, from, to);
    }

    fn block_bytes(&self) -> usize {
        Decoder::block_bytes(self)
    }

    fn export(&mut self, block: u32, out: &mut [u8]) {
        Decoder::export(self, block, out);
    }

    fn import(&mut self, block: u32, from: &[u8]) {
        Decoder::import(self, block, from);
    }
}

impl Runner for Group {
    fn blocks(&self) -> usize {
        Group::blocks(self)
    }

    fn block_tokens(&self) -> usize {
        Group::block_tokens(self)
    }

    fn takes(&self, adapter: &Adapter) -> bool {
        Group::takes(self, adapter)
    }

    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        let vocab = self.spec().vocab;
        let (data, pool) = self.forward_beside(batch, meanwhile)?;
        Ok(Logits::Host { data, vocab, pool })
    }

    fn copy(&mut self, from: u32, to: u32) {
        Group::copy(self, from, to);
    }

    fn block_bytes(&self) -> usize {
        Group::block_bytes(self)
    }

    fn export(&mut self, block: u32, out: &mut [u8]) {
        Group::export(self, block, out);
    }

    fn import(&mut self, block: u32, from: &[u8]) {
        Group::import(self, block, from);
    }
}

impl Runner for GpuDecoder {
    fn blocks(&self) -> usize {
        Self::blocks(self)
    }

    fn block_tokens(&self) -> usize {
        Self::block_tokens(self)
    }

    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        Ok(Logits::Gpu(Self::forward(self, batch, meanwhile)?))
    }

    fn takes(&self, adapter: &Adapter) -> bool {
        Self::takes(self, adapter)
    }

    fn adopt(&mut self, adapter: &Arc<Adapter>) -> Result<()> {
        Self::adopt(self, adapter)
    }

    fn launched(&self) -> Option<Launched> {
        Some(Self::launched(self))
    }

    fn goes_ahead(&self) -> bool {
        true
    }

    fn parts(&mut self) -> Result<Option<Parts>> {
        Self::parts(self)
    }

    fn copy(&mut self, from: u32, to: u32) {
        Self::copy(self, from, to);
    }

    fn block_bytes(&self) -> usize {
        Self::block_bytes(self)
    }

    fn export(&mut self, block: u32, out: &mut [u8]) {
        Self::export(self, block, out);
    }

    fn import(&mut self, block: u32, from: &[u8]) {
        Self::import(self, block, from);
    }
}

impl Runner for Group<GpuDecoder> {
    fn blocks(&self) -> usize {
        Group::blocks(self)
    }

    fn block_tokens(&self) -> usize {
        Group::block_tokens(self)
    }

    fn forward(&mut self, batch: &Batch, meanwhile: &mut dyn FnMut()) -> Result<Logits<'_>> {
        Ok(Logits::Gpu(Group::<GpuDecoder>::forward(self, batch, meanwhile)?))
    }

    fn launched(&self) -> Option<Launched> {
        Some(Group::<GpuDecoder>::launched(self))
    }

    fn parts(&mut self) -> Result<Option<Parts>> {
        Group::<GpuDecoder>::parts(self)
    }

    fn copy(&mut self, from: u32, to: u32) {
        Group::copy(self, from, to);
    }

    fn block_bytes(&self) -> usize {
        Group::block_bytes(self)
    }

    fn export(&mut self, block: u32, out: &mut [u8]) {
        Group::export(self, block, out);
    }

    fn import(&mut self, block: u32, from: &[u8]) {
        Group::import(self, block, from);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::base::{AccountId, DeviceId, Kind, ModelId, RequestId, SlotId};
    use crate::config::{KvType, Precision};
    use crate::engine::{Command, Engine, ModelSlot, Submit, start};
    use crate::kernel::Isa;
    use crate::metrics::Metrics;
    use crate::model::weights::Weights;
    use crate::model::{DecoderOptions, Division, Vocabulary};
    use crate::task::{Event, Sampling};

    /// A tiny model on so many ranks.
    fn group(ranks: usize) -> Group {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tiny-llama");
        let weights = Weights::open(&model).unwrap();
        let spec = weights.spec().unwrap();
        let options = DecoderOptions {
            pool: Arc::new(Pool::new(2)),
            isa: Isa::detect(),
            precision: Precision::Fast,
            kv: KvType::F16,
            kv_bytes: 4 << 20,
            block_tokens: 16,
            max_rows: 64,
            max_sample_rows: 8,
        };
        Group::open(&weights, &Division::new(&weights, &spec, ranks).unwrap(), &options, &|_| ()).unwrap()
    }

    fn install(engine: &Engine, group: Group) -> SlotId {
        let words = group.spec().vocab;
        let slot = ModelSlot {
            slot: SlotId::next(),
            model: ModelId::new("m"),
            vocabulary: Arc::new(Vocabulary::new((0..words).map(|word| format!("{word} ").into_bytes()), vec![])),
            runner: Box::new(group),
            context: 512,
            step_tokens: 64,
            prefill_chunk: 32,
            max_running: 8,
            max_queue: 16,
            prefix_cache: true,
            prefill_stretch: 0.0,
            spill: None,
            speculation: Default::default(),
            draft: None,
            metrics: Metrics::new().engine(&ModelId::new("m"), DeviceId(0)),
        };
        let id = slot.slot;
        engine.tell(Command::Install(Box::new(slot))).unwrap();
        id
    }

    fn ask(engine: &Engine, slot: SlotId, max_tokens: u32) -> flume::Receiver<Event> {
        let (events, receiver) = flume::bounded(Submit::event_capacity(1, max_tokens));
        let submit = Submit {
            request: RequestId::random(),
            account: AccountId::new("a"),
            weight: 1,
            slot,
            prompt: vec![1, 2, 3],
            choices: 1,
            max_tokens,
            sampling: Sampling { temperature: 0.0, ignore_eos: true, ..Sampling::default() },
            seed: 1,
            stop: Vec::new(),
            logprobs: None,
            grammar: None,
            prompt_logprobs: None,
            priority: 0,
            cache_salt: 0,
            adapter: None,
            drafts: None,
            expected: vec![],
            deadline: Instant::now() + Duration::from_secs(60),
            received: Instant::now(),
            vocabulary: None,
            events,
        };
        engine.submit(submit).unwrap();
        receiver
    }

    /// How an answer ends: the kind of its error, if it is one.
    fn end(receiver: &flume::Receiver<Event>) -> Option<Kind> {
        loop {
            match receiver.recv_timeout(Duration::from_secs(20)).unwrap() {
                Event::Done(_) => return None,
                Event::Failed(error) => return Some(error.kind()),
                _ => {}
            }
        }
    }

    #[test]
    fn a_rank_that_dies_fails_the_requests_of_its_device_and_ends_its_thread() {
        for dying in [0, 1] {
            let (engine, thread) = start(DeviceId(0)).unwrap();
            let group = group(2);
            let doomed = group.doomed.clone();
            let slot = install(&engine, group);
            assert_eq!(end(&ask(&engine, slot, 20)), None);
            // Long enough that both are still at it when the rank dies.
            let receivers = [(); 2].map(|()| ask(&engine, slot, 400));
            assert!(matches!(receivers[0].recv_timeout(Duration::from_secs(20)), Ok(Event::Text { .. })));
            doomed.store(dying, Ordering::Relaxed);
            assert!(receivers.iter().all(|receiver| end(receiver) == Some(Kind::EngineLost)));
            thread.join().unwrap();
            // Whoever supervises the device starts another; nothing of the old one is in its way.
            let (engine, _thread) = start(DeviceId(0)).unwrap();
            let slot = install(&engine, self::group(2));
            assert_eq!(end(&ask(&engine, slot, 20)), None);
        }
    }
}
