//! A day of a fleet in less than a minute, on a machine without a GPU: the real scheduler, block manager, router and
//! ledger book over devices that are only a cost model.
//!
//! ```text
//! traffic ──request──> world ──route::choose──> device (Scheduler, Blocks, cost of a step) ──outcome──> world
//!  ^  made or a trace    │ Book: reserve … settle or release                                           │
//!  '── next question ────┴── faults: a device dies, is slow; callers leave ──────────── report <───────┘
//! ```
//!
//! Time is a number of nanoseconds that jumps from one event to the next; the same [`Setup`] gives the same [`Report`]
//! to the last digit, on any number of threads. Whatever must hold is checked on the way and at the end, and a run that breaks it is an error.

pub mod cost;
pub mod report;
pub mod trace;
pub mod traffic;

mod device;
mod rng;
mod world;

use std::sync::Arc;

use serde_json::Value;

use crate::base::{Error, ModelId, Result};
use crate::config::{Catalog, Price};
use crate::engine::scheduler::Limits;
use cost::{Cost, PRESETS, Preset};
use report::Report;
use traffic::{Profile, Shape, Trace};

/// Everything that a run depends on.
#[derive(Clone)]
pub struct Setup {
    /// What the devices are, in words.
    pub device: &'static str,
    /// Which model is served.
    pub model: ModelId,
    /// What it costs its callers.
    pub price: Price,
    /// Devices, each with the whole model.
    pub devices: usize,
    /// What a step costs there.
    pub cost: Cost,
    /// What the scheduler is allowed.
    pub engine: Engine,
    /// Traffic that is made up.
    pub shape: Shape,
    /// Recorded traffic in its place.
    pub trace: Option<Arc<Trace>>,
    /// How long requests are sent, in seconds.
    pub duration_s: f64,
    /// After which an answer is worth nothing any more, in seconds.
    pub request_timeout_s: f64,
    /// What goes wrong.
    pub faults: Faults,
    /// Where everything random comes from.
    pub seed: u64,
    /// Compare the books each so many steps of a device; 0 only at the end.
    pub check_every: usize,
    /// Compute stretches of equal steps at once. Changes how long a run takes and nothing else.
    pub coasts: bool,
    /// Threads that devices are computed on. Changes how long a run takes and nothing else.
    pub threads: usize,
}

/// The `[engine]` keys of the configuration that scheduling depends on.
#[derive(Clone, Debug)]
pub struct Engine {
    /// As in the configuration.
    pub context: usize,
    /// As in the configuration.
    pub step_tokens: usize,
    /// As in the configuration.
    pub prefill_chunk: usize,
    /// As in the configuration.
    pub max_running: usize,
    /// As in the configuration.
    pub max_queue: usize,
    /// As in the configuration.
    pub block_tokens: usize,
    /// As in the configuration.
    pub prefix_cache: bool,
    /// As in the configuration.
    pub prefill_stretch: f64,
}

impl Engine {
    fn limits(&self) -> Limits {
        Limits {
            context: self.context,
            step_tokens: self.step_tokens,
            prefill_chunk: self.prefill_chunk,
            max_running: self.max_running,
            max_queue: self.max_queue,
            prefix_cache: self.prefix_cache,
            prefill_stretch: self.prefill_stretch,
            spill_slots: 0,
            foresight: 0,
            // What a call says is not known to the token, so there is nothing to guess from.
            drafts: Default::default(),
        }
    }
}

/// What goes wrong, and how often. All 0: nothing.
#[derive(Clone, Copy, PartialEq, Default, Debug)]
pub struct Faults {
    /// Seconds between two deaths of a device, averaged.
    pub death_every_s: f64,
    /// Seconds until it is back with an empty cache, averaged.
    pub repair_s: f64,
    /// Seconds between two slow spells of a device, averaged.
    pub slow_every_s: f64,
    /// How long one lasts, averaged.
    pub slow_for_s: f64,
    /// How many times as long a step takes then.
    pub slow_factor: f64,
    /// Share of the callers that vanish, beside those who lose patience.
    pub vanish: f64,
    /// Share of the KV pool that is missing.
    pub kv_missing: f64,
}

impl Faults {
    /// A bad day: each device dies about twice and is slow about twice, a caller in twenty vanishes, and half of the
    /// KV pool is missing.
    pub const BAD_DAY: Self = Self {
        death_every_s: 43_200.0,
        repair_s: 60.0,
        slow_every_s: 43_200.0,
        slow_for_s: 600.0,
        slow_factor: 3.0,
        vanish: 0.05,
        kv_missing: 0.5,
    };
}

impl Setup {
    /// A fleet of `devices` and a day of traffic that fits it.
    pub fn new(preset: &Preset, profile: &Profile, devices: usize) -> Self {
        let [step_tokens, prefill_chunk, max_running] = preset.limits;
        let catalog = Catalog::builtin();
        let entry = catalog.resolve(preset.model);
        Self {
            device: preset.about,
            model: ModelId::new(preset.model),
            price: entry.map(|entry| entry.price).unwrap_or_default(),
            devices,
            cost: preset.cost,
            engine: Engine {
                context: entry.map_or(8192, |entry| entry.context as usize).min(32_768),
                step_tokens,
                prefill_chunk,
                max_running,
                max_queue: 256,
                block_tokens: 16,
                prefix_cache: true,
                prefill_stretch: 1.3,
            },
            shape: Shape { rate: preset.rate / profile.weight * devices as f64, ..profile.shape.clone() },
            trace: None,
            duration_s: 86_400.0,
            request_timeout_s: 600.0,
            faults: Faults::default(),
            seed: 1,
            check_every: 0,
            coasts: true,
            threads: 1,
        }
    }

    /// Every number by name, to be read and set.
    pub fn knobs(&mut self) -> Vec<Knob<'_>> {
        use Slot::{Count, Number, Switch};
        let knob = |name, about, slot| Knob { name, about, slot };
        let (engine, cost, shape, faults) = (&mut self.engine, &mut self.cost, &mut self.shape, &mut self.faults);
        vec![
            knob("devices", "devices, each with the whole model", Count(&mut self.devices)),
            knob("duration_s", "seconds in which requests are sent", Number(&mut self.duration_s)),
            knob("request_timeout_s", "seconds after which an answer is given up", Number(&mut self.request_timeout_s)),
            knob("context", "longest sequence, prompt and answer", Count(&mut engine.context)),
            knob("step_tokens", "tokens computed in a step over all sequences", Count(&mut engine.step_tokens)),
            knob("prefill_chunk", "most prompt tokens of one sequence in a step", Count(&mut engine.prefill_chunk)),
            knob("max_running", "sequences computed at the same time", Count(&mut engine.max_running)),
            knob("max_queue", "sequences waiting, beyond which callers get 429", Count(&mut engine.max_queue)),
            knob("block_tokens", "tokens in a KV block", Count(&mut engine.block_tokens)),
            knob("prefix_cache", "share the KV of equal beginnings", Switch(&mut engine.prefix_cache)),
            knob(
                "prefill_stretch",
                "how many times longer prompts may make a step; 0: any",
                Number(&mut engine.prefill_stretch),
            ),
            knob("weight_bytes", "bytes streamed in every step", Number(&mut cost.weight_bytes)),
            knob("kv_bytes_per_token", "bytes of K and V of one token", Number(&mut cost.kv_bytes_per_token)),
            knob("flops_per_token", "operations of one row, attention left out", Number(&mut cost.flops_per_token)),
            knob(
                "attention_flops",
                "operations of one row for each token it attends to",
                Number(&mut cost.attention_flops),
            ),
            knob("bytes_per_s", "memory bandwidth reached", Number(&mut cost.bytes_per_s)),
            knob("flops_per_s", "arithmetic rate reached", Number(&mut cost.flops_per_s)),
            knob("step_overhead_us", "microseconds once a step", Number(&mut cost.step_overhead_us)),
            knob("token_overhead_us", "microseconds for each drawn token", Number(&mut cost.token_overhead_us)),
            knob("memory_bytes", "all memory of a device", Number(&mut cost.memory_bytes)),
            knob("reserved_bytes", "of that, neither weights nor KV", Number(&mut cost.reserved_bytes)),
            knob("rate", "requests a second over the fleet, averaged over a day", Number(&mut shape.rate)),
            knob("peak", "the busiest hour over the average, 1 to 2", Number(&mut shape.peak)),
            knob("clients", "callers that ask again as soon as they are answered", Count(&mut shape.clients)),
            knob("accounts", "ordinary accounts, the first has most traffic", Count(&mut shape.accounts)),
            knob("flood", "share of the requests that one more account sends in bursts", Number(&mut shape.flood)),
            knob("background", "share of the conversations at priority -1", Number(&mut shape.background)),
            knob("affinity", "share of the conversations that name their session", Number(&mut shape.affinity)),
            knob("systems", "different system prompts", Count(&mut shape.systems)),
            knob("system_tokens", "median length of a system prompt", Number(&mut shape.system_tokens)),
            knob("prompt_tokens", "median length of a question", Number(&mut shape.prompt_tokens)),
            knob("prompt_sigma", "its spread (sigma of the logarithm)", Number(&mut shape.prompt_sigma)),
            knob("output_tokens", "median length of an answer", Number(&mut shape.output_tokens)),
            knob("output_sigma", "its spread", Number(&mut shape.output_sigma)),
            knob("turns", "questions of a conversation, averaged", Number(&mut shape.turns)),
            knob("think_s", "seconds from an answer to the next question, averaged", Number(&mut shape.think_s)),
            knob("leaves", "share of the callers that lose patience", Number(&mut shape.leaves)),
            knob("patience_s", "seconds that those wait, averaged", Number(&mut shape.patience_s)),
            knob("death_every_s", "seconds between two deaths of a device; 0 never", Number(&mut faults.death_every_s)),
            knob("repair_s", "seconds until it is back, averaged", Number(&mut faults.repair_s)),
            knob(
                "slow_every_s",
                "seconds between two slow spells of a device; 0 never",
                Number(&mut faults.slow_every_s),
            ),
            knob("slow_for_s", "seconds that one lasts, averaged", Number(&mut faults.slow_for_s)),
            knob("slow_factor", "how many times as long a step takes then", Number(&mut faults.slow_factor)),
            knob("vanish", "share of the callers that vanish", Number(&mut faults.vanish)),
            knob("kv_missing", "share of the KV pool that is missing", Number(&mut faults.kv_missing)),
        ]
    }

    /// Sets one number by its name.
    ///
    /// # Errors
    /// `BadInput` for a name that is not there, with the nearest that is, and for a value that cannot be.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let mut knobs = self.knobs();
        let Some(knob) = knobs.iter_mut().find(|knob| knob.name == name) else {
            let near = knobs.iter().map(|knob| knob.name).find(|known| known.contains(name) || name.contains(known));
            let hint = near.map_or_else(|| "--list names them all".to_owned(), |near| format!("is {near} meant?"));
            return Err(Error::bad_input(format!("there is no setting {name}: {hint}")));
        };
        knob.set(value).map_err(|wanted| Error::bad_input(format!("{name} = {value}: {wanted}")))
    }

    /// Looks for what could not be simulated.
    ///
    /// # Errors
    /// `BadInput` that says what to change.
    pub fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::bad_input(message));
        for (name, share) in [
            ("flood", self.shape.flood),
            ("background", self.shape.background),
            ("affinity", self.shape.affinity),
            ("leaves", self.shape.leaves),
            ("vanish", self.faults.vanish),
            ("kv_missing", self.faults.kv_missing),
        ] {
            if share > 1.0 {
                return wrong(format!("{name} = {share}: a share is a number from 0 to 1"));
            }
        }
        if !(1.0..=2.0).contains(&self.shape.peak) {
            return wrong(format!("peak = {}: a number from 1 (flat) to 2 (nobody at night)", self.shape.peak));
        }
        if self.engine.prefill_stretch != 0.0 && self.engine.prefill_stretch < 1.0 {
            return wrong(format!("prefill_stretch = {}: 0, or 1 and more", self.engine.prefill_stretch));
        }
        if self.devices == 0 || self.devices > 10_000 {
            return wrong(format!("devices = {}: 1 to 10000", self.devices));
        }
        if self.trace.is_none() && self.shape.rate <= 0.0 && self.shape.clients == 0 {
            return wrong("nobody asks: set rate, clients or a trace".into());
        }
        if self.engine.block_tokens == 0 || self.engine.context < 2 {
            return wrong("block_tokens must be at least 1 and context at least 2".into());
        }
        if self.cost.bytes_per_s <= 0.0 || self.cost.flops_per_s <= 0.0 || self.cost.kv_bytes_per_token <= 0.0 {
            return wrong("bytes_per_s, flops_per_s and kv_bytes_per_token must be above 0".into());
        }
        if self.blocks() == 0 {
            return wrong(format!(
                "no KV block fits: {} bytes of memory hold {} of weights and {} reserved",
                self.cost.memory_bytes, self.cost.weight_bytes, self.cost.reserved_bytes
            ));
        }
        if self.blocks() > 1 << 26 {
            return wrong(format!("{} KV blocks a device: use larger blocks or less memory", self.blocks()));
        }
        Ok(())
    }

    /// KV blocks of each device.
    pub fn blocks(&self) -> usize {
        (self.cost.blocks(self.engine.block_tokens) as f64 * (1.0 - self.faults.kv_missing)) as usize
    }
}

/// One number of a [`Setup`].
pub struct Knob<'a> {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    slot: Slot<'a>,
}

enum Slot<'a> {
    Number(&'a mut f64),
    Count(&'a mut usize),
    Switch(&'a mut bool),
}

impl Knob<'_> {
    /// Its value.
    pub fn value(&self) -> Value {
        match &self.slot {
            Slot::Number(number) => (**number).into(),
            Slot::Count(count) => (**count).into(),
            Slot::Switch(switch) => (**switch).into(),
        }
    }

    fn set(&mut self, text: &str) -> Result<(), &'static str> {
        match &mut self.slot {
            Slot::Number(number) => {
                let parsed = text.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
                **number = parsed.ok_or("a number from 0 is needed")?;
            }
            Slot::Count(count) => {
                // `2e6` and `64.0` are whole numbers too.
                let parsed =
                    text.parse::<f64>().ok().filter(|value| value.fract() == 0.0 && (0.0..1e15).contains(value));
                **count = parsed.ok_or("a whole number from 0 is needed")? as usize;
            }
            Slot::Switch(switch) => {
                **switch = match text {
                    "true" | "on" | "1" => true,
                    "false" | "off" | "0" => false,
                    _ => return Err("true or false is needed"),
                }
            }
        }
        Ok(())
    }
}

/// Names of the presets, for messages.
pub fn preset_names() -> String {
    PRESETS.each_ref().map(|preset| preset.name).join(", ")
}

/// Runs a setup to its end. `progress` hears the share that is done, now and then.
///
/// # Errors
/// `BadInput` for a setup that cannot be run, `Internal` when something does not hold that must.
pub fn run(setup: &Setup, progress: &mut dyn FnMut(f64)) -> Result<Report> {
    setup.check()?;
    world::World::new(setup).run(progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup() -> Setup {
        Setup::new(&PRESETS[3], &traffic::PROFILES[0], 2)
    }

    #[test]
    fn every_number_can_be_set_by_its_name_and_names_are_unique() {
        let mut setup = setup();
        let names: Vec<_> = setup.knobs().iter().map(|knob| knob.name).collect();
        for name in &names {
            setup.set(name, "1").unwrap();
            assert_eq!(names.iter().filter(|other| other == &name).count(), 1, "{name}");
        }
        assert!(setup.knobs().iter().all(|knob| knob.value().as_f64() == Some(1.0) || knob.value() == true));
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_remedy() {
        for (name, value, words) in [
            ("running", "4", "is max_running meant?"),
            ("nonsense", "4", "--list"),
            ("rate", "-1", "a number from 0"),
            ("devices", "1.5", "a whole number"),
            ("prefix_cache", "maybe", "true or false"),
        ] {
            let error = setup().set(name, value).unwrap_err();
            assert!(error.message().contains(words), "{error}");
        }
        for (name, value, words) in [
            ("flood", "1.5", "from 0 to 1"),
            ("peak", "3", "from 1 (flat)"),
            ("devices", "0", "1 to 10000"),
            ("rate", "0", "nobody asks"),
            ("memory_bytes", "1e9", "no KV block fits"),
            ("flops_per_s", "0", "above 0"),
        ] {
            let mut setup = setup();
            setup.set(name, value).unwrap();
            let error = run(&setup, &mut |_| ()).err().expect(words);
            assert!(error.message().contains(words), "{error}");
        }
    }
}
