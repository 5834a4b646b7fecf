//! Weights that are dequantized ahead: the next one, while the product with this one runs.
//!
//! A pass asks for the weights in the order of the pass before it. The order is remembered, and as
//! soon as one weight is asked for, the one that followed it is dequantized into the other of two
//! buffers on a stream of its own: behind the last product that read that buffer, beside the one
//! that comes now. A guess that was wrong costs its time and nothing else: what a buffer holds is
//! compared with what is wanted, and a buffer is waited for before it is read or written again.
//!
//! Only the frozen weight is dequantized ahead; what adapters add to it lies outside of it and is
//! written when it is used. Streamed weights are guessed within their block, as the next block may
//! still be on its way, and forgotten when another block takes their place. A head on the host takes
//! turns in the same buffers, a tile after another: these are copied, not dequantized.

use std::ops::Range;

use super::driver::{Address, Driver};
use super::memory::Buffer;
use super::weight::{DeviceWeight, Form, Packed};

/// Buffers for dequantized weights.
pub(super) const AHEAD_SLOTS: usize = 2;

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
    /// Of each row.
    pub columns: usize,
    /// From one row to the next.
    pub stride: usize,
    /// Where streamed weights lie; they are in turns.
    place: Option<Address>,
}

impl Wanted {
    /// `None` unless all are in 4-bit blocks, as wide as each other, and in the same place.
    pub fn new<D: Driver>(weights: &[&DeviceWeight<D>], stride: usize) -> Option<Self> {
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
        Some(Wanted { parts, columns, stride, place })
    }

    /// Rows of a weight that is not an operand as it lies, one right behind the other.
    pub fn of_rows<D: Driver>(weight: &DeviceWeight<D>, rows: Range<usize>) -> Self {
        let (columns, place) = (weight.shape[1], weight.place);
        let parts = [Some(WeightRows::of(weight, rows)), None, None];
        Wanted { parts, columns, stride: columns, place }
    }

    /// The parts, each with the number of its first row.
    pub fn parts(&self) -> impl Iterator<Item = (WeightRows, usize)> {
        let mut end = 0;
        self.parts.into_iter().flatten().map(move |part| {
            end += part.rows;
            (part, end - part.rows)
        })
    }

    fn elements(&self) -> usize {
        self.parts().map(|(part, _)| part.rows).sum::<usize>() * self.stride
    }
}

/// What is to be done for a weight that is asked for.
pub(super) struct Turn {
    /// Where it lies, or shall.
    pub to: Address,
    /// Slot to wait for first.
    pub pending: Option<usize>,
    /// Whether it is there then.
    pub ready: bool,
    /// What to bring ahead: into which slot, where.
    pub next: Option<(Wanted, usize, Address)>,
}

/// The buffers, one or two, and the order of requests.
pub(super) struct Ahead<D: Driver> {
    buffers: Vec<Buffer<D>>,
    /// What each holds, or will.
    held: [Option<Wanted>; AHEAD_SLOTS],
    /// Written ahead, and not waited for.
    pending: [bool; AHEAD_SLOTS],
    /// Of the last request.
    current: usize,
    /// Requests of the last pass that asked for something new.
    known: Vec<Wanted>,
    /// Where the next request is expected there.
    expected: usize,
    /// Requests of this pass.
    seen: Vec<Wanted>,
    /// Whether one of them is not known.
    news: bool,
}

impl<D: Driver> Ahead<D> {
    /// With one buffer nothing is brought ahead.
    pub fn new(buffers: Vec<Buffer<D>>) -> Self {
        Ahead {
            buffers,
            held: [None; AHEAD_SLOTS],
            pending: [false; AHEAD_SLOTS],
            current: 0,
            known: Vec::new(),
            expected: 0,
            seen: Vec::new(),
            news: false,
        }
    }

    /// Elements of a buffer.
    pub fn elements(&self) -> usize {
        self.buffers[0].elements
    }

    /// A pass begins.
    pub fn begin_pass(&mut self) {
        if self.news {
            std::mem::swap(&mut self.known, &mut self.seen);
        }
        self.seen.clear();
        (self.expected, self.news) = (0, false);
    }

    /// A buffer for `wanted`, which fits: the one that holds it, or the one that was not the last.
    pub fn turn(&mut self, wanted: Wanted) -> Turn {
        let holds = self.held.iter().position(|held| *held == Some(wanted));
        self.current = holds.unwrap_or((self.current + 1) % self.buffers.len());
        self.held[self.current] = Some(wanted);
        let pending = std::mem::take(&mut self.pending[self.current]);
        let next = self.follower(wanted).and_then(|next| self.ahead_of(&wanted, next));
        let to = self.buffers[self.current].at(0..wanted.elements());
        Turn { to, pending: pending.then_some(self.current), ready: holds.is_some(), next }
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

    /// `next` into the other buffer, unless it is there, does not fit, or may be on its way to where it
    /// would be read.
    fn ahead_of(&mut self, wanted: &Wanted, next: Wanted) -> Option<(Wanted, usize, Address)> {
        let there = next.place.is_none() || next.place == wanted.place;
        let fits = next.elements() <= self.elements() && self.buffers.len() > 1;
        if !there || !fits || self.held.contains(&Some(next)) {
            return None;
        }
        let slot = (self.current + 1) % AHEAD_SLOTS;
        (self.held[slot], self.pending[slot]) = (Some(next), true);
        Some((next, slot, self.buffers[slot].at(0..next.elements())))
    }

    /// What the buffers hold is not to be used: the slots to wait for, before its source changes.
    pub fn forget(&mut self) -> impl Iterator<Item = usize> + use<D> {
        self.held = [None; AHEAD_SLOTS];
        let pending = std::mem::take(&mut self.pending);
        (0..AHEAD_SLOTS).filter(move |&slot| pending[slot])
    }
}
