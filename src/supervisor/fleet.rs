//! Which model answers where, as a snapshot.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::base::{DeviceId, ModelId, SlotId};
use crate::engine::Engine;
use crate::metrics::EngineMetrics;
use crate::model::lora::Shape;
use crate::model::text::TextModel;

/// One loaded version of a model on one device.
#[derive(Clone)]
pub struct Replica {
    /// Which loaded version.
    pub slot: SlotId,
    /// Where.
    pub device: DeviceId,
    /// Who computes it.
    pub engine: Engine,
    /// Its load, as the engine counts it.
    pub metrics: EngineMetrics,
    /// Tokenizer and template.
    pub text: Arc<TextModel>,
    /// Longest sequence served, prompt and answer.
    pub context: u32,
    /// What adapters of it have to fit; `None`: it takes none.
    pub shape: Option<Shape>,
}

/// Everything that takes requests now.
#[derive(Clone, Default)]
pub struct Fleet {
    /// Replicas by model.
    pub models: HashMap<ModelId, Vec<Replica>>,
}

/// Where the current [`Fleet`] is read and replaced.
#[derive(Clone, Default)]
pub struct FleetView(Arc<RwLock<Arc<Fleet>>>);

impl FleetView {
    /// The snapshot in force now.
    pub fn get(&self) -> Arc<Fleet> {
        self.0.read().clone()
    }

    /// Changes the fleet: the closure gets a copy, which then replaces the snapshot.
    pub fn update(&self, change: impl FnOnce(&mut Fleet)) {
        let mut current = self.0.write();
        let mut next = Fleet::clone(&current);
        change(&mut next);
        *current = Arc::new(next);
    }
}
