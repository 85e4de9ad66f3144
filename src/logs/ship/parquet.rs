//! Writes a Parquet file: columns that are all known beforehand, rows that come one after the other.
//!
//! ```text
//! cell ──> its column: levels, values ──a megabyte──> page, gzip ──┐
//!                                                                  v
//! "PAR1" │ pages of column 1 │ pages of column 2 │ … │ footer: schema, where pages are, least and most │ length │ "PAR1"
//! ```
//!
//! One row group a file. Of the long columns only the page that is being filled is held uncompressed. Any cell may be null. Groups are
//! one level deep and never null themselves, so a level is 0 for a null and 1 for a value.
//!
//! The format is that of Apache Parquet: parquet.thrift, Encodings.md and LogicalTypes.md of github.com/apache/parquet-format (2.11).
//! Pages are of version 1 with PLAIN values and RLE levels, which every reader knows.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;

use super::thrift::{Struct, structure, varint};

const MAGIC: &[u8; 4] = b"PAR1";
/// Bytes of a page before compression, from which on it is closed.
const PAGE: usize = 1 << 20;
const CREATED_BY: &str = concat!("neurond version ", env!("CARGO_PKG_VERSION"));

// Numbers of parquet.thrift.
const OPTIONAL: i32 = 1;
const REQUIRED: i32 = 0;
const PLAIN: i32 = 0;
const RLE: i32 = 3;
const GZIP: i32 = 2;
const DATA_PAGE: i32 = 0;

/// What a column holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Flag,
    Integer,
    /// Milliseconds since 1970, UTC.
    Time,
    Real,
    /// UTF-8.
    Text,
}

impl Kind {
    fn physical(self) -> i32 {
        match self {
            Self::Flag => 0,
            Self::Integer | Self::Time => 2,
            Self::Real => 5,
            Self::Text => 6,
        }
    }

    /// Both ways of saying what the bytes mean, the old one for old readers.
    fn logical(self, element: &mut Struct<'_>) {
        match self {
            Self::Text => {
                element.i32(6, 0);
                element.structure(10, |kind| kind.structure(1, |_| {}));
            }
            Self::Time => {
                element.i32(6, 9);
                let milliseconds = |unit: &mut Struct<'_>| unit.structure(1, |_| {});
                element.structure(10, |kind| {
                    kind.structure(8, |time| {
                        time.flag(1, true);
                        time.structure(2, milliseconds);
                    })
                });
            }
            Self::Flag | Self::Integer | Self::Real => {}
        }
    }
}

/// The cells of one column.
pub(super) struct Column {
    /// Its name, behind that of its group and a dot where it has one.
    path: &'static str,
    kind: Kind,
    values: Vec<u8>,
    /// Runs of levels that have ended.
    levels: Vec<u8>,
    /// The level of the current run, and how long it is.
    run: (bool, u64),
    /// Cells of the page, and those of them that are no nulls.
    page: (usize, usize),
    cells: usize,
    nulls: usize,
    /// Of integers and times.
    range: Option<(i64, i64)>,
    /// Finished, with their heads.
    pages: Vec<u8>,
    /// What they were before compression, with their heads.
    plain: usize,
}

impl Column {
    pub(super) fn new((path, kind): (&'static str, Kind)) -> Self {
        Self {
            path,
            kind,
            values: Vec::new(),
            levels: Vec::new(),
            run: (true, 0),
            page: (0, 0),
            cells: 0,
            nulls: 0,
            range: None,
            pages: Vec::new(),
            plain: 0,
        }
    }

    /// Its group and its name in there.
    pub(super) fn name(&self) -> (Option<&'static str>, &'static str) {
        self.path.split_once('.').map_or((None, self.path), |(parent, name)| (Some(parent), name))
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn null(&mut self) {
        self.nulls += 1;
        self.level(false);
    }

    /// For [`Kind::Flag`]: eight in a byte, the first in its lowest bit.
    pub(super) fn flag(&mut self, value: bool) {
        debug_assert_eq!(self.kind, Kind::Flag);
        let bit = self.page.1 % 8;
        if bit == 0 {
            self.values.push(0);
        }
        if let Some(byte) = self.values.last_mut() {
            *byte |= u8::from(value) << bit;
        }
        self.level(true);
    }

    /// For [`Kind::Integer`] and [`Kind::Time`].
    pub(super) fn integer(&mut self, value: i64) {
        debug_assert!(matches!(self.kind, Kind::Integer | Kind::Time));
        let (least, most) = self.range.unwrap_or((value, value));
        self.range = Some((least.min(value), most.max(value)));
        self.values.extend_from_slice(&value.to_le_bytes());
        self.level(true);
    }

    /// For [`Kind::Real`].
    pub(super) fn real(&mut self, value: f64) {
        debug_assert_eq!(self.kind, Kind::Real);
        self.values.extend_from_slice(&value.to_le_bytes());
        self.level(true);
    }

    /// For [`Kind::Text`].
    pub(super) fn text(&mut self, value: &str) {
        debug_assert_eq!(self.kind, Kind::Text);
        // A text is a part of a line, which is a megabyte at most.
        self.values.extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.values.extend_from_slice(value.as_bytes());
        self.level(true);
    }

    /// Closes the page when it is full; to be called after each cell.
    ///
    /// # Errors
    /// If it cannot be compressed.
    pub(super) fn turn(&mut self, effort: u32) -> io::Result<()> {
        if self.values.len() + self.levels.len() < PAGE { Ok(()) } else { self.close(effort) }
    }

    fn level(&mut self, is_there: bool) {
        if self.run.0 != is_there {
            self.end_run();
            self.run.0 = is_there;
        }
        self.run.1 += 1;
        self.cells += 1;
        self.page = (self.page.0 + 1, self.page.1 + usize::from(is_there));
    }

    fn end_run(&mut self) {
        let (is_there, length) = self.run;
        if length > 0 {
            // A last bit of 0 says that the same level comes so often.
            varint(length << 1, &mut self.levels);
            self.levels.push(is_there.into());
        }
        self.run.1 = 0;
    }

    fn close(&mut self, effort: u32) -> io::Result<()> {
        self.end_run();
        let mut packed = GzEncoder::new(Vec::new(), Compression::new(effort));
        packed.write_all(&(self.levels.len() as u32).to_le_bytes())?;
        packed.write_all(&self.levels)?;
        packed.write_all(&self.values)?;
        let packed = packed.finish()?;
        let size = 4 + self.levels.len() + self.values.len();
        let begin = self.pages.len();
        structure(&mut self.pages, |head| {
            head.i32(1, DATA_PAGE);
            // Both are a page and a line at most.
            head.i32(2, size as i32);
            head.i32(3, packed.len() as i32);
            head.structure(5, |data| {
                data.i32(1, self.page.0 as i32);
                data.i32(2, PLAIN);
                data.i32(3, RLE);
                data.i32(4, RLE);
            });
        });
        self.plain += self.pages.len() - begin + size;
        self.pages.extend_from_slice(&packed);
        self.values.clear();
        self.levels.clear();
        self.page = (0, 0);
        Ok(())
    }

    /// Its `ColumnMetaData`, with its pages beginning at `offset`.
    fn describe(&self, meta: &mut Struct<'_>, offset: usize, packed: usize) {
        meta.i32(1, self.kind.physical());
        meta.i32s(2, &[PLAIN, RLE]);
        let (parent, name) = self.name();
        meta.binaries(3, &parent.into_iter().chain([name]).collect::<Vec<_>>());
        meta.i32(4, GZIP);
        meta.i64(5, self.cells as i64);
        meta.i64(6, self.plain as i64);
        meta.i64(7, packed as i64);
        meta.i64(9, offset as i64);
        meta.structure(12, |statistics| {
            statistics.i64(3, self.nulls as i64);
            if let Some((least, most)) = self.range {
                statistics.binary(5, &most.to_le_bytes());
                statistics.binary(6, &least.to_le_bytes());
            }
        });
    }
}

/// Makes a file of columns that have as many cells each.
///
/// # Errors
/// If they cannot be compressed.
pub(super) fn finish(mut columns: Vec<Column>, effort: u32) -> io::Result<Vec<u8>> {
    let rows = columns.first().map_or(0, |column| column.cells);
    debug_assert!(columns.iter().all(|column| column.cells == rows));
    let mut file = MAGIC.to_vec();
    let mut places = Vec::with_capacity(columns.len());
    for column in &mut columns {
        if column.page.0 > 0 {
            column.close(effort)?;
        }
        places.push((file.len(), column.pages.len()));
        // The memory goes as the file grows.
        file.append(&mut std::mem::take(&mut column.pages));
    }
    let begin = file.len();
    let plain: usize = columns.iter().map(|column| column.plain).sum();
    structure(&mut file, |footer| {
        footer.i32(1, 1);
        let elements = elements(&columns);
        footer.structures(2, elements.into_iter(), describe);
        footer.i64(3, rows as i64);
        footer.structures(4, std::iter::once(()), |group, ()| {
            group.structures(1, columns.iter().zip(&places), |chunk, (column, &(offset, packed))| {
                chunk.i64(2, 0);
                chunk.structure(3, |meta| column.describe(meta, offset, packed));
            });
            group.i64(2, plain as i64);
            group.i64(3, rows as i64);
            group.i64(5, MAGIC.len() as i64);
            group.i64(6, (begin - MAGIC.len()) as i64);
        });
        footer.binary(6, CREATED_BY.as_bytes());
        // Without an order, readers may not believe what is least and most: that of its type, for each.
        footer.structures(7, columns.iter(), |order, _| order.structure(1, |_| {}));
    });
    let length = (file.len() - begin) as u32;
    file.extend_from_slice(&length.to_le_bytes());
    file.extend_from_slice(MAGIC);
    Ok(file)
}

/// One of the schema's nodes, which are listed as a depth-first walk meets them.
enum Element {
    Group { name: &'static str, repetition: Option<i32>, children: usize },
    Leaf { name: &'static str, kind: Kind },
}

fn elements(columns: &[Column]) -> Vec<Element> {
    let mut elements = Vec::with_capacity(columns.len() + 4);
    let (mut group, mut top) = (None, 0);
    for column in columns {
        let (parent, name) = column.name();
        if parent.is_none() || parent != group {
            top += 1;
        }
        if let Some(name) = parent.filter(|_| parent != group) {
            let children = columns.iter().filter(|column| column.name().0 == parent).count();
            elements.push(Element::Group { name, repetition: Some(REQUIRED), children });
        }
        group = parent;
        elements.push(Element::Leaf { name, kind: column.kind });
    }
    elements.insert(0, Element::Group { name: "schema", repetition: None, children: top });
    elements
}

fn describe(element: &mut Struct<'_>, node: Element) {
    match node {
        Element::Group { name, repetition, children } => {
            if let Some(repetition) = repetition {
                element.i32(3, repetition);
            }
            element.binary(4, name.as_bytes());
            element.i32(5, children as i32);
        }
        Element::Leaf { name, kind } => {
            element.i32(1, kind.physical());
            element.i32(3, OPTIONAL);
            element.binary(4, name.as_bytes());
            kind.logical(element);
        }
    }
}
