//! How a GPU is: what NVIDIA's management library says of it, where that is installed.

/// A look at a GPU. What the card does not tell is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Health {
    /// All of its memory, in bytes.
    pub memory_total: u64,
    /// What is taken of it, by whomever.
    pub memory_used: u64,
    /// Of the multiprocessors, in MHz.
    pub sm_mhz: u32,
    /// Of the memory, in MHz.
    pub memory_mhz: u32,
    /// Milliwatts.
    pub power_mw: u32,
    /// Degrees Celsius.
    pub temperature: u32,
    /// Percent of the last moments in which a kernel ran.
    pub busy: u32,
    /// Memory errors that could not be corrected since the driver was loaded.
    pub uncorrected: u64,
    /// Critical errors (XID) since the watch began.
    pub critical: u64,
    /// The last of them.
    pub xid: u64,
}

/// Looks at one GPU now and then.
pub struct Watch {
    #[cfg(feature = "cuda")]
    nvml: Option<nvml::Nvml>,
    #[cfg(feature = "emulate")]
    emulated: bool,
}

impl Watch {
    /// Begins to watch a GPU that can be opened. `None`: nobody can tell how it is.
    pub fn begin(ordinal: u16) -> Option<Self> {
        #[cfg(feature = "emulate")]
        if super::open::emulated().is_some_and(|count| usize::from(ordinal) < count) {
            return Some(Self {
                #[cfg(feature = "cuda")]
                nvml: None,
                emulated: true,
            });
        }
        #[cfg(feature = "cuda")]
        {
            nvml::Nvml::begin(ordinal).map(|nvml| Self {
                nvml: Some(nvml),
                #[cfg(feature = "emulate")]
                emulated: false,
            })
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = ordinal;
            None
        }
    }

    /// How it is now. Takes a few milliseconds.
    pub fn look(&mut self) -> Health {
        #[cfg(feature = "emulate")]
        if self.emulated {
            let errors = super::emulator::critical_errors();
            let memory_total = super::emulator::MEMORY as u64;
            return Health { memory_total, critical: errors, xid: errors, ..Health::default() };
        }
        #[cfg(feature = "cuda")]
        if let Some(nvml) = &mut self.nvml {
            return nvml.look();
        }
        Health::default()
    }
}

#[cfg(feature = "cuda")]
mod nvml {
    use std::sync::OnceLock;

    use nvml_wrapper::bitmasks::event::EventTypes;
    use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
    use nvml_wrapper::enums::event::XidError;
    use nvml_wrapper::{Device, EventSet, Nvml as Library};

    use super::Health;

    /// Events that are taken from the driver at a look, at most.
    const EVENTS: usize = 16;

    pub(super) struct Nvml {
        device: Device<'static>,
        events: Option<EventSet<'static>>,
        critical: u64,
        xid: u64,
    }

    impl Nvml {
        /// The library counts all cards, and CUDA those that it was left: the place on the bus tells which is which.
        pub(super) fn begin(ordinal: u16) -> Option<Self> {
            static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
            let open =
                || Library::init().map_err(|error| tracing::debug!(%error, "no NVML: GPUs are not watched")).ok();
            let library = LIBRARY.get_or_init(open).as_ref()?;
            let device = library.device_by_pci_bus_id(super::super::device::bus(ordinal)?).ok()?;
            let events = library.create_event_set().ok();
            let events = events.and_then(|set| device.register_events(EventTypes::CRITICAL_XID_ERROR, set).ok());
            Some(Self { device, events, critical: 0, xid: 0 })
        }

        pub(super) fn look(&mut self) -> Health {
            for _ in 0..EVENTS {
                let Some(Ok(event)) = self.events.as_ref().map(|events| events.wait(0)) else { break };
                self.critical += 1;
                self.xid = match event.event_data {
                    Some(XidError::Value(xid)) => xid,
                    _ => 0,
                };
            }
            let device = &self.device;
            let memory = device.memory_info().ok();
            Health {
                memory_total: memory.as_ref().map_or(0, |memory| memory.total),
                memory_used: memory.as_ref().map_or(0, |memory| memory.used),
                sm_mhz: device.clock_info(Clock::SM).unwrap_or_default(),
                memory_mhz: device.clock_info(Clock::Memory).unwrap_or_default(),
                power_mw: device.power_usage().unwrap_or_default(),
                temperature: device.temperature(TemperatureSensor::Gpu).unwrap_or_default(),
                busy: device.utilization_rates().map(|rates| rates.gpu).unwrap_or_default(),
                uncorrected: device
                    .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
                    .unwrap_or_default(),
                critical: self.critical,
                xid: self.xid,
            }
        }
    }
}
