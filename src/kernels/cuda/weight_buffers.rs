//! Weights in bf16: which are there already, and which is dequantized ahead, the next one, while the
//! product with this one runs.
//!
//! A weight that is asked for may still be in one of the buffers: the product before was the last to use
//! it forward and is the first to use it backward, a block that recomputes asks for most of its weights
//! twice, tiles of an MLP ask for the same ones again, and passes go through the blocks back and forth.
//! Otherwise it goes to the one that was not used for longest of those that are made for it. Two take
//! weights of any size; there may be others, each for a linear of a block, of some blocks or of all
//! ([`dequantized_blocks`](crate::plan::Settings::dequantized_blocks)).
//!
//! A pass asks for the weights in the order of the pass before it. The order is remembered, and as
//! soon as one weight is asked for, the one that followed it is dequantized into another
//! buffer on a stream of its own: behind the last product that read that buffer, beside the one
//! that comes now. A guess that was wrong costs its time and nothing else: what a buffer holds is
//! compared with what is wanted, and a buffer is waited for before it is read or written again.
//!
//! Only the frozen weight is dequantized; what adapters add to it lies outside of it and is
//! written when it is used. Streamed weights are guessed within their block, as the next block may
//! still be on its way, and forgotten when another block takes their place. A head on the host takes
//! turns in the two buffers of any size, a tile after another: these are copied, not dequantized.

use std::ops::Range;

use super::driver::{Address, Driver};
use super::frozen::Extended;
use super::memory::Buffer;
use super::weight::{DeviceWeight, Form, Packed};

/// Weights that one product takes at most: q, k and v.
pub(super) const STACKED: usize = 3;

/// What a buffer is filled from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Source {
    /// Rows of a 4-bit weight from this one on.
    Packed(Packed, usize),
    /// Rows in bf16 in pinned memory of the host.
    Pinned(Address),
}

/// Some rows of a weight, and where they lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct WeightRows {
    pub source: Source,
    pub rows: usize,
}

impl WeightRows {
    fn of<D: Driver>(weight: &DeviceWeight<D>, rows: Range<usize>) -> Self {
        let source = match weight.form {
            Form::Packed(packed) => Source::Packed(packed, rows.start),
            Form::Dense(address) => {
                assert!(weight.on_host, "a dense weight on the device is an operand as it lies");
                Source::Pinned(address + 2 * (rows.start * weight.shape[1]) as u64)
            }
        };
        WeightRows { source, rows: rows.len() }
    }
}

/// A weight, some of its rows, or several of equal width one below the other, and how the rows shall
/// lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Wanted {
    parts: [Option<WeightRows>; STACKED],
    /// Columns of each row.
    pub columns: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Elements that it needs of a buffer, with what is written beside it.
    pub elements: usize,
    /// Where streamed weights lie; they are in turns.
    place: Option<Address>,
}

impl Wanted {
    /// `weights` with room for adapters of `rank` in all; `None` unless all weights are in 4-bit blocks, as
    /// wide as each other, and in the same place.
    pub fn new<D: Driver>(weights: &[&DeviceWeight<D>], rank: usize) -> Option<Self> {
        let first = weights.first().filter(|_| weights.len() <= STACKED)?;
        let (columns, place) = (first.shape[1], first.place);
        let mut parts = [None; STACKED];
        for (part, weight) in parts.iter_mut().zip(weights) {
            match weight.form {
                Form::Packed(_) if (weight.shape[1], weight.place) == (columns, place) => {
                    *part = Some(WeightRows::of(weight, 0..weight.shape[0]));
                }
                _ => return None,
            }
        }
        let rows = weights.iter().map(|weight| weight.shape[0]).sum();
        let shape = Extended { rows, columns, rank };
        let (stride, elements) = (shape.stride(), shape.elements());
        Some(Wanted { parts, columns, stride, elements, place })
    }

    /// Rows of a weight that is not an operand as it lies, one right behind the other.
    pub fn of_rows<D: Driver>(weight: &DeviceWeight<D>, rows: Range<usize>) -> Self {
        let (columns, place) = (weight.shape[1], weight.place);
        let elements = rows.len() * columns;
        let parts = [Some(WeightRows::of(weight, rows)), None, None];
        Wanted { parts, columns, stride: columns, elements, place }
    }

    /// The parts, each with the number of its first row.
    pub fn parts(&self) -> impl Iterator<Item = (WeightRows, usize)> {
        let mut end = 0;
        self.parts.into_iter().flatten().map(move |part| {
            end += part.rows;
            (part, end - part.rows)
        })
    }

    /// Whether it is copied from the host.
    fn is_pinned(&self) -> bool {
        self.parts().any(|(part, _)| matches!(part.source, Source::Pinned(_)))
    }
}

/// What is to be done for a weight that is asked for.
pub(super) struct Turn {
    /// Where it lies, or shall.
    pub to: Address,
    /// Whether it is on its way there, or another one is: to be waited for first.
    pub pending: bool,
    /// Whether it is there then.
    pub ready: bool,
    /// What to bring ahead, and where.
    pub next: Option<(Wanted, Address)>,
}

/// A buffer that weights take turns in.
struct Slot<D: Driver> {
    buffer: Buffer<D>,
    /// Columns of the rows that it is made for; `None` for any.
    columns: Option<usize>,
    /// What it holds, or will.
    held: Option<Wanted>,
    /// Written ahead, and not waited for.
    pending: bool,
    /// The request at which it was last used, or written ahead.
    used: u64,
}

/// The buffers, and the order of requests.
pub(super) struct WeightBuffers<D: Driver> {
    slots: Vec<Slot<D>>,
    /// Requests so far.
    requests: u64,
    /// Requests of the last pass that asked for something new.
    known: Vec<Wanted>,
    /// Where the next request is expected there.
    expected: usize,
    /// Requests of this pass.
    seen: Vec<Wanted>,
    /// Whether one of them is not known.
    news: bool,
}

impl<D: Driver> WeightBuffers<D> {
    /// The first one is as large as anything that is asked for, the others may be for rows of so many columns.
    /// With one buffer in all nothing is brought ahead.
    pub fn new(buffers: Vec<(Buffer<D>, Option<usize>)>) -> Self {
        let slot =
            |(buffer, columns)| Slot { buffer, columns, held: None, pending: false, used: 0 };
        WeightBuffers {
            slots: buffers.into_iter().map(slot).collect(),
            requests: 0,
            known: Vec::new(),
            expected: 0,
            seen: Vec::new(),
            news: false,
        }
    }

    /// Elements that can be asked for.
    pub fn elements(&self) -> usize {
        self.slots[0].buffer.elements
    }

    /// A pass begins.
    pub fn begin_pass(&mut self) {
        if self.news {
            std::mem::swap(&mut self.known, &mut self.seen);
        }
        self.seen.clear();
        (self.expected, self.news) = (0, false);
    }

    /// A buffer for `wanted`, which fits: the one that holds it, or the one to give up for it.
    pub fn turn(&mut self, wanted: Wanted) -> Turn {
        self.requests += 1;
        let holds = self.slots.iter().position(|slot| slot.held == Some(wanted));
        let current = holds.or_else(|| self.oldest(&wanted, None)).expect("it fits");
        let pending = std::mem::take(&mut self.slots[current].pending);
        let to = self.give(current, wanted);
        let next = self.follower(wanted).and_then(|next| self.ahead_of(&wanted, current, next));
        Turn { to, pending, ready: holds.is_some(), next }
    }

    /// Where `wanted` lies in a slot from now on.
    fn give(&mut self, slot: usize, wanted: Wanted) -> Address {
        let slot = &mut self.slots[slot];
        (slot.held, slot.used) = (Some(wanted), self.requests);
        slot.buffer.as_matrix(1, wanted.elements).address
    }

    /// The slot that was not used for longest: of the smallest ones with rows of as many columns, or of others
    /// where there are none, or only `except`.
    fn oldest(&self, wanted: &Wanted, except: Option<usize>) -> Option<usize> {
        let fits = |slot: &Slot<D>| {
            let usable = slot.columns.is_none() || !wanted.is_pinned();
            usable && slot.buffer.elements >= wanted.elements
        };
        let fitting = self.slots.iter().enumerate().filter(|(_, slot)| fits(slot));
        let made_for_it = fitting.clone().filter(|(_, slot)| slot.columns == Some(wanted.columns));
        let least = made_for_it.map(|(_, slot)| slot.buffer.elements).min();
        let is_other = |slot: &Slot<D>| {
            slot.columns != Some(wanted.columns) || Some(slot.buffer.elements) != least
        };
        let allowed = fitting.filter(|(index, _)| Some(*index) != except);
        let oldest = allowed.min_by_key(|(_, slot)| (is_other(slot), slot.used));
        oldest.map(|(index, _)| index)
    }

    /// What came after it in a pass before. Passes differ in their chunks of rows, so a request that is
    /// not the expected one is looked for behind it, then before it.
    fn follower(&mut self, wanted: Wanted) -> Option<Wanted> {
        self.seen.push(wanted);
        let (before, behind) = self.known.split_at(self.expected.min(self.known.len()));
        let found = behind.iter().position(|known| *known == wanted);
        let found = found.map(|at| before.len() + at);
        let found = found.or_else(|| before.iter().rposition(|known| *known == wanted));
        self.news |= found.is_none();
        self.expected = found? + 1;
        self.known.get(self.expected).copied()
    }

    /// `next` into another slot than `current`, which has `wanted`, unless it is there, does not fit, or may be
    /// on its way to where it would be read.
    fn ahead_of(
        &mut self,
        wanted: &Wanted,
        current: usize,
        next: Wanted,
    ) -> Option<(Wanted, Address)> {
        let there = next.place.is_none() || next.place == wanted.place;
        if !there || self.slots.iter().any(|slot| slot.held == Some(next)) {
            return None;
        }
        let slot = self.oldest(&next, Some(current))?;
        self.slots[slot].pending = true;
        Some((next, self.give(slot, next)))
    }

    /// What the buffers hold is not to be used: whether something is on its way to them, to be waited for
    /// before its source changes.
    pub fn forget(&mut self) -> bool {
        self.slots.iter_mut().fold(false, |pending, slot| {
            slot.held = None;
            std::mem::take(&mut slot.pending) || pending
        })
    }
}
