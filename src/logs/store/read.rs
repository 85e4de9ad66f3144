//! From chosen rows to records.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::block::{self, Block};
use super::columns::{Sealed, View};
use super::row::Stored;
use super::scan::Chosen;
use super::source::{Chunk, Source};
use crate::logs::record::Record;

/// Opens a gateway's rows for reading, oldest first.
pub(super) fn sources(sealed: &[Arc<Sealed>], chunks: Vec<Chunk>, scope: Option<u32>) -> io::Result<Vec<Source<'_>>> {
    let mut sources = Vec::with_capacity(sealed.len() + chunks.len());
    for sealed in sealed {
        let Some(range) = scope.and_then(|scope| sealed.range(scope)) else { continue };
        sources.extend(View::open(sealed, range)?.map(Source::Disk));
    }
    sources.extend(chunks.into_iter().map(Source::Memory));
    Ok(sources)
}

/// Reads the heads of chosen rows, each block once. What was deleted meanwhile is left out.
pub(super) fn read(sources: &[Source], chosen: &[Chosen]) -> io::Result<Vec<Stored>> {
    let mut places = Vec::with_capacity(chosen.len());
    for (at, (source, row)) in chosen.iter().enumerate() {
        let (log, block, slot, marks) = sources[*source].place(*row)?;
        places.push((*source, block, slot, at, log, marks));
    }
    places.sort_unstable_by_key(|(source, block, slot, ..)| (*source, block.at, *slot));
    let mut read: Vec<Option<Stored>> = chosen.iter().map(|_| None).collect();
    for places in places.chunk_by(|one, other| (one.0, one.1.at) == (other.0, other.1.at)) {
        let Some(heads) = block::read_heads(&places[0].4, places[0].1)? else { continue };
        for (_, _, slot, at, _, marks) in places {
            read[*at] = heads.get(*slot as usize).map(|record| stored(record.clone(), *marks));
        }
    }
    Ok(read.into_iter().flatten().collect())
}

pub(super) fn read_one(log: &Path, block: Block, slot: u32, marks: [u8; 3]) -> io::Result<Option<Stored>> {
    let (Some(mut heads), Some(bodies)) = (block::read_heads(log, block)?, block::read_bodies(log, block)?) else {
        return Ok(None);
    };
    let is_whole = block::fill(&mut heads, &bodies).is_some() && (slot as usize) < heads.len();
    Ok(is_whole.then(|| stored(heads.swap_remove(slot as usize), marks)))
}

fn stored(record: Record, [_, feedback, score]: [u8; 3]) -> Stored {
    let feedback = (feedback > 0).then(|| feedback as i8 - 2);
    Stored { record, feedback, score: score.checked_sub(1) }
}
