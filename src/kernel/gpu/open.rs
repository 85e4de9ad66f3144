//! Which GPUs this machine has, and how one is opened: those of CUDA's driver, or emulated ones for tests.

use std::path::Path;

use super::card::Card;
use crate::base::Result;

/// In a build with the feature `emulate`: how many GPUs to emulate. Slow beyond use, and just what the kernels compute.
#[cfg(feature = "emulate")]
const EMULATED: &str = "NEUROND_EMULATED_GPUS";
/// And what they are like: `ada`, `hopper`, or without their maker's library.
#[cfg(feature = "emulate")]
const CHIP: &str = "NEUROND_EMULATED_CHIP";

/// How many GPUs there are: those whose numbers are below it can be opened. `folders` hold libraries that the system's loader does
/// not find.
///
/// # Errors
/// `ModelUnavailable` when there are none; the message says what is missing.
pub fn count(folders: &[impl AsRef<Path>]) -> Result<usize> {
    #[cfg(feature = "emulate")]
    if let Some(count) = emulated() {
        return Ok(count);
    }
    #[cfg(feature = "cuda")]
    {
        let opened = super::device::preload(folders);
        opened.iter().for_each(|path| tracing::debug!(path = %path.display(), "library opened"));
        super::device::find()
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = folders;
        Err(none())
    }
}

/// Opens a GPU by its number. What is opened twice has its memory and its order of work twice, too.
///
/// # Errors
/// `ModelUnavailable` when there is none of this number, and the driver's.
pub fn open(ordinal: u16) -> Result<Box<dyn Card>> {
    #[cfg(feature = "emulate")]
    if emulated().is_some_and(|count| usize::from(ordinal) < count) {
        use super::emulator::{Chip, EmulatedCard};
        let chip = match std::env::var(CHIP).as_deref() {
            Ok("hopper") => Chip::Hopper,
            Ok("ada") => Chip::Ada,
            _ => Chip::Bare,
        };
        return Ok(Box::new(EmulatedCard::of(chip, u32::from(ordinal))));
    }
    #[cfg(feature = "cuda")]
    {
        Ok(Box::new(super::device::Device::open(ordinal.into())?))
    }
    #[cfg(not(feature = "cuda"))]
    {
        Err(none().context(format!("GPU {ordinal}")))
    }
}

/// Opens GPUs by their numbers as the ranks of a group, in this order: what one of them alone is asked for is as with [`open`].
///
/// # Errors
/// As [`open`], and `ModelUnavailable` when the library is missing that moves numbers between GPUs.
pub fn open_ranks(ordinals: &[u16]) -> Result<Vec<Box<dyn Card>>> {
    #[cfg(feature = "emulate")]
    if emulated().is_some_and(|count| ordinals.iter().all(|&ordinal| usize::from(ordinal) < count)) {
        let cards = super::emulator::EmulatedCard::ranks(ordinals.len());
        return Ok(cards.into_iter().map(|card| Box::new(card) as Box<dyn Card>).collect());
    }
    #[cfg(feature = "cuda")]
    {
        let cards = super::device::Device::open_ranks(ordinals)?;
        Ok(cards.into_iter().map(|card| Box::new(card) as Box<dyn Card>).collect())
    }
    #[cfg(not(feature = "cuda"))]
    {
        Err(none().context(format!("GPUs {ordinals:?}")))
    }
}

/// What GPUs that are opened as ranks sum and gather with, after [`count`].
///
/// # Errors
/// `ModelUnavailable` when it is missing; the message says what to install.
pub fn collectives() -> Result<String> {
    #[cfg(feature = "emulate")]
    if emulated().is_some() {
        return Ok("threads".to_owned());
    }
    #[cfg(feature = "cuda")]
    {
        super::nccl::version()
    }
    #[cfg(not(feature = "cuda"))]
    {
        Err(none())
    }
}

#[cfg(feature = "emulate")]
pub(super) fn emulated() -> Option<usize> {
    std::env::var(EMULATED).ok()?.parse().ok().filter(|&count| count > 0)
}

#[cfg(not(feature = "cuda"))]
fn none() -> crate::base::Error {
    use crate::base::{Error, Kind};
    Error::new(Kind::ModelUnavailable, "this neurond is built without GPUs: build it with --features cuda")
}
