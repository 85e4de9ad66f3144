//! Which model answers where, as a snapshot.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::RwLock;

use crate::base::{DeviceId, ModelId, SlotId};
use crate::engine::Engine;
use crate::metrics::EngineMetrics;
use crate::model::encoder::EncoderText;
use crate::model::lora::Shape;
use crate::model::text::TextModel;

/// One loaded version of a model on one device, with the text half that its kind of model has.
#[derive(Clone)]
pub struct Replica<Half = Arc<TextModel>> {
    /// Which loaded version.
    pub slot: SlotId,
    /// Where.
    pub device: DeviceId,
    /// Who computes it.
    pub engine: Engine,
    /// Its load, as the engine counts it.
    pub metrics: EngineMetrics,
    /// Tokenizer and template.
    pub text: Half,
    /// Longest sequence served, prompt and answer.
    pub context: u32,
    /// What adapters of it have to fit; `None`: it takes none.
    pub shape: Option<Shape>,
}

/// Everything that takes requests now.
#[derive(Clone, Default)]
pub struct Fleet {
    /// Replicas by model: those that generate text.
    pub models: HashMap<ModelId, Vec<Replica>>,
    /// Those that embed or classify it.
    pub encoders: HashMap<ModelId, Vec<Replica<Arc<EncoderText>>>>,
    /// What is wrong with devices that serve all the same.
    pub troubles: BTreeMap<DeviceId, String>,
}

impl Fleet {
    /// Whether a model takes requests.
    pub fn serves(&self, model: &ModelId) -> bool {
        self.models.get(model).is_some_and(|replicas| !replicas.is_empty())
            || self.encoders.get(model).is_some_and(|replicas| !replicas.is_empty())
    }

    /// Models that take requests.
    pub fn serving(&self) -> impl Iterator<Item = &ModelId> {
        self.models.keys().chain(self.encoders.keys()).filter(|model| self.serves(model))
    }

    /// Puts a replica in the place of the one that its model had on its device.
    pub(super) fn put(&mut self, model: &ModelId, installed: Installed) {
        self.take_out(model, installed.device());
        match installed {
            Installed::Text(replica) => self.models.entry(model.clone()).or_default().push(replica),
            Installed::Encoder(replica) => self.encoders.entry(model.clone()).or_default().push(replica),
        }
    }

    /// Takes a model off a device.
    pub(super) fn take_out(&mut self, model: &ModelId, device: DeviceId) {
        fn remove<Half>(of: &mut HashMap<ModelId, Vec<Replica<Half>>>, model: &ModelId, device: DeviceId) {
            let Some(replicas) = of.get_mut(model) else { return };
            replicas.retain(|replica| replica.device != device);
            if replicas.is_empty() {
                of.remove(model);
            }
        }
        remove(&mut self.models, model, device);
        remove(&mut self.encoders, model, device);
    }
}

/// A replica of either kind, on its way into the fleet.
pub(super) enum Installed {
    Text(Replica),
    Encoder(Replica<Arc<EncoderText>>),
}

impl Installed {
    pub(super) fn slot(&self) -> SlotId {
        match self {
            Self::Text(replica) => replica.slot,
            Self::Encoder(replica) => replica.slot,
        }
    }

    fn device(&self) -> DeviceId {
        match self {
            Self::Text(replica) => replica.device,
            Self::Encoder(replica) => replica.device,
        }
    }
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
